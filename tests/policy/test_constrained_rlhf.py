"""Constrained RLHF: its formulas against plain loops, its search against another one, and what a real run does."""

import json
import math
from statistics import fmean, pstdev, stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from papertrl import ConstrainedRlhfGRPOConfig, ConstrainedRlhfGRPOTrainer
from papertrl.losses.policy.constrained_rlhf import (
    ProxyPointSearch,
    constraint_weights,
    difference,
    kl_reward,
    mix_advantages,
    nelder_mead,
    standardize,
    update_multipliers,
    within,
)

from ..harness.rollouts import checksum, distributions, frozen, make, metric, run, sampled
from ..harness.table import dataset, settings, weights

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
numbers = st.floats(-2, 2, width=32)
# Numbers whose differences are no rounding, and their absence
reward = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.0, math.nan])


# --- Formulas ---------------------------------------------------------------------------------------------------


@given(shapes)
def test_kl_reward_sums_log_ratios_of_the_policys_tokens(shape):
    rows, time, seed = shape
    g = torch.Generator().manual_seed(seed)
    old, ref = (-3 * torch.rand(rows, time, generator=g, dtype=torch.float64) for _ in range(2))
    old.requires_grad_()
    mask = (torch.rand(rows, time, generator=g) < 0.7).long()
    found = kl_reward(old, torch.where(mask.bool(), ref, torch.nan), mask)
    assert not found.requires_grad
    for i in range(rows):
        total = sum(old[i, t].item() - ref[i, t].item() for t in range(time) if mask[i, t])
        assert found[i].item() == pytest.approx(-total, abs=1e-12)


def test_rounding_is_no_divergence():
    old = torch.tensor([[-1.0, -2.0], [-1.0, -2.0]])
    assert kl_reward(old, old + torch.tensor([[4e-7, -4e-7], [4e-7, 0.5]]), torch.ones(2, 2)).tolist() == [0.0, 0.5]


def standardized_by_hand(values, live):
    known = [v for v, keep in zip(values, live, strict=True) if keep and not math.isnan(v)]
    if len(known) < 2:
        return [0.0] * len(values)
    center, spread = fmean(known), stdev(known)
    return [
        (v - center) / (spread + 1e-8) if keep and not math.isnan(v) else 0.0
        for v, keep in zip(values, live, strict=True)
    ]


@given(st.lists(st.tuples(reward, st.booleans()), min_size=1, max_size=12))
def test_standardize(rows):
    values, live = map(list, zip(*rows, strict=True))
    found = standardize(torch.tensor(values, dtype=torch.float64), torch.tensor(live))
    assert found.tolist() == pytest.approx(standardized_by_hand(values, live), abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-6, 12345.678, math.nan])
def test_equal_values_are_standardized_to_nothing(value):
    values = torch.full((7,), value)
    live = torch.ones(7, dtype=torch.bool)
    centered = difference(values, torch.full((7,), values.mean().item()))
    assert standardize(centered, live).tolist() == [0.0] * 7
    assert standardize(values, live).tolist() == [0.0] * 7


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**31))
def test_mixture(rows, sources, seed):
    g = torch.Generator().manual_seed(seed)
    kl, columns = torch.randn(rows, generator=g), torch.randn(rows, sources, generator=g)
    w = 2 * torch.rand(sources, generator=g) - 1
    found = mix_advantages(kl, columns, w)
    for i in range(rows):
        expected = (sources - sum(w.tolist())) * kl[i].item()
        expected += sum(w[k].item() * columns[i, k].item() for k in range(sources))
        assert found[i].item() == pytest.approx(expected, abs=1e-5)


@given(
    st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=1, max_size=5),
    st.sampled_from(["equality", "inequality"]),
    st.booleans(),
)
def test_multipliers_are_torchs_sgd_on_the_papers_loss(violations, kind, squash):
    start = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    theirs = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.4, momentum=0.3)
    ours, velocity = start, torch.zeros_like(start)
    for step in violations:
        step = torch.tensor(step, dtype=torch.float64)
        w = theirs if not squash else theirs.tanh() if kind == "equality" else theirs.sigmoid()
        optimizer.zero_grad()
        (w * step).sum().backward()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        optimizer.step()
        if kind == "inequality" and not squash:
            theirs.data.clamp_(min=0)
        ours, velocity = update_multipliers(ours, velocity, step, kind, squash, 0.4, 0.3, 0.5)
        torch.testing.assert_close(ours, theirs.data, rtol=1e-9, atol=1e-9)


