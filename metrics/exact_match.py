"""Exact match: share of completions equal to their reference, outer white space aside."""

import datasets
import evaluate


class ExactMatch(evaluate.Metric):
    """`compute(predictions, references)` → `exact_match`; both are lists of text."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of completions that equal their reference after removing outer white space.",
            citation="",
            inputs_description="predictions, references: text",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        right = [p.strip() == r.strip() for p, r in zip(predictions, references, strict=True)]
        return {"exact_match": sum(right) / len(right)}
