"""OBLR-PO: its formulas against plain loops, and baseline and learning rate of real runs computed by hand."""

import math
import re

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from papertrl import OblrPoGRPOConfig, OblrPoGRPOTrainer, compose
from papertrl.losses.policy.oblr_po import gradient_noise, logit_energy, optimal_baseline, snr_multiplier

from ..harness.rollouts import distributions, gradients, make, metric, run, sampled
from ..harness.table import build, digit_parity, history, settings, weights

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))


def energy_by_hand(p, token):
    """|onehot - p|², one entry at a time."""
    return sum(((1.0 if v == token else 0.0) - x) ** 2 for v, x in enumerate(p))


def baseline_by_hand(rewards, weights, group_ids, k, leave_one_out):
    """The weighted mean that the card gives row k, by its definition."""
    others = [
        j
        for j in range(len(rewards))
        if group_ids[j] == group_ids[k] and not math.isnan(rewards[j]) and not (leave_one_out and j == k)
    ]
    if not others:
        return 0.0
    if sum(weights[j] for j in others) == 0:
        return sum(rewards[j] for j in others) / len(others)
    return sum(weights[j] * rewards[j] for j in others) / sum(weights[j] for j in others)


@given(shapes)
def test_energy_is_the_squared_score_at_the_logits(shape):
    rows, time, seed = shape
    g = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(rows, time, 5, generator=g, dtype=torch.float64)).requires_grad_()
    p = torch.log_softmax(logits, -1).exp()
    tokens = torch.randint(5, (rows, time), generator=g)
    mask = (torch.rand(rows, time, generator=g) < 0.7).long()
    logps = p.gather(2, tokens.unsqueeze(2)).squeeze(2).log()
    # What stands on padding must not matter
    found = logit_energy(torch.where(mask == 1, logps, -0.3), p.square().sum(-1).where(mask == 1, 9.0), mask)
    assert not found.requires_grad
    (score,) = torch.autograd.grad(logps.sum(), logits)
    for i in range(rows):
        kept = [t for t in range(time) if mask[i, t]]
        by_hand = sum(energy_by_hand(p[i, t].tolist(), tokens[i, t].item()) for t in kept)
        assert found[i].item() == pytest.approx(by_hand, abs=1e-12)
        assert found[i].item() == pytest.approx(score[i, kept].square().sum().item(), abs=1e-12)


def test_energy_of_a_certain_token_is_zero_not_negative():
    logps = torch.tensor([[0.0, -1e-7, -80.0]])
    found = logit_energy(logps, torch.tensor([[1.0 - 1e-7, 1.0 - 3e-7, 1.0]]), torch.tensor([[1, 1, 0]]))
    assert 0 <= found.item() < 1e-6


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 3, 5]),
            st.sampled_from([0.0, 0.0, 1e-9, 0.5, 1.0, 40.0]),
            st.sampled_from([-1.0, 0.0, 0.1, 1.0, math.nan]),
        ),
        min_size=1,
        max_size=12,
    ),
    st.booleans(),
)
def test_baseline_is_the_weighted_mean(drawn, leave_one_out):
    ids, weights, rewards = map(list, zip(*drawn, strict=True))
    tensors = torch.tensor(rewards), torch.tensor(weights), torch.tensor(ids)
    found = optimal_baseline(*tensors, leave_one_out)
    assert found.isfinite().all()
    for k in range(len(drawn)):
        expected = baseline_by_hand(rewards, weights, ids, k, leave_one_out)
        assert found[k].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.lists(st.floats(0, 1e6, width=32), min_size=2, max_size=8), st.floats(-3, 3, width=32), st.booleans())
def test_equal_rewards_leave_no_advantage_at_all(weights, reward, leave_one_out):
    rewards = torch.full((len(weights),), reward)
    ids = torch.zeros(len(weights), dtype=torch.long)
    assert torch.equal(optimal_baseline(rewards, torch.tensor(weights), ids, leave_one_out), rewards)


def bandit():
    """Three answers of a softmax policy: probabilities, scores ∇ log π, rewards."""
    p = torch.softmax(torch.tensor([1.0, 0.2, -0.5], dtype=torch.float64), 0)
    return p, torch.eye(3, dtype=torch.float64) - p, torch.tensor([1.0, 0.0, 0.6], dtype=torch.float64)


