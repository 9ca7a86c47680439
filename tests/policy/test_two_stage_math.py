"""Two-stage recipe: its rewards against plain loops, as functions and in real runs. The stages: tests/job."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import DlerGRPOTrainer, TwoStageMathGRPOConfig, TwoStageMathGRPOTrainer, compose
from papertrl.losses.policy.two_stage_math import cosine_reward, relative_length_reward
from papertrl.rewards import boxed_format, boxed_match, cosine_length, exact_match, load_reward, relative_length

from ..harness.rollouts import checksum, make, metric, recorded, run
from ..harness.table import dataset, settings

rows = st.lists(
    st.tuples(st.sampled_from([0, 1, 4]), st.integers(0, 12) | st.none(), st.booleans()), min_size=1, max_size=12
)


def cosine_by_hand(length, correct, longest, right=(1.0, 0.1), wrong=(-1.0, -0.1)):
    short, long = right if correct else wrong
    return long + 0.5 * (short - long) * (1 + math.cos(math.pi * min(1.0, length / longest)))


def relative_by_hand(lengths, correct, i):
    """Reward of row i among the lengths of its group."""
    shortest, longest = min(lengths), max(lengths)
    if shortest == longest:
        return 0.0
    value = 0.5 - (lengths[i] - shortest) / (longest - shortest)
    return value if correct[i] else min(0.0, value)


def columns(drawn):
    ids, lengths, correct = zip(*drawn, strict=True)
    lengths = [math.nan if length is None else float(length) for length in lengths]
    return torch.tensor(lengths, dtype=torch.float64), torch.tensor(correct), torch.tensor(ids)


@given(rows, st.integers(1, 10))
def test_cosine(drawn, longest):
    lengths, correct, _ = columns(drawn)
    found = cosine_reward(lengths, correct, longest)
    for value, (_, length, right) in zip(found.tolist(), drawn, strict=True):
        if length is None:
            assert math.isnan(value)
        else:
            assert value == pytest.approx(cosine_by_hand(length, right, longest))
            assert (0.1 <= value <= 1) if right else (-1 <= value <= -0.1)


@given(rows)
def test_relative_length(drawn):
    lengths, correct, ids = columns(drawn)
    found = relative_length_reward(lengths, correct, ids)
    for place, (group, length, _) in enumerate(drawn):
        if length is None:
            assert math.isnan(found[place])
            continue
        peers = [j for j, (g, other, _) in enumerate(drawn) if g == group and other is not None]
        expected = relative_by_hand([drawn[j][1] for j in peers], [drawn[j][2] for j in peers], peers.index(place))
        assert found[place].item() == pytest.approx(expected)


def test_lengths_that_are_all_equal_or_unknown_are_finite_or_nan():
    ids, right = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool)
    assert relative_length_reward(torch.full((3,), 5.0), right, ids).tolist() == [0.0] * 3
    assert relative_length_reward(torch.full((3,), torch.nan), right, ids).isnan().all()
    assert relative_length_reward(torch.tensor([5.0]), right[:1], ids[:1]).tolist() == [0.0]


# --- Reward functions -------------------------------------------------------------------------------------------


def messages(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


@pytest.mark.parametrize("form", [list, messages], ids=["text", "messages"])
def test_box_before_the_end_of_thinking(form):
    texts = {
        r"so \boxed{4}.</think>4": 1.0,
        r"\boxed{\frac{1}{2}}</think>": 1.0,
        r"so </think>\boxed{4}": 0.0,
        r"\boxed{4": 0.0,
        r"\boxed{4}": 0.0,
        r"\boxed{4</think>}": 0.0,
        "</think>": 0.0,
        "": 0.0,
    }
    assert boxed_format(completions=form(list(texts))) == list(texts.values())


def test_boxed_answers():
    texts = {
        r"\boxed{4}, not \boxed{5}": 1.0,
        r"\boxed{5}, not \boxed{4}": 0.0,
        r"\boxed{ 4.0 }": 1.0,
        r"\boxed{}": 0.0,
        r"\boxed{4": 0.0,
        "4": 0.0,
    }
    assert boxed_match(completions=list(texts), answer=["4"] * len(texts)) == list(texts.values())
    assert boxed_match([r"\boxed{\frac{1}{2}}", r"\boxed{1,000}"], answer=[r"\frac{1}{2}", "1000"]) == [1.0, 1.0]


@pytest.mark.parametrize("unit", ["characters", "tokens"])
def test_length_rewards_of_any_verifier(unit):
    completions = ["52", "52 ", "5", "052", "1"]
    prompts, answer = ["a", "b", "a", "b", "b"], ["52"] * 5
    ids = [[1] * n for n in (4, 7, 2, 9, 9)]
    lengths = [len(x) for x in (completions if unit == "characters" else ids)]
    correct = [True, True, False, False, False]
    given_columns = {"prompts": prompts, "completions": completions, "completion_ids": ids, "answer": answer}
    cosine = cosine_length(exact_match, max_length=8, unit=unit)(**given_columns)
    relative = relative_length(exact_match, unit)(**given_columns)
    for i in range(5):
        assert cosine[i] == pytest.approx(cosine_by_hand(lengths[i], correct[i], 8))
        peers = [j for j in range(5) if prompts[j] == prompts[i]]
        expected = relative_by_hand([lengths[j] for j in peers], [correct[j] for j in peers], peers.index(i))
        assert relative[i] == pytest.approx(expected)
    # The order of the rows does not matter
    mixed = {name: values[::-1] for name, values in given_columns.items()}
    assert relative_length(exact_match, unit)(**mixed) == relative[::-1]


def test_where_the_verifier_does_not_apply_nor_does_the_length():
    def sometimes(completions, **kwargs):
        return [None if text == "?" else 1.0 for text in completions]

    columns = {"prompts": ["a"] * 3, "completions": ["?", "12345", "1"]}
    assert cosine_length(sometimes, 10)(**columns)[0] is None
    assert relative_length(sometimes)(**columns) == [None, -0.5, 0.5]


def test_by_name():
    columns = {"prompts": ["a"] * 2, "completions": ["4", "44"], "completion_ids": [[1], [1, 2]], "answer": ["4", "4"]}
    assert load_reward("relative_length:exact_match", 8)(**columns) == [0.5, -0.5]
    found = load_reward("cosine_length:exact_match", 4)(**columns)
    assert found == pytest.approx([cosine_by_hand(1, True, 4), cosine_by_hand(2, False, 4)])
    assert load_reward("cosine_length", 4)(**columns) == pytest.approx(
        [cosine_by_hand(1, False, 4), cosine_by_hand(2, False, 4)]
    )
    assert load_reward("boxed_format", 4) is boxed_format
    for name in ("cosine_length:exact_mach", "cosine_lenth"):
        with pytest.raises(ValueError, match=r"unknown reward .*Did you mean"):
            load_reward(name, 4)
    with pytest.raises(ValueError, match="`unit` must be 'characters' or 'tokens', got 'words'"):
        relative_length(unit="words")


# --- The trainer ------------------------------------------------------------------------------------------------


def advantages_by_hand(scored, args):
    """Advantages of a batch of right (1.0) and wrong (0.0) completions, from the method card."""
    rewards, lengths, ids = (x.tolist() for x in (scored.rewards[:, 0], scored.lengths, scored.group_ids))
    totals = []
    for i, reward in enumerate(rewards):
        total = reward
        total += args.two_stage_cosine_weight * cosine_by_hand(
            lengths[i],
            reward > 0,
            args.two_stage_cosine_max_length or args.max_completion_length,
            args.two_stage_cosine_right,
            args.two_stage_cosine_wrong,
        )
        peers = [j for j in range(len(ids)) if ids[j] == ids[i] or args.two_stage_relative_length_scope == "batch"]
        correct = [rewards[j] > 0 for j in peers]
        total += args.two_stage_relative_length_weight * relative_by_hand(
            [lengths[j] for j in peers], correct, peers.index(i)
        )
        totals.append(total)
    advantages = []
    for i, total in enumerate(totals):
        peers = torch.tensor([totals[j] for j in range(len(ids)) if ids[j] == ids[i]])
        advantages.append((total - peers.mean()) / (peers.std() + 1e-4))
    return torch.stack(advantages)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"two_stage_cosine_weight": 0.0, "two_stage_relative_length_weight": 2.0},
        {
            "two_stage_cosine_max_length": 3,
            "two_stage_cosine_right": [2.0, 0.5],
            "two_stage_cosine_wrong": [-0.5, 0.0],
        },
        {"two_stage_relative_length_scope": "batch"},
    ],
    ids=str,
)
def test_advantages_of_a_run_are_those_computed_by_hand(options, policy_path, tmp_path):
    trainer = run(TwoStageMathGRPOTrainer, policy_path, tmp_path, **options)
    changed = 0
    for scored, batch, _, _ in trainer.generations:
        expected = advantages_by_hand(scored, trainer.args)
        torch.testing.assert_close(scored.advantages, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch["advantages"], scored.advantages)
        plain = scored.rewards[:, 0].reshape(-1, 4)
        centered = (plain - plain.mean(1, keepdim=True)) / (plain.std(1, keepdim=True) + 1e-4)
        changed += int((centered.flatten() - scored.advantages).abs().gt(1e-2).sum())
        # What was measured stays as it is: correctness
        assert set(scored.rewards.unique().tolist()) <= {0.0, 1.0}
    assert changed > 0
    assert min(metric(trainer, "two_stage_math/length_reward_size")) > 0
    right = [s.lengths[s.rewards[:, 0] > 0].float().mean().item() for s, _, _, _ in trainer.generations]
    assert metric(trainer, "two_stage_math/length_of_right") == pytest.approx(right)


def test_the_papers_sum_has_format_and_length_but_no_accuracy(policy_path, tmp_path):
    """Correctness is told by a reward of weight 0."""

    def formatted(completions, **kwargs):
        return [0.25] * len(completions)

    args = TwoStageMathGRPOConfig(
        **settings("policy", tmp_path, max_steps=1, two_stage_correctness_reward="checksum", reward_weights=[0.0, 1.0])
    )
    trainer_class = recorded(TwoStageMathGRPOTrainer)
    trainer = trainer_class(policy_path, [checksum, formatted], args, train_dataset=dataset("policy"))
    trainer.train()
    scored, _, _, _ = trainer.generations[0]
    found = trainer.combine_rewards(scored)
    ids = scored.group_ids.tolist()
    for i, correct in enumerate((scored.rewards[:, 0] > 0).tolist()):
        peers = [j for j in range(len(ids)) if ids[j] == ids[i]]
        lengths = [scored.lengths[j].item() for j in peers]
        expected = 0.25 + cosine_by_hand(scored.lengths[i].item(), correct, 8)
        expected += relative_by_hand(lengths, [bool(scored.rewards[j, 0] > 0) for j in peers], peers.index(i))
        assert found[i].item() == pytest.approx(expected, abs=1e-5)


def test_rows_that_nobody_scored_stay_out(policy_path, tmp_path):
    def partial(completions, **kwargs):
        return [None if i % 4 == 0 else 1.0 for i in range(len(completions))]

    trainer = run(TwoStageMathGRPOTrainer, policy_path, tmp_path, partial, max_steps=1)
    scored, _, _, _ = trainer.generations[0]
    assert scored.advantages[::4].tolist() == [0.0] * (len(scored.lengths) // 4)
    lengths = scored.lengths.float().masked_fill(scored.rewards[:, 0].isnan(), torch.nan).reshape(-1, 4)
    varied = (lengths[:, 1:].amax(1) > lengths[:, 1:].amin(1)).repeat_interleave(4)
    assert varied.any() and torch.equal((scored.advantages != 0).reshape(-1, 4)[:, 1:].any(1), varied[::4])


def test_with_a_refill_it_is_the_kept_groups_that_are_compared(policy_path, tmp_path):
    """Length rewards make DLER keep groups whose completions are all right."""
    trainer_class = compose(TwoStageMathGRPOTrainer, DlerGRPOTrainer)
    options = {"dler_advantage_whitening": "none", "dler_length_penalty": "none", "beta": 0.0, "max_steps": 1}

    def right(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = run(trainer_class, policy_path, tmp_path, right, **options)
    scored, _, _, _ = trainer.generations[0]
    assert scored.usable.all()
    torch.testing.assert_close(scored.advantages, advantages_by_hand(scored, trainer.args), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"two_stage_cosine_weight": -1.0}, r"`two_stage_cosine_weight` must be a number in \[0, inf\), got -1.0"),
        (
            {"two_stage_relative_length_weight": math.nan},
            r"`two_stage_relative_length_weight` must be a number in \[0, inf\), got nan",
        ),
        (
            {"two_stage_cosine_max_length": 0},
            r"`two_stage_cosine_max_length` must be a number in \[1, inf\) or None, got 0",
        ),
        ({"two_stage_cosine_right": [1.0]}, r"`two_stage_cosine_right` must be two numbers, got \[1.0\]"),
        (
            {"two_stage_cosine_right": [0.1, 1.0]},
            r"`two_stage_cosine_right` must fall.*got \[0.1, 1.0\] and \[-1.0, -0.1\]",
        ),
        (
            {"two_stage_cosine_wrong": [-1.0, 0.5]},
            r"`two_stage_cosine_right` must fall.*got \[1.0, 0.1\] and \[-1.0, 0.5\]",
        ),
        (
            {"two_stage_relative_length_scope": "rank"},
            "`two_stage_relative_length_scope` must be one of 'group', 'batch', got 'rank'",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got 'normalize_then_sum'",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        TwoStageMathGRPOConfig(**settings("policy", tmp_path, **values))


def test_unknown_correctness_reward_is_refused(policy_path, tmp_path):
    with pytest.raises(
        ValueError, match=r"`two_stage_correctness_reward` must be one of \['checksum'\], got 'accuracy'"
    ):
        make(TwoStageMathGRPOTrainer, policy_path, tmp_path, two_stage_correctness_reward="accuracy")
