"""distinct-n: share of different n-grams among a prompt's completions."""

import datasets
import evaluate

from papertrl.metrics.estimators import distinct_n


class DistinctN(evaluate.Metric):
    """`compute(predictions, n=2)` → `distinct-n`; `predictions` holds the completions of each prompt."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of different n-grams among all of a prompt's completions, averaged over prompts.",
            citation="Li et al. (2016), A Diversity-Promoting Objective Function, arXiv:1510.03055",
            inputs_description="predictions: for every prompt the texts of its samples; n: int",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("string"))}),
        )

    def _compute(self, predictions, n=2):
        return {f"distinct-{n}": sum(distinct_n(texts, n) for texts in predictions) / len(predictions)}