def test_leaving_one_out_keeps_the_gradient_unbiased():
    p, scores, rewards = bandit()
    exact = (p * rewards) @ scores
    ids = torch.zeros(3, dtype=torch.long)
    for leave_one_out in (True, False):
        mean = torch.zeros(3, dtype=torch.float64)
        for draw in torch.cartesian_prod(*[torch.arange(3)] * 3):
            r, s = rewards[draw], scores[draw]
            b = optimal_baseline(r, s.square().sum(1), ids, leave_one_out)
            mean += p[draw].prod() * ((r - b) @ s) / 3
        assert torch.allclose(mean, exact, atol=1e-12) == leave_one_out


def test_no_constant_baseline_has_less_variance():
    p, scores, rewards = bandit()
    weights = scores.square().sum(1)
    # Each answer as often as its probability says: the group is then the population
    best = optimal_baseline(rewards, p * weights, torch.zeros(3, dtype=torch.long), leave_one_out=False)[0].item()

    def variance(b):
        return (p * weights * (rewards - b).square()).sum().item()

    assert variance(best) < min(variance(best - 0.01), variance(best + 0.01), variance((p @ rewards).item()))


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_noise_is_the_sample_variance_of_the_update(ranks, accumulated, size, seed):
    if ranks * accumulated == 1:
        return
    g = torch.Generator().manual_seed(seed)
    parts = torch.randn(ranks * accumulated, size, generator=g, dtype=torch.float64).tolist()
    n = len(parts)
    update = [sum(part[d] for part in parts) / ranks for d in range(size)]
    mean = [sum(part[d] for part in parts) / n for d in range(size)]
    scatter = sum(sum((part[d] - mean[d]) ** 2 for d in range(size)) for part in parts) / (n - 1)
    # The update is the sum of n independent parts, over the ranks
    expected = n * scatter / ranks**2
    square = torch.tensor(sum(x * x for x in update), dtype=torch.float64)
    squares = torch.tensor(sum(x * x for part in parts for x in part), dtype=torch.float64)
    assert gradient_noise(square, squares, n, ranks).item() == pytest.approx(expected, abs=1e-12)


def test_noise_of_equal_parts_is_zero_not_negative():
    part = torch.tensor(0.1)
    assert gradient_noise(9 * part, 3 * part * (1 - 1e-7), 3).item() == 0


@given(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1))
def test_multiplier(square, noise, minimum):
    found = snr_multiplier(*torch.tensor([square, noise], dtype=torch.float64), minimum).item()
    if noise == 0:
        # Whether there is a signal or not
        assert found == 1
    else:
        snr = max(square - noise, 0) / noise
        assert found == pytest.approx(max(snr / (1 + snr), minimum), rel=1e-9)


def test_multiplier_maximizes_the_guaranteed_progress():
    signal, noise, smoothness = 2.0, 3.0, 4.0

    def progress(step):
        return step * signal - smoothness * step**2 / 2 * (signal + noise)

    best = snr_multiplier(torch.tensor(signal + noise), torch.tensor(noise), 0.0).item() / smoothness
    assert progress(best) > max(progress(0.99 * best), progress(1.01 * best))


# --- The trainer ------------------------------------------------------------------------------------------------

BATCH = {"temperature": 0.9, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}


def weights_by_hand(model, batch, kind, temperature):
    logps = distributions(model, batch, temperature)
    places = [batch["loss_mask"][i].nonzero().flatten().tolist() for i in range(len(logps))]
    if kind == "logit_energy":
        p, ids = logps.exp(), batch["completion_ids"]
        return [sum(energy_by_hand(p[i, t].tolist(), ids[i, t].item()) for t in row) for i, row in enumerate(places)]
    if kind == "exact":
        taken = sampled(logps, batch)
        squares = []
        for i, row in enumerate(places):
            gradient = torch.autograd.grad(taken[i, row].sum(), list(model.parameters()), retain_graph=True)
            squares.append(sum(g.square().sum().item() for g in gradient))
        return squares
    return [len(row) if kind == "length" else 1 for row in places]


