"""From completions to numbers with intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np

from ..metrics.estimators import bootstrap, distinct_n, length_controlled, log_ratio_kl, pass_at_k

# Resampling a corpus BLEU takes as long as computing it
RESAMPLES = {"bleu": 200}

Statistic = Callable[[np.ndarray], float]


@dataclass
class Answered:
    """
    A model's answers to all prompts.

    Args:
        texts (`list[list[str]]`):
            Completions of each prompt.
        scores (`dict[str, list[list[float]]]`):
            What each reward function gave them; `None` where it does not apply.
        lengths (`list[list[int]]`):
            Their tokens, end-of-sequence included.
        logps (`list[list[list[float]]]`, *optional*), base_logps (`list[list[list[float]]]`, *optional*):
            Log-probabilities of their tokens under the model and under its base.
    """

    texts: list[list[str]]
    scores: dict[str, list[list[float | None]]]
    lengths: list[list[int]]
    logps: list[list[list[float]]] | None = None
    base_logps: list[list[list[float]]] | None = None

    @property
    def score(self) -> np.ndarray:
        """Mean over the reward functions that apply, of shape `(prompts, samples)`; NaN where none does."""
        return nanmean(np.stack([np.array(each, dtype=float) for each in self.scores.values()]), axis=0)


def measures(
    answered: Answered,
    chosen: list[str],
    ks: list[int],
    references: list[str] | None,
    opponent: Answered | None = None,
) -> dict[str, Statistic]:
    """
    Statistics of a model.

    Args:
        answered ([`Answered`]):
            Its answers.
        chosen (`list[str]`):
            Metrics to compute beside the reward functions' means, of [`papertrl.metrics.METRICS`].
        ks (`list[int]`):
            k of pass@k and mean@k.
        references (`list[str]`, *optional*):
            Reference answers.
        opponent ([`Answered`], *optional*):
            Model to win against.

    Returns:
        `dict[str, Callable]`: by metric, indices of prompts → number.
    """
    values = {name: nanmean(np.array(each, dtype=float), axis=1) for name, each in answered.scores.items()}
    others: dict[str, Statistic] = {}
    if "exact_match" in chosen and references is not None:
        values["exact_match"] = np.array(
            [fmean(t.strip() == r.strip() for t in texts) for texts, r in zip(answered.texts, references, strict=True)]
        )
    if "bleu" in chosen and references is not None:
        others["bleu"] = partial(_bleu, [texts[0] for texts in answered.texts], references)
    if "response_length" in chosen:
        values["response_length"] = np.array([fmean(each) for each in answered.lengths])
    if "distinct_n" in chosen:
        values["distinct-2"] = np.array([distinct_n(texts, 2) for texts in answered.texts])
    score = answered.score
    scored = ~np.isnan(score).any(1)
    for k in ks:
        if "mean_at_k" in chosen:
            values[f"mean@{k}"] = score[:, :k].mean(1)
        if "pass_at_k" in chosen:
            passed = pass_at_k((score >= 1).sum(1), np.full(len(score), score.shape[1]), k)
            values[f"pass@{k}"] = np.where(scored, passed, np.nan)
    if "kl_to_base" in chosen and answered.logps is not None and answered.base_logps is not None:
        values["kl_to_base"] = np.array(
            [
                fmean(log_ratio_kl(np.array(p), np.array(q)) for p, q in zip(ours, bases, strict=True))
                for ours, bases in zip(answered.logps, answered.base_logps, strict=True)
            ]
        )
    if "win_rate" in chosen and opponent is not None:
        theirs = opponent.score
        wins = ((score > theirs) + 0.5 * (score == theirs)).mean(1)
        wins = np.where(scored & ~np.isnan(theirs).any(1), wins, np.nan)
        longer = np.array(answered.lengths).mean(1) - np.array(opponent.lengths).mean(1)
        values["win_rate"] = wins
        others["length_controlled_win_rate"] = partial(_length_controlled, wins, longer)
    means: dict[str, Statistic] = {name: partial(_mean, each) for name, each in values.items()}
    return means | others


def nanmean(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of what is not NaN; NaN where nothing is."""
    counts = (~np.isnan(values)).sum(axis)
    return np.where(counts > 0, np.nansum(values, axis=axis) / np.maximum(counts, 1), np.nan)


def _mean(values: np.ndarray, rows: np.ndarray) -> float:
    return float(nanmean(values[rows], axis=0))


def _length_controlled(wins: np.ndarray, longer: np.ndarray, rows: np.ndarray) -> float:
    rows = rows[~np.isnan(wins[rows])]
    return length_controlled(wins[rows], longer[rows]) if len(rows) else float("nan")


def _bleu(texts: list[str], references: list[str], rows: np.ndarray) -> float:
    import sacrebleu

    return sacrebleu.corpus_bleu([texts[i] for i in rows], [[references[i] for i in rows]]).score


def table(statistics: dict[str, dict[str, Statistic]], prompts: int, seed: int) -> dict[str, Any]:
    """
    Every model's metrics with 95 % bootstrap intervals over prompts, and the paired differences to the first model.

    Args:
        statistics (`dict[str, dict[str, Callable]]`):
            By model and metric.
        prompts (`int`):
            Number of prompts.
        seed (`int`):
            Seed of the resampling.

    Returns:
        `dict`: `models` and `differences`, each by model and metric with `value`, `low` and `high`.
    """
    draw = lambda metric, statistic: bootstrap(prompts, statistic, seed, RESAMPLES.get(metric, 1000))  # noqa: E731
    models = {name: {m: draw(m, s) for m, s in each.items()} for name, each in statistics.items()}
    first, *rest = statistics
    differences = {
        name: {
            m: draw(m, lambda rows, ours=s, theirs=statistics[first][m]: ours(rows) - theirs(rows))
            for m, s in statistics[name].items()
            if m in statistics[first]
        }
        for name in rest
    }
    return {"models": models, "differences": differences}