def test_a_reward_above_its_threshold_loses_weight_and_an_unknown_one_keeps_it():
    raw, velocity = torch.tensor([0.1, 0.1, 0.1]), torch.tensor([0.0, 0.0, 0.2])
    moved, moved_velocity = update_multipliers(
        raw, velocity, torch.tensor([0.2, -0.2, math.nan]), "equality", True, 0.1, 0.1, 0.5
    )
    assert moved[0] < 0.1 < moved[1] and moved[2] == raw[2] and moved_velocity[2] == velocity[2]


def test_weights():
    raw = torch.tensor([-0.5, 0.0, 2.0])
    assert constraint_weights(raw, "equality", True).tolist() == pytest.approx([math.tanh(x) for x in raw.tolist()])
    expected = [1 / (1 + math.exp(-x)) for x in raw.tolist()]
    assert constraint_weights(raw, "inequality", True).tolist() == pytest.approx(expected)
    assert constraint_weights(raw, "inequality", False) is raw


def test_the_band_around_a_threshold_that_is_not_positive_is_absolute():
    returns, thresholds = torch.tensor([0.42, 0.44, -0.97, 0.04, -0.9]), torch.tensor([0.4, 0.4, -1.0, 0.0, -1.0])
    assert within(returns, thresholds, 0.0501).tolist() == [True, False, True, True, False]


# --- The search -------------------------------------------------------------------------------------------------


def bowl(x):
    return (x[0] - 0.4) ** 2 + 3 * (x[1] - 0.6) ** 2


def tilted(x):
    return (x[0] - 0.4) ** 2 + (x[1] - 0.6) ** 2 + 1.5 * (x[0] - 0.4) * (x[1] - 0.6)


def valley(x):
    return (1 - x[0]) ** 2 + 10 * (x[1] - x[0] ** 2) ** 2


def kinked(x):
    return abs(x[0] - 0.4) + 2 * abs(x[1] - 0.6)


def search_by_hand(function, simplex, alpha, gamma, rho, sigma, tolerance):
    """The method card's loop on a function that can be called; all points it asked for, and the best vertex."""
    asked = []

    def f(x):
        asked.append(list(x))
        return function(x)

    points = [(list(p), f(p)) for p in simplex]
    while pstdev([v for _, v in sorted(points, key=lambda p: p[1])]) >= tolerance:
        points = sorted(points, key=lambda p: p[1])
        n = len(points) - 1
        c = [sum(p[j] for p, _ in points[:n]) / n for j in range(n)]
        worst, f_worst = points[n]
        x_r = [c[j] + alpha * (c[j] - worst[j]) for j in range(n)]
        f_r = f(x_r)
        if points[0][1] <= f_r < points[n - 1][1]:
            points[n] = (x_r, f_r)
            continue
        if f_r < points[0][1]:
            x_e = [c[j] + gamma * (x_r[j] - c[j]) for j in range(n)]
            f_e = f(x_e)
            points[n] = (x_e, f_e) if f_e < points[0][1] else (x_r, f_r)
            continue
        x_c = [c[j] + rho * (worst[j] - c[j]) for j in range(n)]
        f_c = f(x_c)
        if f_c < f_worst:
            points[n] = (x_c, f_c)
            continue
        best = points[0][0]
        for k in range(1, n + 1):
            x = [best[j] + sigma * (points[k][0][j] - best[j]) for j in range(n)]
            points[k] = (x, f(x))
    return asked, min(points, key=lambda p: p[1])[0]


SIMPLEX = [[0.2, 0.2], [0.5, 0.2], [0.2, 0.5]]


def drive(search, function):
    asked = [next(search)]
    while True:
        try:
            asked.append(search.send(function(asked[-1])))
        except StopIteration as stop:
            return asked, stop.value


