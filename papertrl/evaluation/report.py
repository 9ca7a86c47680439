"""An evaluation's result as Markdown and as a plot."""

from pathlib import Path
from textwrap import wrap
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..hub.cards import cell as table_cell

COLUMNS = 4


def cell(value: dict[str, float], sign: str = "") -> str:
    """A value with its interval, as text."""
    return f"{value['value']:{sign}.3f} [{value['low']:{sign}.3f}, {value['high']:{sign}.3f}]"


def markdown(result: dict[str, Any]) -> str:
    """Tables of a result: every model's metrics, and the paired differences to the first model."""
    parts = ["# Evaluation", f"{caption(result)}.", _rows(result["models"], "")]
    if result["differences"]:
        first = table_cell(next(iter(result["models"])))
        parts += [f"Paired differences to {first}:", _rows(result["differences"], "+")]
    return "\n\n".join(parts)


def caption(result: dict[str, Any]) -> str:
    """What was asked of the models, and how."""
    data, decoding = result["dataset"], result["settings"]
    source = data.get("id") or f"{data['name']} {data['kwargs'] or ''}".strip()
    how = "greedy" if decoding["temperature"] == 0 else f"temperature {decoding['temperature']:g}"
    samples = decoding["num_samples"] * len(decoding["seeds"])
    return f"{data['prompts']} prompts of {source}; {how}, {samples} sample{'s' * (samples > 1)} each; 95 % intervals"


def _rows(models: dict[str, dict[str, dict[str, float]]], sign: str) -> str:
    metrics = list(dict.fromkeys(metric for each in models.values() for metric in each))
    lines = [f"| metric | {' | '.join(map(table_cell, models))} |", f"|---|{'---|' * len(models)}"]
    for metric in metrics:
        cells = [cell(each[metric], sign) if metric in each else "" for each in models.values()]
        lines.append(f"| {metric.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw every metric as a panel, every model as a point with its interval."""
    models = result["models"]
    metrics = list(dict.fromkeys(metric for each in models.values() for metric in each))
    columns = min(COLUMNS, len(metrics))
    rows = -(-len(metrics) // columns)
    width = max(3.4 * columns, 5.0)
    figure = Figure(figsize=(width, 0.5 + (1.3 + 0.45 * len(models)) * rows), layout="constrained")
    title = f"{'Evaluation of ' + next(iter(models)) if len(models) == 1 else 'Evaluation'}\n{caption(result)}"
    figure.suptitle(
        "\n".join(line for part in title.split("\n") for line in wrap(part, int(13 * width))),
        fontsize=10,
        parse_math=False,
    )
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, i + 1)
        for y, each in enumerate(models.values()):
            if metric in each:
                value = each[metric]
                axes.plot(
                    [value["low"], value["high"]], [y, y], linewidth=3, alpha=0.4, solid_capstyle="butt", color=f"C{y}"
                )
                axes.plot(value["value"], y, "o", color=f"C{y}")
        axes.set_yticks(
            range(len(models)), [name[-18:] for name in models] if i % columns == 0 else [], parse_math=False
        )
        axes.set_ylim(len(models) - 0.4, -0.6)
        axes.set_title(metric.replace("_", " "), fontsize=10)
        axes.grid(axis="x", alpha=0.3)
        # Their labels do not meet, however narrow the panel
        axes.xaxis.set_major_locator(MaxNLocator(4, min_n_ticks=2))
    figure.savefig(path, dpi=110)
