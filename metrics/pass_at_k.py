"""pass@k: probability that at least one of k samples is right, estimated without bias."""

import datasets
import evaluate
import numpy as np

from papertrl.metrics.estimators import pass_at_k


class PassAtK(evaluate.Metric):
    """`compute(predictions, k=1)` → `pass@k`; `predictions` holds each prompt's scores, 1 for a right sample."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Probability that at least one of k samples is right (unbiased estimator).",
            citation="Chen et al. (2021), Evaluating Large Language Models Trained on Code, arXiv:2107.03374",
            inputs_description="predictions: for every prompt the scores of its samples; k: int",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, k=1):
        correct = np.array([sum(score >= 1 for score in scores) for scores in predictions])
        samples = np.array([len(scores) for scores in predictions])
        return {f"pass@{k}": float(pass_at_k(correct, samples, k).mean())}
