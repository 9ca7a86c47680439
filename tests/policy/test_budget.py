"""Micro-batches by tokens: bounded passes, the same update."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from hypothesis import given
from hypothesis import strategies as st

from papertrl.core.compose import compose
from papertrl.trainers.policy.base import PolicyConfig, PolicyTrainer
from papertrl.trainers.policy.batching import MicroBatches
from papertrl.trainers.policy.budget import PassTokens, TokenBudget, take_passes
from papertrl.trainers.policy.record import RolloutRecord

from ..harness.resuming import SAVING, assert_resumes
from ..harness.table import active_config, build, dataset, digit_parity, history, reward_of, settings, weights


def rows_of(prompts, completions, unscored=0):
    """Rows in TRL's layout, with prompts and completions of these lengths; the last tokens are not scored."""
    width, time = max(prompts) + 1, max(completions) + 2
    prompt_mask = torch.tensor([[0] * (width - n) + [1] * n for n in prompts])
    completion_mask = torch.tensor([[1] * n + [0] * (time - n) for n in completions])
    loss_mask = torch.tensor([[1] * max(0, n - unscored) + [0] * (time - max(0, n - unscored)) for n in completions])
    return SimpleNamespace(
        # What stands on padding is arbitrary; prompts of one length are one prompt
        prompt_ids=torch.where(prompt_mask == 1, 7, torch.randint(50, prompt_mask.shape)),
        prompt_mask=prompt_mask,
        completion_mask=completion_mask,
        loss_mask=loss_mask,
    )


@st.composite
def ranks(draw):
    """Rows of each rank in groups: lengths of their prompts and completions, and which have an effect."""
    groups, size = draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def rank():
        prompts = [n for n in draw(st.lists(st.integers(1, 6), min_size=groups, max_size=groups)) for _ in range(size)]
        completions = draw(st.lists(st.integers(1, 9), min_size=len(prompts), max_size=len(prompts)))
        computed = draw(st.lists(st.booleans(), min_size=len(prompts), max_size=len(prompts)))
        return prompts, completions, torch.tensor(computed)

    return [rank() for _ in range(2)], size


