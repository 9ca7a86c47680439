"""RPO: direct preference optimization with an imitation term on the chosen completions."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.rpo import sequence_nll
from ...losses.terms import LossTerm
from .base import PreferenceConfig, PreferenceTrainer
from .record import PreferenceRecord


@method_config
class RpoDPOConfig(PreferenceConfig):
    """Configuration of [`RpoDPOTrainer`]."""

    rpo_aggregation: str = method_field(
        "cumulative",
        "How log-probabilities of the chosen tokens are put together: `cumulative` sums them, per pair, as the paper "
        "does; `sequence_mean` takes the mean per completion, as the authors' later code does; `token_mean` the mean "
        "over all chosen tokens of the micro-batch on all processes.",
        choices=("cumulative", "sequence_mean", "token_mean"),
    )
    rpo_eta: float = method_field(
        0.005,
        "η of the paper: with `cumulative`, the term's weight is η·β. Default of the paper's experiments.",
        ge=0.0,
    )
    rpo_coef: float = method_field(
        0.2,
        "The term's weight with `sequence_mean` and `token_mean`, not multiplied by β. Default of the authors' script "
        "for the mean form, there with β = 0.5.",
        ge=0.0,
    )
    beta: float = method_field(
        0.01,
        "Deviation from the reference model. Default of the paper's Mistral-7B run; its Gemma-7B run has 0.05.",
        gt=0.0,
    )


class RpoDPOTrainer(PreferenceTrainer):
    """
    Prefers the chosen completion and imitates it: the supervised term is what choosing against the worst reward
    consistent with the data amounts to, and keeps the policy near responses that the data covers.

    L = L_DPO + η·β · mean over pairs of −Σ_t log π_θ(y_w,t | x)   (`rpo_aggregation="cumulative"`)

    The two mean forms replace the last part by `rpo_coef` times a mean of −log π_θ(y_w,t | x), per completion and then
    over pairs (`sequence_mean`), or over tokens (`token_mean`). To carry a setting over: coef ≈ η · β · mean length.

    `label_smoothing` acts with `loss_type="robust"` and others that read it, on L_DPO alone, and is refused with
    `"sigmoid"`, of which TRL has no smoothed form.

    The term is on the policy's own log-probabilities, not on log-ratios; `ld_alpha`, `use_weighting` and
    `f_divergence_type` leave it alone. An empty completion contributes 0.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`RpoDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults (a `DPOConfig` keeps its own `beta`).

    Relations:
        - `loss_type=["sigmoid", "sft"]` of [`~trl.DPOTrainer`] is `token_mean` on one process. Over several processes
          TRL averages their means; here every token counts alike. It has no sum and no mean per completion.
        - [`LnDPOTrainer`](ln_dpo.py) changes the margin and combines with this trainer.
        - [`HypoDPOTrainer`](hypo.py) regularizes where the data does not reach, on samples of the policy, at the price
          of generating them.

    Paper: [Provably Mitigating Overoptimization in RLHF: Your SFT Loss is Implicitly an Adversarial
    Regularizer](https://arxiv.org/abs/2405.16436)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import RpoDPOConfig, RpoDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["3"] * 8})
    >>> args = RpoDPOConfig("/tmp/rpo", max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> trainer = RpoDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    {'train_runtime': ..., 'loss/pair': '0.6931', 'loss/rpo_nll': ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = RpoDPOConfig
    method = declared("rpo")
    extends = {
        "extra_terms": (
            {"rpo_aggregation": "cumulative", "rpo_eta": 0.0},
            {"rpo_aggregation": "sequence_mean", "rpo_coef": 0.0},
            {"rpo_aggregation": "token_mean", "rpo_coef": 0.0},
        )
    }

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        terms = super().extra_terms(model, record)
        aggregation = self.args.rpo_aggregation
        coef = self.args.rpo_eta * self.beta if aggregation == "cumulative" else self.args.rpo_coef
        logps, _ = record.per_token_logps.chunk(2)
        mask, _ = record.shift_completion_mask.chunk(2)
        if aggregation == "token_mean":
            return [*terms, LossTerm("rpo_nll", -logps, mask=mask, coef=coef)]
        nll = sequence_nll(logps, mask, per_token=aggregation == "sequence_mean")
        return [*terms, LossTerm("rpo_nll", nll, coef=coef)]
