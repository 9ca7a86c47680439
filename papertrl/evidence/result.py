"""The result file of a claim: what its verdict, its row in the tables and its plot need of the runs."""

import dataclasses
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np

from .claim import Claim, Metric
from .comparison import compare, curve, value
from .study import DEVELOPMENT_SEEDS, Study, versions
from .verdict import NOT_SHOWN, interval

BINS = 40
PANELS = 4


def result(study: Study, tuning: dict, runs: list[dict], command: list[str]) -> dict[str, Any]:
    """
    What is written to `claims/results/<method>.json`.

    Args:
        study ([`Study`]):
            What was run.
        tuning (`dict`), runs (`list[dict]`):
            What its `tune` and `compare` returned.
        command (`list[str]`):
            Command line that made them.
    """
    seconds = sum(tuned["seconds"] for tuned in tuning.values()) + sum(run["total_seconds"] for run in runs)
    claim = study.claim
    comparisons = [compare(runs, comparison) for comparison in claim.comparisons]
    return {
        "method": claim.method,
        "statement": claim.statement,
        "figures": claim.figures,
        "check": claim.check,
        "verdict": NOT_SHOWN if study.short else comparisons[0]["verdict"],
        "comparisons": comparisons,
        "seeds": sorted({run["seed"] for run in runs}),
        "development_seeds": list(DEVELOPMENT_SEEDS),
        "tuned_on": str(claim.tune_on),
        "tuning": rounded(tuning),
        "minutes": round(seconds / 60 / study.jobs, 1),
        "model": study.model or "tiny",
        "quick": study.short,
        "command": " ".join(command),
        "versions": {**versions(), "python": platform.python_version(), "cpus": os.cpu_count()},
        "settings": {
            "task": claim.task,
            "task_kwargs": dict(claim.task_kwargs),
            "start": dataclasses.asdict(claim.start),
            "all_arms": dict(claim.settings),
            **{name: str(value) for name, value in claim.trainer_kwargs.items()},
            "arms": {label: {"methods": arm.methods, **arm.settings} for label, arm in claim.arms.items()},
            "train_problems": claim.train_problems,
            "held_out": claim.held_out,
        },
    }


def panels(claim: Claim, runs: list[dict]) -> list[dict[str, Any]]:
    """
    What the claim's plot shows of each of its metrics, four at most.

    Returns:
        `list[dict]`: the metric's `name`, `direction` and `axis`, what it is called with its `summary`, and by arm
            what [`thinned`] says of the curves and the summary's `values` of the whole runs, one per seed.
    """
    compared = {comparison.metric for comparison in claim.comparisons}
    names = {metric.name for metric in compared}
    shown = [metric for metric in claim.metrics() if metric in compared or metric.name not in names][:PANELS]
    found = []
    for metric in shown:
        arms = {}
        for label in claim.arms:
            of_arm = sorted((run for run in runs if run["arm"] == label), key=lambda run: run["seed"])
            arms[label] = thinned(of_arm, metric) | {"values": rounded([value(run, metric) for run in of_arm])}
        found.append(
            {
                "name": metric.name,
                "direction": metric.direction,
                "axis": metric.axis,
                "summary": str(metric),
                "arms": arms,
            }
        )
    return found


def thinned(runs: list[dict[str, Any]], metric: Metric) -> dict[str, list[float]]:
    """
    Mean curve of an arm's runs, and its 95 % band where there are several.

    Returns:
        `dict`: the `mean`, `low` and `high` at evenly spaced places, and the first and last of these, the `span`: up
            to where every run got.
    """
    curves = [curve(run, metric) for run in runs]
    span = [max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)]
    grid = np.linspace(*span, max(2, min(BINS, max(len(xs) for xs, _ in curves))))
    values = np.array([np.interp(grid, xs, ys) for xs, ys in curves])
    band = {}
    if len(curves) > 1:
        bands = [interval(column) for column in values.T.tolist()]
        band = {"low": [b.low for b in bands], "high": [b.high for b in bands]}
    return rounded({"span": span, "mean": values.mean(0).tolist(), **band})


def rounded(numbers: Any) -> Any:
    """The same structure with floats to six significant digits, which is what a reader of the file needs."""
    if isinstance(numbers, float):
        return float(f"{numbers:.6g}")
    if isinstance(numbers, dict):
        return {key: rounded(number) for key, number in numbers.items()}
    if isinstance(numbers, (list, tuple)):
        return [rounded(number) for number in numbers]
    return numbers


def write_result(path: Path, outcome: dict[str, Any]) -> None:
    """Write a result file, each list of numbers on one line; an interrupted write leaves the old one."""
    text = re.sub(r"\[\n[^\[\]{}]*\n *\]", _on_one_line, json.dumps(outcome, indent=1))
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


def _on_one_line(found: re.Match) -> str:
    return "[" + re.sub(r"\n *", " ", found[0][1:-1]).strip() + "]"