@given(ranks(), st.booleans(), st.sampled_from([None, 4]), st.integers(1, 60), st.integers(1, 4), st.integers(1, 3))
def test_every_live_row_has_one_pass_within_the_budget(drawn, shared, multiple_of, limit, slots, windows):
    PartialState()
    drawn, size = drawn
    budget = TokenBudget(limit, slots)
    cuts = []
    for prompts, completions, computed in drawn:
        tokens = PassTokens(rows_of(prompts, completions, unscored=1), shared, multiple_of)
        groups = [row // size for row in range(len(prompts))]
        parts, _ = MicroBatches(slots * windows, windows, 1).share_out(torch.tensor(groups), computed)
        cuts.append((tokens, groups, [part.tolist() for part in parts]))

    def by_hand(rank, rows):
        prompts, completions, _ = drawn[rank]
        if shared:
            return sum({prompts[row] for row in rows}) + sum(completions[row] - 1 for row in rows)
        longest = max(completions[row] for row in rows)
        while multiple_of and longest % multiple_of:
            longest += 1
        return len(rows) * (max(prompts) + 1 + longest)

    for window in range(windows):
        needed = [budget.cut(parts[window], groups, tokens) for tokens, groups, parts in cuts]
        count = max(slots, *map(len, needed))
        for rank, (passes, (tokens, groups, parts)) in enumerate(zip(needed, cuts, strict=True)):
            for group in {groups[row] for row in parts[window]}:
                members = [row for row in parts[window] if groups[row] == group]
                assert by_hand(rank, members) > limit or any(set(members) <= set(part) for part in passes)
            spread = budget.spread(passes, count, groups, tokens)
            assert len(spread) == slots and all(spread)
            everything = [part for slot in spread for part in slot]
            assert len(everything) == count
            assert sorted(row for part in everything for row in part) == sorted(parts[window])
            for part in filter(None, everything):
                assert len(part) == 1 or by_hand(rank, part) <= limit
                assert tokens(part) == by_hand(rank, part)
            # Nobody stands in for a pass that others' rows could fill
            assert all(everything) or all(len(part) <= 1 for part in everything)


def make(model, folder, **values):
    args = PolicyConfig(**settings("policy", folder, **values))
    return PolicyTrainer(model, digit_parity, args, train_dataset=dataset("policy"))


def long_winded(prompt_ids, *args, **kwargs):
    """Completions of one to eight tokens, and a very long one; none of them a special token."""
    lengths = [40 if i == 5 else 1 + i % 8 for i in range(len(prompt_ids))]
    return [[4 + (3 * i + j) % 60 for j in range(n)] for i, n in enumerate(lengths)], None


def tokens_of_passes(trainer):
    """
    Two lists of how many tokens the model is given, with padding and without: of each pass of an update, and of each
    call without gradient.
    """
    seen, unseen = [], []

    def embed(module, inputs):
        padded, given = inputs[0].numel(), int((inputs[0] >= 4).sum())
        if torch.is_grad_enabled():
            seen[-1][0] += padded
            seen[-1][1] += given
        elif trainer.model.training:
            unseen.append((padded, given))

    statistics = trainer.policy_statistics

    def policy_statistics(model, record):
        seen.append([0, 0])
        return statistics(model, record)

    trainer.policy_statistics = policy_statistics
    trainer.model.get_input_embeddings().register_forward_pre_hook(embed)
    return seen, unseen


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
def test_no_pass_computes_more_than_the_budget_but_a_row_that_is_longer(share, policy_path, tmp_path, caplog):
    def run(limit):
        trainer = make(
            policy_path, tmp_path, max_tokens_per_micro_batch=limit, share_prompts=share, skip_zero_rows=False,
            max_completion_length=64, max_steps=2, num_iterations=2, per_device_train_batch_size=32,
            gradient_accumulation_steps=1,
        )  # fmt: skip
        trainer._generate_single_turn = long_winded
        counted = tokens_of_passes(trainer)
        trainer.train()
        # Padding does not count where prompts are shared
        return [sorted(given if share else padded for padded, given in part) for part in counted]

    (*_, whole), (*_, rollouts) = run(None)
    passes, parts = run(48)
    assert rollouts > 100 and len(parts) > 4 and parts[-1] <= 48
    assert whole > 150 and len(passes) > 8 and passes[-1] <= 48
    assert "is longer than" not in caplog.text
    passes, _ = run(20)
    # The long row, in both updates
    assert passes[-3] <= 20 and min(passes[-2:]) > 40
    assert caplog.text.count("is longer than `max_tokens_per_micro_batch`=20") == 1


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (["grpo"], {"num_iterations": 2, "max_steps": 2}),
        (["grpo"], {"steps_per_generation": 4, "max_steps": 3}),
        (["grpo"], {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "beta": 0.1}),
        (["grpo"], {"share_prompts": False, "importance_sampling_level": "sequence", "pad_to_multiple_of": 4}),
        (["lp_reg", "hapo"], {}),
        (["hpt_upge", "guide_grpo"], {"guide_reshape": "constant"}),
        (["dynamic_reward_weighting", "d3s"], {}),
    ],
    ids=lambda value: "+".join(map(str, value)),
)
def test_an_update_is_the_same_whatever_the_budget(names, values, policy_path, tmp_path):
    trainer_class = compose(*names)
    logs, found = [], []
    for limit in (12, 10_000):
        args = active_config(
            trainer_class, [name for name in names if name != "grpo"], tmp_path,
            **{"max_steps": 1, "optim": "sgd", "learning_rate": 0.1} | values, max_tokens_per_micro_batch=limit,
        )  # fmt: skip
        trainer = build(trainer_class, "policy", policy_path, args, reward=reward_of(trainer_class))
        trainer.train()
        logs.append([entry for entry in history(trainer) if "loss" in entry])
        found.append(weights(trainer))
    before = weights(make(policy_path, tmp_path))
    moved = max((found[1][name] - value).abs().max() for name, value in before.items())
    assert moved > 1e-4
    for name, value in found[1].items():
        assert (found[0][name] - value).abs().max() <= 2e-5 * moved + 1e-8, name
    # Means are over an optimizer step; extremes, and what methods count, of a pass
    for entry, expected in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "clip_ratio/region_mean", "kl", "hapo/h_mean"):
            assert entry.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), rel=1e-4, abs=1e-6), name


