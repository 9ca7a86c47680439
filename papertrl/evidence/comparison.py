"""From runs to verdicts: what each arm's runs are worth, seed by seed, and what follows from that."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..core.errors import JobError
from .claim import AXES, Comparison, Metric
from .verdict import decide, interval, up_to

# By label of an arm, one number per seed, in the order of the seeds
Values = Mapping[str, list[float]]


def curve(run: dict[str, Any], metric: Metric, axis: str | None = None) -> tuple[list[float], list[float]]:
    """A metric's curve in a run, over what is equal among the arms; logged metrics are taken over steps only."""
    axis = axis or metric.axis
    if metric.name in run["points"][-1]:
        key = "step" if axis == "steps" else axis
        points = run["points"]
        return [point[key] for point in points], [point[metric.name] for point in points]
    if metric.name not in run["logs"]:
        raise JobError(
            f"`metric`: '{metric.name}' was neither measured nor logged by arm '{run['arm']}'; there are "
            f"{sorted({*run['points'][-1], *run['logs']})}."
        )
    xs, ys = zip(*run["logs"][metric.name], strict=True)
    if axis == "steps":
        return list(xs), list(ys)
    at = {point["step"]: point[axis] for point in run["points"]}
    end = max(at)
    return [at[end] * x / end for x in xs], list(ys)


def value(run: dict[str, Any], metric: Metric, end: float | None = None, axis: str | None = None) -> float:
    """The metric's summary of a run, of its curve up to `end`."""
    xs, ys = curve(run, metric, axis)
    if end is not None:
        xs, ys = up_to(xs, ys, max(end, xs[0]))
    return metric.summary(xs, ys)


def paired(runs: list[dict[str, Any]], comparison: Comparison, metric: Metric, axis: str | None = None) -> Values:
    """Values of the two arms in the metric's unit; the two of a seed are taken at the smaller of their budgets."""
    by_seed: dict[int, dict[str, dict]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], {})[run["arm"]] = run
    values: dict[str, list[float]] = {comparison.arm: [], comparison.against: []}
    for seed in sorted(by_seed):
        end = min(curve(by_seed[seed][label], metric, axis)[0][-1] for label in values)
        for label, of_arm in values.items():
            of_arm.append(value(by_seed[seed][label], metric, end, axis))
    return values


def differences(values: Values, comparison: Comparison) -> list[float]:
    """What the arm has more than the one that it is held against, seed by seed."""
    return [ours - theirs for ours, theirs in zip(values[comparison.arm], values[comparison.against], strict=True)]


def judge(comparison: Comparison, values: Values, guards: Mapping[str, Values]) -> dict[str, Any]:
    """
    Verdict on one comparison. It follows from what a result file holds, without the runs.

    Args:
        comparison ([`Comparison`]):
            What is compared.
        values (`dict[str, list[float]]`):
            The metric's value by arm and seed.
        guards (`dict[str, dict[str, list[float]]]`):
            The same of each guarded metric, by what it is called.

    Returns:
        `dict`: the arms, the metric, its `values`, the `mean` of their differences with its `low` and `high`, the
            `guards` and the `verdict`.
    """
    metric = comparison.metric
    apart = differences(values, comparison)
    guarded = {}
    for guard, margin in comparison.guards.items():
        of_guard = guards[str(guard)]
        loss = interval([guard.sign * d for d in differences(of_guard, comparison)])
        guarded[str(guard)] = {
            "values": of_guard,
            **dataclasses.asdict(loss),
            "margin": margin,
            "holds": loss.low > -margin,
        }
    improvement = interval([metric.sign * d for d in apart])
    return {
        "arm": comparison.arm,
        "against": comparison.against,
        "metric": str(metric),
        "direction": metric.direction,
        "axis": metric.axis,
        "smallest_effect": comparison.smallest_effect,
        "values": values,
        **dataclasses.asdict(interval(apart)),
        "guards": guarded,
        "verdict": decide(improvement, comparison.smallest_effect, all(g["holds"] for g in guarded.values())),
    }


def compare(runs: list[dict[str, Any]], comparison: Comparison) -> dict[str, Any]:
    """What [`judge`] says of runs, and their difference `at_equal` steps, sampled tokens, trained tokens, seconds."""
    metric = comparison.metric
    guards = {str(guard): paired(runs, comparison, guard) for guard in comparison.guards}
    at_equal = {}
    for axis in AXES:
        if all(run["points"][-1]["step" if axis == "steps" else axis] > 0 for run in runs):
            values = paired(runs, comparison, metric, axis)
            at_equal[axis] = dataclasses.asdict(interval(differences(values, comparison)))
    return judge(comparison, paired(runs, comparison, metric), guards) | {"at_equal": at_equal}
