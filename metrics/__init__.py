"""Metrics of generated text as `evaluate.Metric` modules; [`load`] gives one by name."""

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import evaluate

METRICS = {
    "exact_match": "ExactMatch",
    "pass_at_k": "PassAtK",
    "mean_at_k": "MeanAtK",
    "win_rate": "WinRate",
    "bleu": "Bleu",
    "response_length": "ResponseLength",
    "distinct_n": "DistinctN",
    "kl_to_base": "KlToBase",
}


def load(name: str) -> "evaluate.Metric":
    """
    Metric of the given name; `evaluate.load` takes the path of its module as well.

    Raises:
        `ValueError`: if there is no such metric; the message lists those there are.
        `ImportError`: if the package `evaluate` is missing.

    Example:

    ```python
    >>> from papertrl import metrics
    >>> metrics.load("pass_at_k").compute(predictions=[[1.0, 0.0], [0.0, 0.0]], k=2)
    {'pass@2': 0.5}
    ```
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise ValueError(f"Unknown metric '{name}'. {hint}Metrics are: {', '.join(METRICS)}.")
    return getattr(importlib.import_module(f"{__name__}.{name}"), METRICS[name])()
