"""Dynamic reward weighting: volumes by inclusion and exclusion, and weights of a real run from plain gradients."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import DynamicRewardWeightingGRPOConfig, DynamicRewardWeightingGRPOTrainer, PolicyTrainer
from papertrl.losses.policy.dynamic_reward_weighting import (
    HypervolumeGuide,
    clip_factors,
    exponentiated_gradient,
    hypervolume,
    influence,
    meta_reward,
    pareto_front,
)

from ..harness.rollouts import checksum, distributions, make, metric, run, sampled
from ..harness.table import dataset, settings, weights

# Coordinates that often tie, on both sides of the reference
coordinate = st.sampled_from([-0.5, 0.0, 0.1, 0.3, 0.3, 0.7, 1.0]) | st.floats(-1, 1, allow_subnormal=False)


def clouds(most=5):
    return st.integers(1, 4).flatmap(
        lambda d: st.lists(st.lists(coordinate, min_size=d, max_size=d), min_size=1, max_size=most)
    )


# --- Formulas ---------------------------------------------------------------------------------------------------


def volume_by_inclusion(points, reference):
    """Volume of a union of boxes as the alternating sum of their intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            corner = [min(p[j] for p in subset) for j in range(len(reference))]
            box = math.prod(max(0.0, c - r) for c, r in zip(corner, reference, strict=True))
            total += (-1) ** (size + 1) * box
    return total


@given(clouds())
def test_hypervolume_is_that_of_the_union(points):
    reference = [0.05 * j for j in range(len(points[0]))]
    expected = volume_by_inclusion(points, reference)
    assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)
    assert hypervolume([*points[::-1], points[0]], reference) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_hypervolume_against_random_points(dimensions):
    rng = random.Random(dimensions)
    points = [[rng.random() for _ in range(dimensions)] for _ in range(8)]
    draws = [[rng.random() for _ in range(dimensions)] for _ in range(20_000)]
    inside = sum(any(all(x <= c for x, c in zip(draw, p, strict=True)) for p in points) for draw in draws)
    assert hypervolume(points, [0.0] * dimensions) == pytest.approx(inside / len(draws), abs=0.015)


def test_hypervolume_of_nothing():
    assert hypervolume([], [0.0, 0.0]) == 0.0 and hypervolume([[-1.0, 2.0]], [0.0, 0.0]) == 0.0


@given(clouds(most=6))
def test_pareto_front(points):
    front = pareto_front(points)
    assert len(front) == len({tuple(p) for p in front})
    for p in points:
        beaten = any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points)
        assert (p in front) == (not beaten)


@given(clouds(most=6))
def test_the_guide_gives_what_a_point_adds(points):
    guide, seen = HypervolumeGuide(), []
    assert guide.observe(points[0]) == 0.0 and guide.volume() == 0.0
    for point in points[1:]:
        gain = volume_by_inclusion([*seen, point], points[0]) - volume_by_inclusion(seen, points[0])
        seen.append(point)
        contribution = guide.observe(point)
        assert contribution >= 0 and contribution == pytest.approx(gain, abs=1e-12)
        assert guide.volume() == pytest.approx(volume_by_inclusion(seen, points[0]), abs=1e-12)


@pytest.mark.parametrize(
    ("reference", "front", "point"),
    [
        ([0.0, 0.0], [0.5, 0.5], [0.8, -0.3]),  # -0.09, and an error, in the released code
        ([0.5], [0.4], [0.45]),  # 0.05 in the released code
        ([0.1, 0.1, 0.1], [0.3, 0.3, 0.7], [0.3, 0.3, 0.7]),
    ],
)
def test_a_point_that_the_front_is_as_good_as_adds_exactly_nothing(reference, front, point):
    guide = HypervolumeGuide()
    for seen in (reference, front):
        guide.observe(seen)
    assert guide.observe(point) == 0.0 and guide.observe(reference) == 0.0


def test_meta_reward():
    assert meta_reward(0.0) == 0.5 and meta_reward(100.0) == 2.0
    assert meta_reward(0.3, 0.7, 0.2) == pytest.approx(0.7 + 0.2 * math.tanh(0.3))


