"""Lite PPO: its advantages against the formula, alone and in a real run."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import LitePpoGRPOConfig, LitePpoGRPOTrainer
from papertrl.losses.policy.lite_ppo import reward_mean

from ..harness.rollouts import distributions, gradients, metric, run, sampled
from ..harness.table import settings

reward = st.sampled_from([0.0, 1.0, -2.5, math.nan])


@given(
    st.lists(st.tuples(st.sampled_from([0, 2, 7]), reward), min_size=1, max_size=12),
    st.sampled_from(["group", "batch"]),
)
def test_reward_mean(drawn, scope):
    found = reward_mean(torch.tensor([r for _, r in drawn]), torch.tensor([g for g, _ in drawn]), scope)
    for value, (group, _) in zip(found.tolist(), drawn, strict=True):
        known = [r for g, r in drawn if (scope == "batch" or g == group) and not math.isnan(r)]
        assert math.isnan(value) if not known else value == pytest.approx(statistics.fmean(known), abs=1e-6)


def uneven(completions, prompts, **kwargs):
    """Rewards whose level and spread differ between prompts."""
    return [
        10.0 * (hash_of(p) % 3) + (1.0 + hash_of(p) % 2) * len(c) for p, c in zip(prompts, completions, strict=True)
    ]


def hash_of(prompt):
    return sum(map(ord, prompt))


@pytest.mark.parametrize("scope", ["group", "batch"])
def test_advantages_of_a_run(scope, policy_path, tmp_path):
    options = {
        "num_generations": 4,
        "lite_ppo_reward_mean_scope": scope,
        "max_steps": 2,
        "per_device_train_batch_size": 6,
    }
    trainer = run(LitePpoGRPOTrainer, policy_path, tmp_path, uneven, **options)
    largest = []
    for scored, batch, _, _ in trainer.generations:
        rewards, ids = scored.rewards[:, 0].tolist(), scored.group_ids.tolist()
        # Over the raw rewards, so that the spread between prompts counts
        std = statistics.stdev(rewards)
        expected = []
        for r, g in zip(rewards, ids, strict=True):
            pool = rewards if scope == "batch" else [x for x, i in zip(rewards, ids, strict=True) if i == g]
            expected.append((r - statistics.fmean(pool)) / (std + 1e-4))
        assert scored.advantages.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(batch["advantages"], scored.advantages)
        largest.append(max(map(abs, expected)))
    assert metric(trainer, "lite_ppo/max_abs_advantage") == pytest.approx(largest, rel=1e-4)
    stds = [statistics.stdev(scored.rewards[:, 0].tolist()) for scored, _, _, _ in trainer.generations]
    assert metric(trainer, "lite_ppo/batch_std") == pytest.approx(stds, rel=1e-5)


def test_loss_is_the_mean_over_all_tokens(policy_path, tmp_path):
    options = {"num_generations": 4, "max_steps": 1, "temperature": 0.9}
    trainer = run(LitePpoGRPOTrainer, policy_path, tmp_path, uneven, **options)
    scored, batch, model, _ = trainer.generations[0]
    logps = sampled(distributions(model, batch, 0.9), batch)
    mask = batch["completion_mask"]
    expected = gradients(-(logps * scored.advantages.unsqueeze(1) * mask).sum() / mask.sum(), model)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 2
    batches = [inputs for inputs, _, _ in trainer.micro_batches]
    total = sum(trainer._compute_loss(trainer.model, inputs) for inputs in batches)
    for name, gradient in gradients(total, trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


def test_a_near_unanimous_group_gets_no_huge_advantage(policy_path, tmp_path):
    """One deviating answer of eight: GRPO gives √7 in size whatever the rest of the batch, Lite PPO does not."""

    def one_deviates(completions, prompts, **kwargs):
        seen, rewards = {}, []
        for p in prompts:
            seen[p] = seen.get(p, 0) + 1
            lone = hash_of(p) == min(map(hash_of, prompts))
            rewards.append(float(seen[p] == 1) if lone else float(seen[p] % 2))
        return rewards

    options = {"num_generations": 8, "max_steps": 1, "per_device_train_batch_size": 16}
    lite = run(LitePpoGRPOTrainer, policy_path, tmp_path / "a", one_deviates, **options)
    grpo = run(LitePpoGRPOTrainer, policy_path, tmp_path / "b", one_deviates, scale_rewards="group", **options)
    assert grpo.generations[0][0].advantages.max().item() == pytest.approx(7 / math.sqrt(8), rel=1e-3)
    assert lite.generations[0][0].advantages.max().item() < 2.0
    assert metric(grpo, "lite_ppo/batch_std") == []


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_equal_or_missing_rewards_give_a_zero_loss(value, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [None if math.isnan(value) else value] * len(completions)

    trainer = run(LitePpoGRPOTrainer, policy_path, tmp_path, constant, num_generations=4, max_steps=1)
    assert metric(trainer, "loss") == [0.0] and trainer.generations[0][0].advantages.tolist() == [0.0] * 8


def test_defaults_are_those_of_the_paper(tmp_path):
    args = LitePpoGRPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    assert (args.scale_rewards, args.loss_type, args.beta, args.epsilon) == ("batch", "dapo", 0.0, 0.2)
    assert (args.num_generations, args.temperature, args.top_p) == (8, 0.99, 0.99)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lite_ppo_reward_mean_scope": "row"},
            "`lite_ppo_reward_mean_scope` must be one of 'group', 'batch', got 'row'",
        ),
        ({"temperature": 0.0}, r"`temperature` must be a number in \(0, inf\), got 0.0"),
        ({"top_p": 0.0}, r"`top_p` must be a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.2}, r"`top_p` must be a number in \(0, 1\], got 1.2"),
        ({"top_k": -1}, r"`top_k` must be a number in \[0, inf\), got -1"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got 'normalize_then_sum'",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LitePpoGRPOConfig(**settings("policy", tmp_path, **values))