def test_a_row_that_stands_in_has_no_effect(policy_path, tmp_path):
    trainer = make(policy_path, tmp_path, max_tokens_per_micro_batch=30, beta=0.1, num_iterations=2)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    trainer._prepare_inputs([row for i in (1, 2) for row in [trainer.train_dataset[i]] * 4])
    record = RolloutRecord.from_batch(trainer._buffered_inputs[0])
    # Away from the reference, so that the divergence has a gradient
    trainer.model.get_output_embeddings().weight.data *= 1.5
    norms = []
    for passes in ([[0]], [[]]):
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, take_passes(record, passes, spare=0).as_batch())
        loss.backward()
        norms.append([loss.abs().item(), *(p.grad.abs().sum().item() for p in trainer.model.parameters())])
    assert min(norms[0]) > 0 and max(norms[1]) == 0
    stand_in = take_passes(record, [[0], []], spare=0).passes()[1]
    assert not stand_in.loss_mask.any() and not stand_in.row_weight.any()
    assert all(value == value for values in trainer._metrics["train"].values() for value in map(float, values))


def test_every_pass_ends_in_a_stage_and_the_last_one_in_a_whole_gradient(policy_path, tmp_path):
    whole, updates = [], []

    def after_backward(trainer):
        whole.append(trainer.accelerator.sync_gradients)

    def before_update(trainer, grad_norm):
        updates.append(len(whole))

    trainer = PolicyTrainer(
        policy_path,
        digit_parity,
        PolicyConfig(**settings("policy", tmp_path, max_tokens_per_micro_batch=20, skip_zero_rows=False)),
        train_dataset=dataset("policy"),
        eval_dataset=dataset("policy").select(range(2)),
        stages={"after_backward": after_backward, "before_update": before_update},
    )
    trainer._generate_single_turn = long_winded
    trainer.train()
    assert len(updates) == 3 and updates[0] > 3
    assert [i + 1 for i, last in enumerate(whole) if last] == updates
    # An evaluation is no update
    assert trainer.evaluate()["eval_entropy"] > 0 and len(whole) == updates[-1]


def test_who_compares_micro_batches_is_told(policy_path, tmp_path, caplog):
    args = active_config(compose("oblr_po"), ["oblr_po"], tmp_path, max_tokens_per_micro_batch=30, max_steps=1)
    build(compose("oblr_po"), "policy", policy_path, args).train()
    assert "is biased: `max_tokens_per_micro_batch` puts long rows together" in caplog.text


def test_a_run_is_resumed_within_a_generation_to_the_bit(policy_path, tmp_path):
    values = {"num_iterations": 2, "max_tokens_per_micro_batch": 30, "beta": 0.1}
    assert_resumes(lambda folder: make(policy_path, folder, **values, **SAVING), tmp_path, at=3)


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["grpo"], {"max_tokens_per_micro_batch": 0}, "`max_tokens_per_micro_batch` must be"),
        (["grpo"], {"group_batches": False}, "must be None with `group_batches=False`, got 30"),
        (["grpo"], {"optim": "lomo"}, "must be None with `optim='lomo'`, got 30"),
        (["grpo"], {"loss_type": "bnpo"}, "got 30: `loss_type='bnpo'` averages over the micro-batch"),
        (
            ["grpo"],
            {"gradient_accumulation_steps": 3, "steps_per_generation": 2},
            "got 30: .* end at different places",
        ),
        (["disco"], {}, "must be None with DisCO, got 30"),
        (["guide_grpo"], {}, "must be None with `guide_reshape='percentile'`, got 30"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, (dict, list)) else "",
)
def test_where_it_cannot_act_it_is_refused(names, values, message, policy_path, tmp_path):
    trainer_class = compose(*names)
    with pytest.raises(ValueError, match=message):
        args = active_config(
            trainer_class, [n for n in names if n != "grpo"], tmp_path, **{"max_tokens_per_micro_batch": 30} | values
        )
        build(trainer_class, "policy", policy_path, args)