@given(st.integers(1, 4), st.integers(1, 9), st.floats(0, 2), st.integers(0, 2**31))
def test_influence_of_clipped_gradients(sources, size, max_norm, seed):
    g = torch.Generator().manual_seed(seed)
    gradients = torch.randn(sources, size, generator=g, dtype=torch.float64)
    gram = gradients @ gradients.T
    factors = clip_factors(gram, max_norm)
    found = influence(gram * factors.unsqueeze(0) * factors.unsqueeze(1))
    clipped = []
    for row in gradients:
        parameter = torch.nn.Parameter(torch.zeros(size, dtype=torch.float64))
        parameter.grad = row.clone()
        if max_norm > 0:
            torch.nn.utils.clip_grad_norm_([parameter], max_norm)
        clipped.append(parameter.grad.tolist())
    for k in range(sources):
        expected = sum(sum(a * b for a, b in zip(clipped[k], other, strict=True)) for other in clipped)
        assert found[k].item() == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(-3, 3)), min_size=1, max_size=4), st.floats(0, 2))
def test_exponentiated_gradient(pairs, rate):
    total = sum(w for w, _ in pairs)
    w, gains = [x / total for x, _ in pairs], [x for _, x in pairs]
    found = exponentiated_gradient(
        torch.tensor(w, dtype=torch.float64), torch.tensor(gains, dtype=torch.float64), rate
    )
    grown = [a * math.exp(rate * b) for a, b in zip(w, gains, strict=True)]
    assert found.tolist() == pytest.approx([x / sum(grown) for x in grown])


def test_a_weight_can_come_back_from_nothing_and_extremes_are_finite():
    gone = exponentiated_gradient(torch.tensor([0.5, 0.5]), torch.tensor([1e9, 0.0]), 1.0)
    assert gone.tolist() == [1.0, 0.0]
    assert exponentiated_gradient(gone, torch.tensor([0.0, 40.0]), 1.0)[1] > 0.99


# --- The trainer: by gradients ----------------------------------------------------------------------------------


def brevity(completions, **kwargs):
    return [float(len(text) < 4) for text in completions]


def digits(completions, **kwargs):
    """Share of digits; unknown for about a third of all texts."""
    return [
        None if sum(map(ord, text)) % 3 == 0 else sum(c.isdigit() for c in text) / max(1, len(text))
        for text in completions
    ]


NAMES = ("checksum", "brevity", "digits")
OPTIONS = {
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "weighting_regularization": 0.05,
    "reward_weights": [1.0, 2.0, 1.0],
    "max_steps": 3,
}


def advantages_by_hand(rewards, group_size=4, eps=1e-4):
    """GRPO's advantages of one reward per row; NaN rewards are left out and get 0."""
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        known = [r for r in group if not math.isnan(r)]
        mean = sum(known) / len(known) if known else 0.0
        std = math.sqrt(sum((r - mean) ** 2 for r in known) / (len(known) - 1)) if len(known) > 1 else 0.0
        result += [0.0 if math.isnan(r) else (r - mean) / (std + eps) for r in group]
    return result


def gradient_by_hand(trainer, generation, advantages, reference, layers):
    """Flat gradient of the policy loss with these advantages, by one plain pass over the generation batch."""
    _, batch, model, _ = generation
    logps = sampled(distributions(model, batch), batch)
    ref = sampled(distributions(reference, batch), batch).detach()
    mask = batch["completion_mask"]
    loss = 0.0
    for i, t in mask.nonzero().tolist():
        value = -advantages[i] * torch.exp(logps[i, t] - logps[i, t].detach())
        if trainer.args.beta:
            d = ref[i, t] - logps[i, t]
            value = value + trainer.args.beta * (torch.exp(d) - d - 1)
        share = mask.sum() if trainer.args.loss_type == "dapo" else len(mask) * mask[i].sum()
        loss = loss + value / share
    parameters = [p for i in layers for p in model.model.layers[i].parameters()]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double()


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, [1]),
        ({"loss_type": "grpo", "weighting_layers": [0, 1], "max_grad_norm": 0.3}, [0, 1]),
        ({"beta": 0.5, "weighting_accumulation": 2, "max_steps": 5}, [1]),
        # Two optimizer steps a generation batch, then a batch anew
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 1, "max_steps": 3}, [1]),
    ],
    ids=str,
)
def test_weights_and_advantages_of_a_run_are_those_computed_by_hand(options, layers, policy_path, tmp_path):
    trainer = run(
        DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, [checksum, brevity, digits], **(OPTIONS | options)
    )
    args, per_generation = trainer.args, trainer.args.steps_per_generation // trainer.args.gradient_accumulation_steps
    reference = trainer.generations[0][2]
    w, window, changes = [0.25, 0.5, 0.25], [], []
    for number, generation in enumerate(trainer.generations):
        scored = generation[0]
        step = number * per_generation
        gradients = []
        for k in range(3):
            advantages = advantages_by_hand(scored.rewards[:, k].tolist())
            g = gradient_by_hand(trainer, generation, advantages, reference, layers)
            found = metric(trainer, f"dynamic_reward_weighting/{NAMES[k]}/grad_norm")[number]
            assert found == pytest.approx(g.norm().item(), rel=1e-4)
            gradients.append(g * min(1.0, args.max_grad_norm / (g.norm().item() + 1e-6)))
        gains = [sum(torch.dot(a, b).item() for b in gradients) for a in gradients]
        cosine = metric(trainer, "dynamic_reward_weighting/cosine/checksum/brevity")[number]
        pair = gradients[0] / gradients[0].norm(), gradients[1] / gradients[1].norm()
        assert cosine == pytest.approx(torch.dot(*pair).item(), abs=1e-3)
        window.append(gains)
        if len(window) == args.weighting_accumulation:
            rate = args.learning_rate * (1 - step / args.max_steps) / args.weighting_regularization
            mean = [sum(column) / len(window) for column in zip(*window, strict=True)]
            grown = [a * math.exp(rate * b) for a, b in zip(w, mean, strict=True)]
            before, w, window = w, [x / sum(grown) for x in grown], []
            changes.append(max(abs(a - b) for a, b in zip(w, before, strict=True)))
        for name, weight in zip(NAMES, w, strict=True):
            logged = metric(trainer, f"dynamic_reward_weighting/{name}/weight")[number]
            assert logged == pytest.approx(weight, abs=1e-5)
        mixed = [
            sum(a * (0.0 if math.isnan(r) else r) for a, r in zip(w, row, strict=True))
            for row in scored.rewards.tolist()
        ]
        assert scored.advantages.tolist() == pytest.approx(advantages_by_hand(mixed), abs=1e-4)
    assert changes and min(changes) > 1e-4


