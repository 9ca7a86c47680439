"""HAPO: its formulas against plain loops, and loss, advantages and sampling of real runs computed by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import HapoGRPOConfig, HapoGRPOTrainer
from papertrl.losses.policy.hapo import (
    advantage_factor,
    entropy_scale,
    next_token_entropy,
    normalized_entropy,
    range_factors,
    token_group_advantages,
    token_mean,
)

from ..harness.rollouts import distributions, gradients, metric, run, sampled
from ..harness.table import settings

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))


def h_by_hand(entropies, reference, quantile, signed=True):
    """h of `entropies` by the card's two steps, measured by the tokens of `reference`."""
    x = sorted(math.log(max(e, 1e-8)) for e in reference)
    pivot = x[round(quantile * (len(x) - 1))]
    s = math.sqrt(max(sum((v - pivot) ** 2 for v in x) / len(x), 1e-8))
    u = [(v - pivot) / s for v in x]
    values = []
    for entropy in entropies:
        value = (math.log(max(entropy, 1e-8)) - pivot) / s
        if value > 0:
            h = value / max(*[v for v in u if v > 0], 1e-8) if max(u) > 0 else 1.0
        else:
            h = value / abs(min(*[v for v in u if v < 0], -1e-8)) if min(u) < 0 else -float(value < 0)
        h = min(max(h, -1.0), 1.0)
        values.append(h if signed else abs(h))
    return values


def advantages_by_hand(rewards, lengths, ids, fallback):
    """Advantage of every row, from the card's statistics over a list with one entry per token."""
    found = []
    for i, group in enumerate(ids):
        if math.isnan(rewards[i]):
            found.append(0.0)
            continue
        rows = [j for j in range(len(ids)) if ids[j] == group and not math.isnan(rewards[j])]
        tokens = [rewards[j] for j in rows for _ in range(lengths[j])]
        mean = sum(tokens) / len(tokens)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in tokens) / len(tokens))
        if fallback is None or max(abs(r - mean) / (deviation + 1e-6) for r in tokens) < fallback:
            found.append((rewards[i] - mean) / (deviation + 1e-6))
            continue
        mean = sum(rewards[j] for j in rows) / len(rows)
        variance = sum((rewards[j] - mean) ** 2 for j in rows) / max(1, len(rows) - 1)
        found.append((rewards[i] - mean) / (math.sqrt(variance) + 1e-6))
    return found


def factor_by_hand(h, ratio, low, high, beta):
    neutral = 1 - low / 2 < ratio < 1 + high / 2
    return 1 + beta * h if (h > 0 and not neutral) or (h <= 0 and neutral) else 1.0


@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=20),
    st.lists(st.floats(0, 6), min_size=1, max_size=5),
    st.floats(0, 1),
    st.booleans(),
)
def test_normalized_entropy(reference, others, quantile, signed):
    scale = entropy_scale(torch.tensor(reference, dtype=torch.float64), quantile)
    x = sorted(math.log(max(e, 1e-8)) for e in reference)
    # Where all entropies of one side are equal up to rounding, the floors differ
    if any(0 < abs(v - x[round(quantile * (len(x) - 1))]) < 2e-4 for v in (x[0], x[-1])):
        return
    found = normalized_entropy(torch.tensor(reference, dtype=torch.float64), *scale, signed)
    assert found.tolist() == pytest.approx(h_by_hand(reference, reference, quantile, signed), abs=1e-9)
    assert found.abs().max() <= 1 and (signed or found.min() >= 0)
    # Of another pass: beyond the extremes it ends
    found = normalized_entropy(torch.tensor(others, dtype=torch.float64), *scale, signed)
    if x[0] < scale[0] < x[-1]:
        assert found.tolist() == pytest.approx(h_by_hand(others, reference, quantile, signed), abs=1e-9)
    assert found.isfinite().all() and found.abs().max() <= 1


