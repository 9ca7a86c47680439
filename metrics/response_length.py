"""Mean length of completions, in tokens."""

import datasets
import evaluate


class ResponseLength(evaluate.Metric):
    """`compute(predictions)` → `response_length`; `predictions` holds the token ids of each completion."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Mean number of tokens of a completion.",
            citation="",
            inputs_description="predictions: token ids of every completion",
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions):
        return {"response_length": sum(map(len, predictions)) / len(predictions)}