def test_with_one_reward_it_is_grpo(policy_path, tmp_path):
    options = {name: value for name, value in OPTIONS.items() if not name.startswith(("weighting", "reward_weights"))}
    ours = run(DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, **options)
    theirs = run(PolicyTrainer, policy_path, tmp_path, **options)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], value, rtol=0, atol=0)
    assert min(metric(ours, "dynamic_reward_weighting/influence")) > 0
    assert metric(ours, "entropy") == metric(theirs, "entropy")


def test_opposite_rewards_have_no_influence(policy_path, tmp_path):
    def contrary(completions, **kwargs):
        return [1 - r for r in checksum(completions)]

    options = OPTIONS | {"reward_weights": [1.0, 3.0]}
    trainer = run(DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, [checksum, contrary], **options)
    for name, weight in (("checksum", 0.25), ("contrary", 0.75)):
        assert metric(trainer, f"dynamic_reward_weighting/{name}/weight") == pytest.approx([weight] * 3, abs=1e-5)
    assert metric(trainer, "dynamic_reward_weighting/cosine/checksum/contrary") == pytest.approx([-1.0] * 3, abs=1e-4)


@pytest.mark.parametrize("value", [1.0, None])
def test_a_reward_without_variance_has_no_gradient(value, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [value] * len(completions)

    options = OPTIONS | {"reward_weights": [1.0, 1.0]}
    trainer = run(DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, [constant, checksum], **options)
    assert metric(trainer, "dynamic_reward_weighting/constant/grad_norm") == [0.0] * 3
    assert metric(trainer, "dynamic_reward_weighting/constant/weight")[-1] < 0.5
    assert all(math.isfinite(loss) for loss in metric(trainer, "loss"))


def test_half_precision_run(policy_path, tmp_path):
    trainer = run(
        DynamicRewardWeightingGRPOTrainer,
        policy_path,
        tmp_path,
        [checksum, brevity, digits],
        **(OPTIONS | {"bf16": True, "gradient_checkpointing": True, "max_steps": 2}),
    )
    assert all(math.isfinite(v) and v > 0 for v in metric(trainer, "dynamic_reward_weighting/influence"))


# --- The trainer: by hypervolume --------------------------------------------------------------------------------

VOLUME = {
    "weighting_mode": "hypervolume",
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "max_steps": 8,
    "weighting_hypervolume_ema": 0.3,
    "seed": 1,
}


def meta_by_hand(vectors):
    """The factor in force after each of the observed vectors, from the card."""
    reference, front, factors = None, [], []
    for v in vectors:
        if reference is None:
            reference = v
            factors.append(1.0)
            continue
        gain = volume_by_inclusion([*front, v], reference) - volume_by_inclusion(front, reference)
        if gain > 1e-12:
            front.append(v)
        factors.append(0.5 + 1.5 * math.tanh(max(0.0, gain)))
    return factors


def assert_scaled(trainer, factors):
    for (scored, _, _, _), m in zip(trainer.generations, factors, strict=True):
        mixed = [sum(row) / len(row) for row in scored.rewards.tolist()]
        plain = advantages_by_hand(mixed)
        assert scored.advantages.tolist() == pytest.approx([m * a for a in plain], abs=1e-4)


def test_without_evaluations_the_front_is_of_smoothed_training_means(policy_path, tmp_path):
    trainer = run(DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, [checksum, brevity], **VOLUME)
    smoothed = []
    for scored, _, _, _ in trainer.generations:
        means = scored.rewards.mean(0).tolist()
        old = smoothed[-1] if smoothed else means
        smoothed.append([0.3 * a + 0.7 * b for a, b in zip(old, means, strict=True)])
    factors = [1.0, *meta_by_hand(smoothed)[:-1]]
    assert metric(trainer, "dynamic_reward_weighting/meta_reward") == pytest.approx(factors, abs=1e-5)
    assert max(factors[2:]) > 0.5 and min(factors) == 0.5
    assert_scaled(trainer, factors)


def test_with_evaluations_the_front_is_of_their_means(policy_path, tmp_path):
    trainer = make(
        DynamicRewardWeightingGRPOTrainer,
        policy_path,
        tmp_path,
        [checksum, brevity],
        eval_data=dataset("policy").select(range(4)),
        **VOLUME,
        eval_strategy="steps",
        eval_steps=1,
        eval_on_start=True,
        per_device_eval_batch_size=8,
    )
    trainer.train()
    vectors = [
        [entry[f"eval_rewards/{name}/mean"] for name in ("checksum", "brevity")]
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    assert len(vectors) == 9
    factors = meta_by_hand(vectors)
    assert metric(trainer, "dynamic_reward_weighting/meta_reward") == pytest.approx(factors[:-1], abs=1e-5)
    assert max(factors[1:]) > 0.5


def test_means_that_a_batch_does_not_know_stay(policy_path, tmp_path):
    calls = []

    def sometimes(completions, **kwargs):
        calls.append(1)
        return [None if len(calls) != 2 else 0.5] * len(completions)

    trainer = run(DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, [checksum, sometimes], **VOLUME)
    assert trainer._smoothed[1] == 0.5 and len(metric(trainer, "dynamic_reward_weighting/front_size")) == 7


def test_a_resumed_front_goes_on(policy_path, tmp_path):
    def build(folder):
        return make(
            DynamicRewardWeightingGRPOTrainer,
            policy_path,
            folder,
            [checksum, brevity],
            save_strategy="steps",
            save_steps=1,
            **VOLUME,
        )

    whole = build(tmp_path)
    whole.train()
    again = build(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again._guide == whole._guide and again._meta == whole._meta and again._smoothed == whole._smoothed
    for name, value in weights(again).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=0)


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weighting_mode": "both"}, "`weighting_mode` must be one of 'gradient', 'hypervolume', 'none', got"),
        ({"weighting_regularization": 0.0}, r"`weighting_regularization` must be a number in \(0, inf\), got 0.0"),
        ({"weighting_accumulation": 0}, r"`weighting_accumulation` must be a number in \[1, inf\), got 0"),
        ({"weighting_layers": [-1]}, r"`weighting_layers` must be layer numbers from 0, got \[-1\]"),
        ({"weighting_hypervolume_low": 0.0}, r"`weighting_hypervolume_low` must be a number in \(0, inf\), got 0.0"),
        (
            {"weighting_hypervolume_gain": -1.0},
            r"`weighting_hypervolume_gain` must be a number in \(0, inf\), got -1.0",
        ),
        ({"weighting_hypervolume_ema": 1.0}, r"`weighting_hypervolume_ema` must be a number in \[0, 1\), got 1.0"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got 'normalize_then_sum'",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DynamicRewardWeightingGRPOConfig(**settings("policy", tmp_path, **values))


@pytest.mark.parametrize(
    ("values", "rewards", "message"),
    [
        (
            {"reward_weights": [1.0, 0.0]},
            2,
            r"`reward_weights` must be positive to be weighed dynamically, got \[1.0, 0.0\]",
        ),
        ({"weighting_layers": [2]}, 1, r"`weighting_layers` must be below 2, the number of layers, got \[2\]"),
        ({"weighting_mode": "hypervolume"}, 5, "`weighting_mode='hypervolume'` takes at most 4 reward functions"),
    ],
)
def test_what_does_not_fit_model_or_rewards_is_refused(values, rewards, message, policy_path, tmp_path):
    with pytest.raises(ValueError, match=message):
        make(DynamicRewardWeightingGRPOTrainer, policy_path, tmp_path, [checksum] * rewards, **values)