@pytest.mark.parametrize("function", [bowl, tilted, valley, kinked])
@pytest.mark.parametrize("coefficients", [(1.0, 2.0, 0.5, 0.5), (0.8, 1.7, 0.3, 0.6)])
def test_search_asks_what_a_plain_loop_asks(function, coefficients):
    names = ("alpha", "gamma", "rho", "sigma")
    asked, best = drive(nelder_mead(SIMPLEX, **dict(zip(names, coefficients, strict=True)), tolerance=1e-6), function)
    expected, expected_best = search_by_hand(function, SIMPLEX, *coefficients, 1e-6)
    assert len(asked) == len(expected) and len(asked) > 20
    for point, right in zip(asked, expected, strict=True):
        assert point == pytest.approx(right, abs=1e-9)
    assert best == pytest.approx(expected_best, abs=1e-9)


@pytest.mark.parametrize("function", [bowl, tilted, valley, kinked])
def test_search_finds_the_minimum_that_scipy_finds(function):
    _, best = drive(nelder_mead(SIMPLEX, tolerance=1e-9), function)
    theirs = minimize(function, SIMPLEX[0], method="Nelder-Mead", options={"initial_simplex": SIMPLEX, "xatol": 1e-6})
    assert best == pytest.approx(theirs.x.tolist(), abs=1e-2)


def test_search_in_one_and_three_dimensions():
    _, best = drive(nelder_mead([[0.0], [1.0]], tolerance=1e-9), lambda x: (x[0] - 0.3) ** 2)
    assert best == pytest.approx([0.3], abs=1e-3)
    corners = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]]
    _, best = drive(nelder_mead(corners, tolerance=1e-10), lambda x: sum((v - 0.1 * i) ** 2 for i, v in enumerate(x)))
    assert best == pytest.approx([0.0, 0.1, 0.2], abs=1e-2)


def test_search_remembers_through_a_file_and_asks_nothing_twice():
    coefficients = {"tolerance": 1e-4}
    search, told = ProxyPointSearch(SIMPLEX, coefficients), []
    while (point := search.propose()) is not None:
        assert search.propose() == point
        assert all(max(abs(a - b) for a, b in zip(point, other, strict=True)) > 5e-3 for other in told)
        told.append(point)
        search.tell(point, -bowl(point))
        remembered = json.loads(json.dumps(search.evaluations))
        search = ProxyPointSearch(SIMPLEX, coefficients, evaluations=[(p, s) for p, s in remembered])
    point, score = search.best()
    assert score == max(-bowl(p) for p in told) and point == pytest.approx([0.4, 0.6], abs=0.05)


# --- The trainer ------------------------------------------------------------------------------------------------


def length(completions, **kwargs):
    return [len(text) / 10 for text in completions]


def digits(completions, **kwargs):
    """Share of digits; unknown for about a third of all texts."""
    return [
        None if sum(map(ord, text)) % 3 == 0 else sum(c.isdigit() for c in text) / max(1, len(text))
        for text in completions
    ]


OPTIONS = {
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "constraint_thresholds": {"digits": 0.2, "length": 0.3},
    "constraint_lagrange_lr": 0.7,
    "max_steps": 4,
}


def group_means(values, groups):
    members = {g: [v for v, other in zip(values, groups, strict=True) if other == g] for g in set(groups)}
    known = {g: [v for v in vs if not math.isnan(v)] for g, vs in members.items()}
    return [fmean(known[g]) if known[g] else math.nan for g in groups]


