"""Scaf-GRPO against the card's algorithm, followed by hand."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from papertrl import ScafGRPOConfig, ScafGRPOTrainer
from papertrl.losses.policy.scaf_grpo import cumulative_hints, exempt_steps, weakest_success
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import distributions, make, metric, run, sampled
from ..harness.table import settings

BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4}
DUE = BATCH | {"scaf_exempt_ratio": 0.0}


def rare(completions, **kwargs):
    """Reward 1 for about a seventh of all texts."""
    return [float(sum(map(ord, c)) % 7 == 0) for c in completions]


def data():
    prompts = [f"{i}+{i + 1}=" for i in range(16)]
    ladder = [[f"{p}[1]", f"{p}[1]", f"{p}[11]", f"{p}[111]"][: 1 + i % 4] for i, p in enumerate(prompts)]
    return Dataset.from_dict({"prompt": prompts, "hints": ladder})


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=20))
def test_the_weakest_success_is_the_first(tries):
    solved = torch.tensor([s for s, _ in tries], dtype=torch.bool)
    group = torch.tensor([g for _, g in tries], dtype=torch.long)
    expected = [next((i for i, (s, g) in enumerate(tries) if s and g == k), len(tries)) for k in range(5)]
    assert weakest_success(solved, group, 5).tolist() == expected


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), st.lists(st.sampled_from("xyz"), max_size=4)))
def test_hints_accumulate_within_a_tier(tiers):
    expected = []
    for label, items in tiers.items():
        said = ""
        for item in items:
            said += " " + item
            if f"{label}:{said}" not in expected:
                expected.append(f"{label}:{said}")
    assert cumulative_hints(tiers) == expected


def test_exemption_is_a_share_or_a_number():
    assert exempt_steps(0.15, 1000) == 150 and exempt_steps(0.15, 1000, 50) == 50 and exempt_steps(0.15, 1000, 0) == 0


@pytest.mark.parametrize("search", ["sequential", "parallel"])
def test_the_algorithm_by_hand(search, policy_path, tmp_path):
    trainer = make(ScafGRPOTrainer, policy_path, tmp_path, rare, data(), **DUE, scaf_search=search, max_steps=3)
    trials, before = [], []
    reroll, repair = trainer.reroll, trainer.repair

    def traced(inputs, prompts, group_size=1):
        draft = reroll(inputs, prompts, group_size)
        solved = draft.scored.rewards.sum(1) > 0
        trials.append(list(zip([r["prompt"] for r in inputs], prompts, solved.tolist(), draft.rows, strict=True)))
        return draft

    def kept(draft):
        before.append(([dict(row) for row in draft.rows], draft.scored.rewards.sum(1).tolist()))
        repair(draft)

    trainer.reroll, trainer.repair = traced, kept
    trainer.train()
    assert len(trainer.generations) == len(before) == 3
    repaired_at_all, failed_at_all = 0, 0
    for (scored, batch, _, inputs), (rows, rewards) in zip(trainer.generations, before, strict=True):
        for first in range(0, 16, 4):
            group = range(first, first + 4)
            prompt, hints = inputs[first]["prompt"], list(dict.fromkeys(inputs[first]["hints"]))
            mine = [(hint, ok, row) for trial in trials for p, hint, ok, row in trial if p == prompt]
            changed = [i for i in group if scored.source[i] == Source.HINTED]
            if any(rewards[i] > 0 for i in group):
                assert not mine and not changed
                continue
            successes = [try_ for try_ in mine if try_[1]]
            tried = [hint for hint, _, _ in mine]
            if search == "parallel" or not successes:
                assert tried == hints
            else:
                assert tried == hints[: len(tried)] and successes == mine[-1:]
            assert len(changed) == bool(successes)
            repaired_at_all, failed_at_all = repaired_at_all + len(changed), failed_at_all + (not changed)
            for i in group:
                wanted = successes[0][2] if i in changed else rows[i]
                length = int(batch["completion_mask"][i].sum())
                assert batch["completion_ids"][i, :length].tolist() == wanted["completion_ids"]
                width = int(batch["prompt_mask"][i].sum())
                assert batch["prompt_ids"][i, -width:].tolist() == wanted["prompt_ids"]
            if changed:
                # One success among four: (N-1)/sqrt(N) and -1/sqrt(N), up to TRL's 1e-4 in the denominator
                expected = [1.5 if i in changed else -0.5 for i in group]
                assert scored.advantages[list(group)].tolist() == pytest.approx(expected, rel=1e-3)
            else:
                assert scored.advantages[list(group)].tolist() == [0.0] * 4
    assert repaired_at_all and failed_at_all
    assert sum(metric(trainer, "scaf/repaired_groups")) == repaired_at_all
    assert sum(metric(trainer, "scaf/intractable_groups")) == failed_at_all


def test_the_repaired_row_is_on_policy(policy_path, tmp_path):
    options = DUE | {"steps_per_generation": 4, "max_steps": 2}
    trainer = run(ScafGRPOTrainer, policy_path, tmp_path, rare, data(), **options)
    _, batch, model, _ = trainer.generations[0]
    assert (batch["source"] == Source.HINTED).any() and "sampled_prompt_ids" not in batch
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        logps = sampled(distributions(model, batch), batch)
    torch.testing.assert_close(batch["old_per_token_logps"][mask], logps[mask], rtol=1e-4, atol=1e-5)


def test_no_hints_in_the_exempt_steps(policy_path, tmp_path):
    trainer = run(ScafGRPOTrainer, policy_path, tmp_path, rare, data(), **BATCH, scaf_exempt_ratio=0.25, max_steps=8)
    hinted = [bool((scored.source == Source.HINTED).any()) for scored, *_ in trainer.generations]
    assert hinted[:2] == [False, False] and any(hinted[2:])
    assert len(metric(trainer, "scaf/trigger_rate")) == 6


def test_slots(policy_path, tmp_path):
    def places(**values):
        trainer = run(ScafGRPOTrainer, policy_path, tmp_path, rare, data(), **DUE, **values, max_steps=8)
        return {
            i % 4
            for scored, *_ in trainer.generations
            for i in (scored.source == Source.HINTED).nonzero()[:, 0].tolist()
        }

    assert places(scaf_slot="first") == {0}
    assert len(places()) > 1


def test_feedback_sees_the_rewards_without_hints(policy_path, tmp_path):
    trainer = run(ScafGRPOTrainer, policy_path, tmp_path, rare, data(), **DUE, max_steps=2)
    for scored, *_ in trainer.generations:
        hinted = scored.source == Source.HINTED
        assert (scored.sampled_rewards[hinted] == 0).all() and (scored.rewards[hinted] == 1).all()


def test_evaluation_gives_no_hints(policy_path, tmp_path):
    trainer = make(ScafGRPOTrainer, policy_path, tmp_path, rare, data(), **DUE, per_device_eval_batch_size=8)
    assert math.isfinite(trainer.evaluate(data().select(range(4)))["eval_loss"])
    assert (trainer.generations[0][1]["source"] == Source.POLICY).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scaf_exempt_ratio": 1.5}, r"`scaf_exempt_ratio` must be a number in \[0, 1\], got 1.5"),
        ({"scaf_exempt_steps": -1}, r"`scaf_exempt_steps` must be a number in \[0, inf\) or None, got -1"),
        ({"scaf_search": "random"}, "`scaf_search` must be one of 'sequential', 'parallel', got 'random'"),
        ({"scaf_slot": 0}, "`scaf_slot` must be one of 'random', 'first', got 0"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ScafGRPOConfig(**settings("policy", tmp_path, **values))


def test_a_missing_column_is_named(policy_path, tmp_path):
    with pytest.raises(ValueError, match=r"\['scaf_grpo'\] need the dataset column 'hints', but the columns are"):
        make(ScafGRPOTrainer, policy_path, tmp_path, data=data().remove_columns("hints"))


def test_tools_are_refused(policy_path, tmp_path):
    def tool(x: int) -> int:
        """
        Add one.

        Args:
            x: number.
        """
        return x + 1

    args = ScafGRPOConfig(**settings("policy", tmp_path))
    with pytest.raises(ValueError, match=r"\['scaf_grpo'\] put rows of their own into groups, which `tools`"):
        ScafGRPOTrainer(policy_path, [rare], args, train_dataset=data(), tools=[tool])
