"""KL(model ‖ base) from log-probabilities of the model's own samples."""

import datasets
import evaluate
import numpy as np

from papertrl.metrics.estimators import log_ratio_kl


class KlToBase(evaluate.Metric):
    """
    `compute(predictions, references, estimator="k1")` → `kl_to_base`, in nats per completion; the log-probabilities
    of the tokens of each sampled completion under the model (`predictions`) and under its base (`references`).
    """

    def _info(self):
        return evaluate.MetricInfo(
            description="KL(model || base) in nats per completion, estimated from samples of the model.",
            citation="Schulman (2020), Approximating KL Divergence, http://joschu.net/blog/kl-approx.html",
            inputs_description="predictions, references: log-probabilities of the tokens of every completion",
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("float32")),
                }
            ),
        )

    def _compute(self, predictions, references, estimator="k1"):
        if estimator not in ("k1", "k3"):
            raise ValueError(f"`estimator` must be 'k1' or 'k3', got {estimator!r}.")
        each = [
            log_ratio_kl(np.array(p), np.array(r), estimator) for p, r in zip(predictions, references, strict=True)
        ]
        return {"kl_to_base": float(np.mean(each))}