def advantages_by_hand(trainer, generation, reference, weights, free):
    """A_mix of a generation batch from the card, given the weights of constraints and of other rewards by name."""
    scored, batch, model, _ = generation
    log_ratio = sampled(distributions(model, batch), batch) - sampled(distributions(reference, batch), batch)
    kl = [
        -sum(log_ratio[i, t].item() for t in range(log_ratio.shape[1]) if batch["completion_mask"][i, t])
        for i in range(log_ratio.shape[0])
    ]
    # One rounding error apart is the same
    kl = [0.0 if abs(value) < 1e-4 else value for value in kl]
    groups = scored.group_ids.tolist()

    def source(values):
        centered = [v - mean for v, mean in zip(values, group_means(values, groups), strict=True)]
        centered = [0.0 if abs(v) < 1e-6 else v for v in centered]
        return standardized_by_hand(centered, [True] * len(values))

    total = [(len(weights) - sum(weights.values())) * a for a in source(kl)]
    for name, weight in (weights | free).items():
        values = scored.rewards[:, scored.source_names.index(name)].tolist()
        total = [a + weight * b for a, b in zip(total, source(values), strict=True)]
    unknown = scored.rewards.isnan().all(1).tolist()
    return [0.0 if gone else a for gone, a in zip(unknown, total, strict=True)]


@pytest.mark.parametrize(
    ("mode", "squash", "start"),
    [("equality", True, 0.0), ("inequality", True, 0.0), ("equality", False, 0.5), ("inequality", False, 0.5)],
)
def test_advantages_and_multipliers_of_a_run_are_those_computed_by_hand(mode, squash, start, policy_path, tmp_path):
    options = OPTIONS | {
        "constraint_mode": mode,
        "constraint_lagrange_squash": squash,
        "reward_weights": [0.3, 9.0, 9.0],
    }
    trainer = run(ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, [checksum, length, digits], **options)
    reference = trainer.generations[0][2]
    raw, velocity = {"digits": start, "length": start}, {"digits": 0.0, "length": 0.0}
    squashes = {"equality": math.tanh, "inequality": lambda x: 1 / (1 + math.exp(-x))}
    slopes = {
        "equality": lambda x: 1 - math.tanh(x) ** 2,
        "inequality": lambda x: math.exp(-x) / (1 + math.exp(-x)) ** 2,
    }
    for step, generation in enumerate(trainer.generations):
        scored = generation[0]
        w = {name: squashes[mode](x) if squash else x for name, x in raw.items()}
        expected = advantages_by_hand(trainer, generation, reference, w, {"checksum": 0.3})
        assert scored.advantages.tolist() == pytest.approx(expected, abs=1e-4)
        kl_weight = 2 - sum(w.values())
        assert metric(trainer, "constrained_rlhf/kl_weight")[step] == pytest.approx(kl_weight, abs=1e-5)

        returns = {
            name: fmean(v for v in scored.rewards[:, scored.source_names.index(name)].tolist() if not math.isnan(v))
            for name in raw
        }
        gaps = {name: returns[name] - OPTIONS["constraint_thresholds"][name] for name in raw}
        gradient = {name: gaps[name] * (slopes[mode](raw[name]) if squash else 1.0) for name in raw}
        norm = math.hypot(*gradient.values())
        for name in raw:
            velocity[name] = 0.1 * velocity[name] + gradient[name] * min(1.0, 0.5 / norm)
            raw[name] -= 0.7 * velocity[name]
            if mode == "inequality" and not squash:
                raw[name] = max(0.0, raw[name])
            assert metric(trainer, f"constrained_rlhf/{name}/violation")[step] == pytest.approx(gaps[name], abs=1e-5)
            assert metric(trainer, f"constrained_rlhf/{name}/weight")[step] == pytest.approx(w[name], abs=1e-5)
    assert trainer._multipliers.tolist() == pytest.approx([raw["digits"], raw["length"]], abs=1e-5)
    assert min(metric(trainer, "constrained_rlhf/weight_change")) > 0


def test_divergence_counts_once_the_policy_has_left_the_reference(policy_path, tmp_path):
    trainer = run(ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, length, **_only_length())
    rewards = [scored.statistics["constrained_rlhf/kl_reward"] for scored, _, _, _ in trainer.generations]
    assert rewards[0].tolist() == [0.0] * 12 and all(r.abs().max() > 1e-3 for r in rewards[1:])
    assert "kl" not in trainer.state.log_history[0]


def _only_length(**values):
    return OPTIONS | {"constraint_thresholds": {"length": 0.3}, "constraint_lagrange_init": 1.0} | values