@pytest.mark.parametrize("leave_one_out", [True, False])
@pytest.mark.parametrize("kind", ["logit_energy", "exact", "length", "uniform"])
def test_advantages_of_a_run(kind, leave_one_out, policy_path, tmp_path):
    options = BATCH | {"max_steps": 2, "oblr_weight": kind, "oblr_leave_one_out": leave_one_out, "snr_lr": False}
    trainer = run(OblrPoGRPOTrainer, policy_path, tmp_path, **options)
    shifts = []
    for scored, batch, model, _ in trainer.generations:
        rewards, ids = scored.rewards[:, 0].tolist(), scored.group_ids.tolist()
        weights = weights_by_hand(model, batch, kind, 0.9)
        baselines = [baseline_by_hand(rewards, weights, ids, k, leave_one_out) for k in range(12)]
        for k in range(12):
            assert batch["advantages"][k].item() == pytest.approx(rewards[k] - baselines[k], rel=1e-4, abs=1e-6)
        means = [baseline_by_hand(rewards, [1] * 12, ids, k, False) for k in range(12)]
        shifts.append(sum(abs(b - m) for b, m in zip(baselines, means, strict=True)) / 12)
    assert metric(trainer, "oblr_po/baseline_shift") == pytest.approx(shifts, rel=1e-4, abs=1e-7)
    assert max(shifts) > 0 or (kind == "uniform" and not leave_one_out)


def moments_by_hand(trainer, batches, tracked):
    """|G|² and V of an update, from the gradient of each micro-batch."""
    parts = []
    for batch, model, _ in batches:
        logps = sampled(distributions(model, batch, trainer.args.temperature), batch)
        kept = batch["loss_mask"] * batch["advantages"].unsqueeze(1)
        steps = trainer.args.steps_per_generation / trainer.args.gradient_accumulation_steps
        found = gradients(-(logps * kept).sum() / batch["num_items_in_batch"] * steps, model)
        parts.append(torch.cat([g.flatten() for name, g in found.items() if tracked(name)]))
    parts = torch.stack(parts).double()
    n, update = len(parts), parts.sum(0)
    scatter = sum((part - update / n).square().sum() for part in parts) / (n - 1)
    return update.square().sum().item(), n * scatter.item()


def begins_late(completions, **kwargs):
    """Reward that every micro-batch teaches alike, so that there is signal in the noise."""
    return [float(text[:1] > "M") for text in completions]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"snr_ema": 0.0, "snr_min_multiplier": 0.02},
        {"snr_params": r"layers\.0.*norm"},
        # Clipping comes after the gradients were compared
        {"max_grad_norm": 1e-3},
        # Generation, with backward passes of its own, falls into the middle of an update
        {"oblr_weight": "exact", "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        {"share_prompts": False, "oblr_weight": "uniform"},
    ],
    ids=str,
)
def test_learning_rate_of_a_run(options, policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": ["1+2="] * 16})
    quiet = {
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
    }
    trainer = run(OblrPoGRPOTrainer, policy_path, tmp_path, begins_late, data, **(BATCH | quiet | options))
    args = trainer.args
    tracked = re.compile(args.snr_params or r"layers\.1\.|embed_tokens")
    each = args.gradient_accumulation_steps
    assert len(trainer.micro_batches) == 3 * each
    square = noise = 0.0
    multipliers = []
    for step in range(3):
        batches = trainer.micro_batches[step * each : (step + 1) * each]
        found = moments_by_hand(trainer, batches, tracked.search)
        square = args.snr_ema * square + (1 - args.snr_ema) * found[0]
        noise = args.snr_ema * noise + (1 - args.snr_ema) * found[1]
        signal = max(square - noise, 0.0)
        multipliers.append(max(signal / (signal + noise), args.snr_min_multiplier))
        assert metric(trainer, "oblr_po/gradient_noise")[step] == pytest.approx(found[1], rel=1e-3)
    assert metric(trainer, "oblr_po/lr_multiplier") == pytest.approx(multipliers, rel=1e-3)
    assert args.snr_min_multiplier < max(multipliers) < 0.99

    # The step that was made, where nothing was clipped: the schedule's rate times the multiplier
    if args.max_grad_norm == 0:
        before, after = trainer.micro_batches[0][1], trainer.micro_batches[each][1]
        moved = sum((a - b).square().sum() for a, b in zip(after.parameters(), before.parameters(), strict=True))
        expected = 1e-2 * multipliers[0] * metric(trainer, "grad_norm")[0]
        assert moved.sqrt().item() == pytest.approx(expected, rel=1e-3)
    assert metric(trainer, "learning_rate") == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])


