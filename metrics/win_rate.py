"""Win rate of one model's scores over another's, plain and at equal length."""

import datasets
import evaluate
import numpy as np

from papertrl.metrics.estimators import length_controlled


class WinRate(evaluate.Metric):
    """
    `compute(predictions, references, prediction_lengths, reference_lengths)` → `win_rate` and
    `length_controlled_win_rate`: scores and lengths of the two models' answers to the same prompts; a tie is half a
    win.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of prompts on which one model's score is higher, plain and predicted at equal length.",
            citation="Dubois et al. (2024), Length-Controlled AlpacaEval, arXiv:2404.04475",
            inputs_description="predictions, references: scores; prediction_lengths, reference_lengths: tokens",
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float32"),
                    "references": datasets.Value("float32"),
                    "prediction_lengths": datasets.Value("float32"),
                    "reference_lengths": datasets.Value("float32"),
                }
            ),
        )

    def _compute(self, predictions, references, prediction_lengths, reference_lengths):
        ours, theirs = np.array(predictions), np.array(references)
        wins = (ours > theirs) + 0.5 * (ours == theirs)
        longer = np.array(prediction_lengths) - np.array(reference_lengths)
        return {"win_rate": float(wins.mean()), "length_controlled_win_rate": length_controlled(wins, longer)}