def test_fixed_multipliers_stay(policy_path, tmp_path):
    trainer = run(
        ConstrainedRlhfGRPOTrainer,
        policy_path,
        tmp_path,
        length,
        **_only_length(constraint_lagrange_fixed=True, max_steps=2),
    )
    assert metric(trainer, "constrained_rlhf/length/weight") == pytest.approx([math.tanh(1.0)] * 2)


def test_a_constraint_nobody_scores_neither_acts_nor_moves(policy_path, tmp_path):
    def never(completions, **kwargs):
        return [None] * len(completions)

    options = OPTIONS | {
        "constraint_thresholds": {"never": 0.5, "length": 0.3},
        "max_steps": 2,
        "constraint_lagrange_init": 0.5,
    }
    trainer = run(ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, [never, length], **options)
    assert trainer._multipliers[0] == 0.5 and trainer._multipliers[1] != 0.5
    assert all(math.isfinite(loss) for loss in metric(trainer, "loss"))


def test_rows_nobody_scores_have_no_advantage(policy_path, tmp_path):
    def some(completions, **kwargs):
        return [None if sum(map(ord, text)) % 2 else float(len(text)) for text in completions]

    trainer = run(
        ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, some, **(OPTIONS | {"constraint_thresholds": {"some": 1}})
    )
    for scored, _, _, _ in trainer.generations[1:]:
        gone = scored.rewards.isnan().all(1)
        assert gone.any() and scored.advantages[gone].abs().max() == 0 and scored.advantages.abs().max() > 0


SEARCH = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_eval_batch_size": 8,
    "constraint_proxy_search_metric": "eval_rewards/checksum/mean",
    "constraint_proxy_search_steps": {"length": 0.2},
    "constraint_proxy_search_budget": 0.25,
    "reward_weights": [0.0, 1.0],
    "max_steps": 8,
}


def test_thresholds_are_searched_during_the_run(policy_path, tmp_path):
    trainer = make(
        ConstrainedRlhfGRPOTrainer,
        policy_path,
        tmp_path,
        [checksum, length],
        eval_data=dataset("policy").select(range(4)),
        **_only_length(**SEARCH),
    )
    trainer.train()
    log = trainer.state.log_history
    expected, current, since = ProxyPointSearch([[0.3], [0.5]], {}), [0.3], 0
    held, evaluated = [], 0
    for step in range(1, 9):
        held.append(current[0])
        metrics = next(e for e in log if e["step"] == step and "eval_loss" in e)
        near = abs(metrics["eval_rewards/length/mean"] - current[0]) <= 0.05 * current[0]
        if (near or step - since >= 2) and expected.propose() is not None:
            expected.tell(current, metrics["eval_rewards/checksum/mean"])
            current, since, evaluated = expected.propose() or expected.best()[0], step, evaluated + 1
    assert evaluated >= 3
    assert metric(trainer, "constrained_rlhf/length/threshold") == pytest.approx(held, abs=1e-6)
    assert trainer._search.evaluations == expected.evaluations
    assert metric(trainer, "constrained_rlhf/search_best")[-1] == expected.best()[1]