def test_micro_batches_are_alike_while_they_are_compared(policy_path, tmp_path):
    """Packed without the rows of zero advantage, some would be empty, and their gradients no draws of one law."""

    def rare(completions, **kwargs):
        return [float("7" in text) for text in completions]

    trainer = run(OblrPoGRPOTrainer, policy_path, tmp_path, rare, **BATCH)
    assert [len(batch["row_weight"]) for batch, _, _ in trainer.micro_batches] == [4] * 9
    assert (trainer.generations[0][1]["advantages"] == 0).any()
    off = run(OblrPoGRPOTrainer, policy_path, tmp_path, rare, **(BATCH | {"snr_lr": False}))
    assert min(len(batch["row_weight"]) for batch, _, _ in off.micro_batches) < 4


def test_one_micro_batch_tells_nothing_about_noise(policy_path, tmp_path):
    options = BATCH | {"gradient_accumulation_steps": 1, "max_steps": 2}
    trainer = run(OblrPoGRPOTrainer, policy_path, tmp_path, **options)
    assert metric(trainer, "oblr_po/lr_multiplier") == []
    off = run(OblrPoGRPOTrainer, policy_path, tmp_path, **(options | {"snr_lr": False}))
    for a, b in zip(trainer.model.parameters(), off.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reward", [1.0, math.nan])
def test_without_a_learning_signal_nothing_moves(reward, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [None if math.isnan(reward) else reward] * len(completions)

    trainer = run(OblrPoGRPOTrainer, policy_path, tmp_path, constant, **(BATCH | {"max_steps": 2}))
    assert metric(trainer, "loss") == metric(trainer, "grad_norm") == [0.0, 0.0]
    assert metric(trainer, "oblr_po/lr_multiplier") == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"oblr_weight": "norm"}, "`oblr_weight` must be one of 'logit_energy', .*'none', got 'norm'"),
        ({"snr_ema": 1.0}, r"`snr_ema` must be a number in \[0, 1\), got 1.0"),
        ({"snr_ema": math.nan}, r"`snr_ema` must be a number in \[0, 1\), got nan"),
        ({"snr_min_multiplier": -0.1}, r"`snr_min_multiplier` must be a number in \[0, 1\], got -0.1"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got .*oblr_weight='none'",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        OblrPoGRPOConfig(**settings("policy", tmp_path, **values))


def test_a_pattern_without_a_parameter_is_refused(policy_path, tmp_path):
    with pytest.raises(ValueError, match=r"`snr_params` must match the name .* got 'lm_hed'"):
        make(OblrPoGRPOTrainer, policy_path, tmp_path, snr_params="lm_hed")


class Further(compose(OblrPoGRPOTrainer, "dynamic_reward_weighting")):
    """Makes the passes of both methods on each batch, besides, and uses nothing of them."""

    def observe_batch(self, scored, record):
        super().observe_batch(scored, record)
        columns = torch.stack([record.advantages, -record.advantages], dim=1)
        self.found = (*self._gradient_squares(record), *self._gram(record, columns).flatten())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_further_passes_are_not_seen_by_who_observes_gradients(checkpointing, policy_path, tmp_path):
    options = {"oblr_weight": "uniform", "weighting_mode": "none", "gradient_checkpointing": checkpointing}
    seen = {}
    for cls in (compose(OblrPoGRPOTrainer, "dynamic_reward_weighting"), Further):
        args = cls.config_class(**settings("policy", tmp_path / cls.__name__, max_steps=2, beta=0.04, **options))
        trainer = build(cls, "policy", policy_path, args, reward=[begins_late, digit_parity])
        gradients = []
        for parameter in trainer.model.parameters():
            parameter.register_hook(lambda g, gradients=gradients: gradients.append(g.norm().item()))
        trainer.train()
        seen[cls] = weights(trainer), gradients, history(trainer)
    assert all(value.isfinite() and value != 0 for value in trainer.found)
    (plain, gradients, logs), (further, other_gradients, other_logs) = seen.values()
    assert all(torch.equal(weight, further[name]) for name, weight in plain.items())
    assert gradients == other_gradients
    # The noise of micro-batches, the learning rate that follows from it, and every other number
    assert logs == other_logs and {"oblr_po/gradient_noise", "oblr_po/lr_multiplier", "kl"} <= logs[0].keys()
