"""A claim's plot: what is compared over the run, and its distribution over the seeds."""

from pathlib import Path
from statistics import fmean
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .claim import Claim, Metric
from .study import curve, value
from .verdict import interval

AXIS_LABELS = {
    "steps": "optimizer steps",
    "sampled_tokens": "sampled tokens",
    "trained_tokens": "tokens in the loss",
    "seconds": "seconds of training",
}
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
BINS = 40


def draw(claim: Claim, result: dict, path: Path) -> None:
    """
    Draw curves with 95 % bands over seeds, and below each the seeds' summaries, paired by lines.

    Args:
        claim ([`Claim`]):
            What was tested.
        result (`dict`):
            Content of the result file.
        path (`Path`):
            PNG file to write.
    """
    compared = {comparison.metric for comparison in claim.comparisons}
    metrics = [m for m in claim.metrics() if m in compared or m.name not in {c.name for c in compared}][:4]
    figure = Figure(figsize=(4.6 * len(metrics), 7.6), layout="constrained")
    first = result["comparisons"][0]
    figure.suptitle(
        f"{claim.method}: {result['verdict']}\n{first['arm']} − {first['against']}, {first['metric']}: "
        f"{first['mean']:+.3g} [{first['low']:+.3g}, {first['high']:+.3g}] (95 %, {len(result['seeds'])} seeds; "
        f"smallest effect {first['smallest_effect']:g})",
        fontsize=11,
    )
    axes = figure.subplots(2, len(metrics), squeeze=False)
    for column, metric in enumerate(metrics):
        _curves(axes[0, column], claim, result["runs"], metric)
        _seeds(axes[1, column], claim, result["runs"], metric)
    axes[0, 0].legend(fontsize=9)
    figure.savefig(path, dpi=90)


def _curves(axes, claim: Claim, runs: list[dict], metric: Metric) -> None:
    for color, label in zip(COLORS, claim.arms, strict=False):
        curves = [curve(run, metric) for run in runs if run["arm"] == label]
        # All seeds on one grid, up to where every one of them got
        start, end = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
        grid = np.linspace(start, end, max(2, min(BINS, max(len(xs) for xs, _ in curves))))
        values = np.array([np.interp(grid, xs, ys) for xs, ys in curves])
        axes.plot(grid, values.mean(0), color=color, label=label)
        if len(curves) > 1:
            bands = [interval(list(map(float, column))) for column in values.T]
            axes.fill_between(grid, [b.low for b in bands], [b.high for b in bands], color=color, alpha=0.15, lw=0)
    axes.set_title(f"{metric.name} ({metric.direction} is better)", fontsize=10)
    axes.set_xlabel(AXIS_LABELS[metric.axis])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)


def _seeds(axes, claim: Claim, runs: list[dict], metric: Metric) -> None:
    labels = list(claim.arms)
    seeds = sorted({run["seed"] for run in runs})
    by = {(run["arm"], run["seed"]): value(run, metric) for run in runs}
    for seed in seeds:
        axes.plot(range(len(labels)), [by[label, seed] for label in labels], color="0.8", lw=0.8, zorder=1)
    for i, (color, label) in enumerate(zip(COLORS, labels, strict=False)):
        values = [by[label, seed] for seed in seeds]
        axes.scatter([i] * len(values), values, color=color, s=18, zorder=2)
        axes.plot([i - 0.2, i + 0.2], [fmean(values)] * 2, color=color, lw=2)
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=9)
    axes.set_ylabel(fill(f"{metric}, whole run", 36), fontsize=9)
    axes.grid(axis="y", alpha=0.3)