def test_a_resumed_search_goes_on(policy_path, tmp_path):
    def build(folder):
        return make(
            ConstrainedRlhfGRPOTrainer,
            policy_path,
            folder,
            [checksum, length],
            eval_data=dataset("policy").select(range(4)),
            save_strategy="steps",
            save_steps=1,
            **_only_length(**SEARCH),
        )

    whole = build(tmp_path)
    whole.train()
    again = build(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again._search.evaluations == whole._search.evaluations and len(whole._search.evaluations) >= 3
    assert again._search_since == whole._search_since
    for name, value in weights(again).items():
        torch.testing.assert_close(value, weights(whole)[name], rtol=0, atol=0)


def test_evaluation_leaves_the_multipliers_alone(policy_path, tmp_path):
    trainer = make(
        ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, length, per_device_eval_batch_size=8, **_only_length()
    )
    assert math.isfinite(trainer.evaluate(dataset("policy").select(range(4)))["eval_loss"])
    assert trainer._multipliers.tolist() == [1.0]


def test_the_reference_is_the_frozen_start(policy_path, tmp_path):
    trainer = run(ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, length, **_only_length())
    start, now = trainer.generations[0][2].state_dict(), frozen(trainer.ref_model).state_dict()
    assert all(torch.equal(start[name], value) for name, value in now.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"constraint_thresholds": {}}, "`constraint_thresholds` must be finite numbers by name.*got {}"),
        ({"constraint_thresholds": {"length": math.nan}}, "`constraint_thresholds` must be finite numbers by name"),
        ({"constraint_thresholds": "length=0.3"}, "`constraint_thresholds` must be numbers by reward as JSON"),
        ({"constraint_mode": "both"}, "`constraint_mode` must be one of 'equality', 'inequality', got 'both'"),
        ({"constraint_lagrange_lr": 0.0}, r"`constraint_lagrange_lr` must be a number in \(0, inf\), got 0.0"),
        (
            {"constraint_lagrange_momentum": 1.0},
            r"`constraint_lagrange_momentum` must be a number in \[0, 1\), got 1.0",
        ),
        ({"constraint_lagrange_init": math.inf}, "`constraint_lagrange_init` must be a number"),
        (
            {"constraint_lagrange_max_grad_norm": 0},
            r"`constraint_lagrange_max_grad_norm` must be a number in \(0, inf\), got 0",
        ),
        (
            {"constraint_proxy_search_budget": 0},
            r"`constraint_proxy_search_budget` must be a number in \(0, 1\], got 0",
        ),
        ({"constraint_proxy_search_band": 1}, r"`constraint_proxy_search_band` must be a number in \(0, 1\), got 1"),
        (
            {"constraint_proxy_search_alpha": 0},
            r"`constraint_proxy_search_alpha` must be a number in \(0, inf\), got 0",
        ),
        (
            {"constraint_proxy_search_gamma": 1},
            r"`constraint_proxy_search_gamma` must be a number in \(1, inf\), got 1",
        ),
        ({"constraint_proxy_search_rho": 1}, r"`constraint_proxy_search_rho` must be a number in \(0, 1\), got 1"),
        ({"constraint_proxy_search_sigma": 0}, r"`constraint_proxy_search_sigma` must be a number in \(0, 1\), got 0"),
        (
            {"constraint_proxy_search_tolerance": 0},
            r"`constraint_proxy_search_tolerance` must be a number in \(0, inf\), got 0",
        ),
        (
            {"constraint_thresholds": {"length": 1}, "multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got 'normalize_then_sum'",
        ),
        (
            SEARCH | {"constraint_thresholds": {"length": 1}, "constraint_proxy_search_steps": {"other": 1.0}},
            "`constraint_proxy_search_steps` other than 0 for all of `constraint_thresholds`, got {'other': 1.0}",
        ),
        (
            SEARCH | {"constraint_thresholds": {"length": 1}, "constraint_proxy_search_steps": {"length": 0}},
            "needs `constraint_proxy_search_steps` other than 0",
        ),
        (
            SEARCH | {"constraint_thresholds": {"length": 1}, "eval_strategy": "no"},
            "comes from evaluations, but `eval_strategy` is 'no'",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ConstrainedRlhfGRPOConfig(**settings("policy", tmp_path, **values))


def test_thresholds_are_read_from_json(tmp_path):
    config = ConstrainedRlhfGRPOConfig(**settings("policy", tmp_path, constraint_thresholds='{"length": 0.3}'))
    assert config.constraint_thresholds == {"length": 0.3}


def test_unknown_names_are_refused(policy_path, tmp_path):
    with pytest.raises(ValueError, match=r"`constraint_thresholds` names \['size'\], but .* are \['length'\]"):
        make(ConstrainedRlhfGRPOTrainer, policy_path, tmp_path, length, constraint_thresholds={"size": 1.0})
    trainer = make(
        ConstrainedRlhfGRPOTrainer,
        policy_path,
        tmp_path,
        length,
        eval_data=dataset("policy").select(range(4)),
        **_only_length(**SEARCH | {"constraint_proxy_search_metric": "eval_trust", "reward_weights": [1.0]}),
    )
    with pytest.raises(
        ValueError, match=r"`constraint_proxy_search_metric` needs \['eval_trust'\].*'eval_rewards/length/mean'"
    ):
        trainer.train()