def test_extremes_are_one_and_the_pivot_is_zero():
    entropies = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 3.0])
    scale = entropy_scale(entropies, 0.8)
    assert normalized_entropy(entropies, *scale).tolist()[::5] == [-1.0, 1.0]
    assert normalized_entropy(entropies, *scale)[4] == 0


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_constant_entropy_is_neither_high_nor_low(noise):
    entropies = 2.0 + noise * torch.linspace(-1, 1, 9)
    assert normalized_entropy(entropies, *entropy_scale(entropies, 0.8)).abs().max() < 0.02


def test_no_tokens_and_no_gradient():
    scale = entropy_scale(torch.zeros(0), 0.8)
    entropies = torch.rand(2, 3, requires_grad=True)
    found = normalized_entropy(entropies, *scale)
    assert not found.requires_grad and found.isfinite().all()


groups = st.lists(
    st.tuples(st.sampled_from([0, 1, 7]), st.integers(1, 6), st.sampled_from([0.0, 0.0, 0.3, 1.0, -2.0, math.nan])),
    min_size=1,
    max_size=14,
)


@given(groups, st.sampled_from([None, 1.5, 5.0]))
def test_token_group_average(drawn, fallback):
    ids, lengths, rewards = map(list, zip(*drawn, strict=True))
    r, n, g = torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths), torch.tensor(ids)
    expected = advantages_by_hand(rewards, lengths, ids, fallback)
    # At the threshold itself, rounding decides
    if fallback is not None and any(
        abs(abs(a) - fallback) < 1e-6 for a in advantages_by_hand(rewards, lengths, ids, None)
    ):
        return
    advantages, fell = token_group_advantages(r, r - token_mean(r, n, g), n, g, fallback)
    assert advantages.nan_to_num().tolist() == pytest.approx(expected, abs=1e-6)
    for group in set(ids):
        rows = (g == group) & ~r.isnan()
        if rows.any() and not fell[rows].any():
            assert (advantages[rows] * n[rows]).sum().abs() < 1e-9
    assert not (fell.any() and fallback is None)


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=8), st.floats(-3, 3, width=32))
def test_equal_rewards_leave_no_advantage_at_all(lengths, reward):
    r, n, g = torch.full((len(lengths),), reward), torch.tensor(lengths), torch.zeros(len(lengths), dtype=torch.long)
    advantages, _ = token_group_advantages(r, r - token_mean(r, n, g), n, g, 5.0)
    assert torch.equal(advantages, torch.zeros_like(r))


def test_one_short_success_among_long_failures_falls_back():
    rewards, lengths, ids = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1, 40, 40, 40]), torch.zeros(4).long()
    centered = rewards - token_mean(rewards, lengths, ids)
    advantages, fell = token_group_advantages(rewards, centered, lengths, ids, 5.0)
    assert fell.all() and advantages.tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-4)
    without, fell = token_group_advantages(rewards, centered, lengths, ids, None)
    assert not fell.any() and without[0] > 5


@given(shapes, st.floats(0, 1), st.floats(0, 1))
def test_ranges_and_redistribution(shape, alpha, beta):
    rows, time, seed = shape
    g = torch.Generator().manual_seed(seed)
    h = 2 * torch.rand(rows, time, generator=g, dtype=torch.float64) - 1
    h[torch.rand(rows, time, generator=g) < 0.2] = 0.0
    ratio = torch.exp(0.3 * torch.randn(rows, time, generator=g, dtype=torch.float64)).requires_grad_()
    low, high = range_factors(h, alpha)
    found = advantage_factor(h, ratio, 0.2 * low, 0.28 * high, beta)
    assert not found.requires_grad
    for i in range(rows):
        for t in range(time):
            value = h[i, t].item()
            lower, upper = (1 - alpha * value if value <= 0 else 1.0), (1 + alpha * value if value > 0 else 1.0)
            assert (low[i, t].item(), high[i, t].item()) == pytest.approx((lower, upper))
            expected = factor_by_hand(value, ratio[i, t].item(), 0.2 * lower, 0.28 * upper, beta)
            assert found[i, t].item() == pytest.approx(expected)


