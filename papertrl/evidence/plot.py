"""A claim's plot: what is compared over the run, and its distribution over the seeds."""

from io import BytesIO
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

AXIS_LABELS = {
    "steps": "optimizer steps",
    "sampled_tokens": "sampled tokens",
    "trained_tokens": "tokens in the loss",
    "seconds": "seconds of training",
}
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
PALETTE = 32


def draw(result: dict[str, Any], path: Path) -> None:
    """
    Draw curves with 95 % bands over seeds, and below each the seeds' summaries, paired by lines.

    Args:
        result (`dict`):
            Content of the result file.
        path (`Path`):
            PNG file to write.
    """
    panels = result["plot"]
    figure = Figure(figsize=(4.6 * len(panels), 7.6), layout="constrained")
    first = result["comparisons"][0]
    figure.suptitle(
        f"{result['method']}: {result['verdict']}\n{first['arm']} − {first['against']}, {first['metric']}: "
        f"{first['mean']:+.3g} [{first['low']:+.3g}, {first['high']:+.3g}] (95 %, {len(result['seeds'])} seeds; "
        f"smallest effect {first['smallest_effect']:g})",
        fontsize=11,
    )
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        _curves(axes[0, column], panel)
        _seeds(axes[1, column], panel)
    axes[0, 0].legend(fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG with a palette, a quarter as large as one in true color."""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=90)
    Image.open(drawn).convert("RGB").quantize(PALETTE, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)


def _curves(axes: Axes, panel: dict[str, Any]) -> None:
    for color, (label, arm) in zip(COLORS, panel["arms"].items(), strict=False):
        grid = np.linspace(*arm["span"], len(arm["mean"]))
        axes.plot(grid, arm["mean"], color=color, label=label)
        if "low" in arm:
            axes.fill_between(grid, arm["low"], arm["high"], color=color, alpha=0.15, lw=0)
    axes.set_title(f"{panel['name']} ({panel['direction']} is better)", fontsize=10)
    axes.set_xlabel(AXIS_LABELS[panel["axis"]])
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(alpha=0.3)


def _seeds(axes: Axes, panel: dict[str, Any]) -> None:
    labels = list(panel["arms"])
    by_arm = [arm["values"] for arm in panel["arms"].values()]
    for of_seed in zip(*by_arm, strict=True):
        axes.plot(range(len(labels)), of_seed, color="0.8", lw=0.8, zorder=1)
    for i, (color, values) in enumerate(zip(COLORS, by_arm, strict=False)):
        axes.scatter([i] * len(values), values, color=color, s=18, zorder=2)
        axes.plot([i - 0.2, i + 0.2], [fmean(values)] * 2, color=color, lw=2)
    axes.set_xticks(range(len(labels)), labels, rotation=25, ha="right", fontsize=9)
    axes.set_ylabel(fill(f"{panel['summary']}, whole run", 36), fontsize=9)
    axes.grid(axis="y", alpha=0.3)
