"""mean@k: mean score of the first k samples of every prompt."""

import datasets
import evaluate


class MeanAtK(evaluate.Metric):
    """`compute(predictions, k=1)` → `mean@k`; `predictions` holds each prompt's scores."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean score of the first k samples, averaged over prompts.",
            citation="",
            inputs_description="predictions: for every prompt the scores of its samples; k: int",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, k=1):
        fewest = min(map(len, predictions))
        if not 1 <= k <= fewest:
            raise ValueError(f"`k` must be in [1, {fewest}], the fewest samples of a prompt, got {k}.")
        return {f"mean@{k}": sum(sum(scores[:k]) / k for scores in predictions) / len(predictions)}