def test_entropy_of_logits():
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [5.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(next_token_entropy(logits, 0.5), torch.tensor([math.log(2), 0.0]))


# --- The trainer ------------------------------------------------------------------------------------------------

FIRING = {"learning_rate": 2e-2, "num_iterations": 2, "temperature": 0.9, "per_device_train_batch_size": 8}


def entropies_of(model, batch, temperature):
    logps = distributions(model, batch, temperature)
    return -(logps.exp() * logps).sum(-1)


def tokens_of(batch):
    return [tuple(place) for place in batch["loss_mask"].nonzero().tolist()]


def reference_of(generation, temperature):
    """Entropies of all tokens of a generation batch, under the model that sampled them."""
    _, whole, old_model, _ = generation
    entropies = entropies_of(old_model, whole, temperature)
    return [entropies[i, t].item() for i, t in tokens_of(whole)]


def loss_by_hand(trainer, micro_batch, model, generation):
    """Loss of a micro-batch under `model` from the card, and what was changed at each token."""
    args = trainer.args
    reference = reference_of(generation, args.temperature)
    log_old = sampled(distributions(generation[2], micro_batch, args.temperature), micro_batch)
    logps = sampled(distributions(model, micro_batch, args.temperature), micro_batch)
    entropies = entropies_of(model, micro_batch, args.temperature)
    places = tokens_of(micro_batch)
    signed = args.hapo_sign == "signed"
    hs = h_by_hand([entropies[p].item() for p in places], reference, args.hapo_entropy_quantile, signed)
    loss, factors, clipped = 0.0 * logps.sum(), [], 0
    for (i, t), h in zip(places, hs, strict=True):
        ratio = torch.exp(logps[i, t] - log_old[i, t].detach())
        low = args.epsilon * (1 - args.hapo_clip_alpha * h) if h <= 0 else args.epsilon
        high = args.epsilon_high * (1 + args.hapo_clip_alpha * h) if h > 0 else args.epsilon_high
        factors.append(factor_by_hand(h, ratio.item(), low, high, args.hapo_adv_beta))
        advantage = micro_batch["advantages"][i].item() * factors[-1]
        value = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - low, 1 + high))
        if advantage < 0 and args.delta is not None:
            value = torch.min(value, torch.as_tensor(-advantage * args.delta))
        clipped += not 1 - low < ratio.item() < 1 + high
        loss = loss + value
    return loss / micro_batch["num_items_in_batch"], factors, clipped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hapo_clip_alpha": 0.0, "hapo_adv_beta": 0.6},
        {"hapo_adv_beta": 0.0, "epsilon": 0.02, "epsilon_high": 0.02, "hapo_entropy_quantile": 0.3},
        {"hapo_sign": "released", "delta": 1.6},
    ],
    ids=str,
)
def test_loss_of_a_run_is_the_one_computed_by_hand(options, policy_path, tmp_path):
    trainer = run(HapoGRPOTrainer, policy_path, tmp_path, **(FIRING | options))
    assert len(trainer.generations) == 2 and len(trainer.micro_batches) == 6
    changed, tokens, clipped = [], [], 0
    for number, (batch, model, loss) in enumerate(trainer.micro_batches):
        # Two micro-batches a step, two steps a generation batch
        expected, factors, outside = loss_by_hand(trainer, batch, model, trainer.generations[number // 4])
        assert loss.item() == pytest.approx(expected.item(), rel=2e-4, abs=2e-6)
        changed.append(sum(abs(f - 1) for f in factors))
        tokens.append(len(factors))
        clipped += outside
    assert clipped > 0
    if trainer.args.hapo_adv_beta > 0:
        means = [c / n for c, n in zip(changed, tokens, strict=True)]
        steps = [(a + b) / 2 for a, b in zip(means[::2], means[1::2], strict=True)]
        assert metric(trainer, "hapo/advantage_change") == pytest.approx(steps, rel=1e-3)
        assert max(steps) > 0


def test_gradient_is_that_of_the_loss_by_hand(policy_path, tmp_path):
    trainer = run(HapoGRPOTrainer, policy_path, tmp_path, **(FIRING | {"max_steps": 2}))
    trainer.current_gradient_accumulation_steps = 2
    for batch, model, _ in trainer.micro_batches[2:]:
        loss, _, _ = loss_by_hand(trainer, batch, model, trainer.generations[0])
        expected = gradients(loss, model)
        trainer.model.load_state_dict(model.state_dict())
        found = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=2e-6)


def test_advantages_of_a_run(policy_path, tmp_path):
    trainer = run(HapoGRPOTrainer, policy_path, tmp_path, **(FIRING | {"hapo_fallback": 1.6}))
    for scored, batch, _, _ in trainer.generations:
        rewards, lengths = scored.rewards[:, 0].tolist(), batch["completion_mask"].sum(1).tolist()
        expected = advantages_by_hand(rewards, lengths, scored.group_ids.tolist(), 1.6)
        assert batch["advantages"].tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_does_not_enter(policy_path, tmp_path):
    trainer = run(HapoGRPOTrainer, policy_path, tmp_path, **(FIRING | {"max_steps": 1}))
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer.micro_batches[0][0]
    padding = batch["completion_mask"] == 0
    assert padding.any()
    changed = dict(batch)
    changed["completion_ids"] = torch.where(padding, 9, batch["completion_ids"])
    for name in ("statistics/hapo/entropies", "old_per_token_logps"):
        changed[name] = torch.where(padding, 5.0, batch[name])
    loss, other = (trainer._compute_loss(trainer.model, b) for b in (batch, changed))
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reward", [1.0, math.nan])
def test_without_a_learning_signal_nothing_moves(reward, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [None if math.isnan(reward) else reward] * len(completions)

    trainer = run(HapoGRPOTrainer, policy_path, tmp_path, constant, **(FIRING | {"max_steps": 2}))
    assert metric(trainer, "loss") == metric(trainer, "grad_norm") == [0.0, 0.0]


def test_half_precision_run(policy_path, tmp_path):
    trainer = run(HapoGRPOTrainer, policy_path, tmp_path, **(FIRING | {"bf16": True}))
    assert all(math.isfinite(loss) for loss in metric(trainer, "loss"))
    assert max(metric(trainer, "hapo/advantage_change")) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hapo_entropy_quantile": 1.1}, r"`hapo_entropy_quantile` must be a number in \[0, 1\], got 1.1"),
        ({"hapo_temperature_tau": 1.0}, r"`hapo_temperature_tau` must be a number in \[0, 1\), got 1.0"),
        ({"hapo_fallback": 0.0}, r"`hapo_fallback` must be a number in \(0, inf\) or None, got 0.0"),
        ({"hapo_adv_beta": 1.5}, r"`hapo_adv_beta` must be a number in \[0, 1\], got 1.5"),
        ({"hapo_clip_alpha": math.nan}, r"`hapo_clip_alpha` must be a number in \[0, 1\], got nan"),
        ({"hapo_sign": "none"}, "`hapo_sign` must be one of 'signed', 'released', got 'none'"),
        ({"delta": 1.0}, r"`delta` must be a number in \(1, inf\) or None"),
        ({"use_vllm": True}, "`use_vllm` must be False, got True.*hapo_temperature_tau=0"),
        ({"fast_rollouts": False}, "`fast_rollouts` must be True, got False.*hapo_temperature_tau=0"),
        ({"loss_type": "cispo"}, "`loss_type` must be one of .*'dapo'.*got 'cispo'.*hapo_clip_alpha=0"),
        (
            {"importance_sampling_level": "sequence"},
            "`importance_sampling_level` must be 'token', got 'sequence'.*hapo_adv_beta=0",
        ),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize'.*hapo_token_group_average=False",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HapoGRPOConfig(**settings("policy", tmp_path, **values))
