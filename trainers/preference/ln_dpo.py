"""LN-DPO: direct preference optimization on log-ratios per token."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.ln_dpo import length_divisor
from ...losses.preference.pair_losses import PAIR_LOSS_INPUTS
from .base import PreferenceConfig, PreferenceTrainer
from .record import PreferenceRecord

# Losses of the margin alone; 'sft' has no margin and may stand beside them
_NORMALIZABLE = [name for name, needs in PAIR_LOSS_INPUTS.items() if "margin" in needs or name == "sft"]


@method_config
class LnDPOConfig(PreferenceConfig):
    """Configuration of [`LnDPOTrainer`]."""

    ln_dpo_length_norm_power: float = method_field(
        1.0,
        "Power p of the completion length that divides each completion's score: 1 is LN-DPO, 0 is DPO, values between "
        "are this library's interpolation.",
        ge=0.0,
        le=1.0,
        was="length_norm_power",
    )
    beta: float = method_field(
        2.0,
        "Deviation from the reference model, on the scale of log-ratios per token, which is smaller than that of "
        "`DPOConfig` by the completion's length. The default is of the order that the LN-DPO study searched, recalled "
        "and not checked against its tables.",
        gt=0.0,
    )

    def validate(self) -> None:
        super().validate()
        refused = [name for name in self.loss_type if name not in _NORMALIZABLE]
        if self.ln_dpo_length_norm_power and refused:
            raise ValueError(
                f"`ln_dpo_length_norm_power={self.ln_dpo_length_norm_power}` needs `loss_type`s that are functions of "
                f"the margin, {_NORMALIZABLE}, got {refused}. Choose among these, or set `ln_dpo_length_norm_power=0`."
            )


class LnDPOTrainer(PreferenceTrainer):
    """
    Makes the chosen completion's log-ratio *per token* larger than the rejected one's, so that length earns no reward.

    With h(y) = Σ_t [log π_θ(y_t|·) − log π_ref(y_t|·)] over the completion's scored tokens, EOS included,

    L = −mean log σ(β · (h(y_w) / |y_w|^p − h(y_l) / |y_l|^p)),  p = `ln_dpo_length_norm_power` = 1

    An empty completion counts as one of length 1 with score 0. With `ld_alpha` the numerator is reweighted, the length
    is not; with another `f_divergence_type` its score is divided in place of h. `rewards/*` stay as TRL logs them, on
    summed log-ratios; `rewards/optimized_margins` is what the loss sees, β · Δ.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`LnDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults. A `DPOConfig` keeps its own `beta`, whose default of 0.1 is far too small here.

    Relations:
        - `loss_type="sigmoid_norm"` of [`~trl.DPOTrainer`] is the same loss for p = 1. This trainer adds the power,
          other losses of the margin (`hinge`, `robust`, `exo_pair`, `discopop`), the logged margin, and counts scored
          tokens only, which differs for an empty prompt.
        - `ld_alpha` (LD-DPO) also fights verbosity, by counting tokens past the shorter completion's length less.
          Prefer it when length is wanted but should not decide.
        - [`RpoDPOTrainer`](rpo.py) keeps the chosen completion likely; the two combine.

    Paper: [The Hitchhiker's Guide to Human Alignment with *PO](https://arxiv.org/abs/2407.15229)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import LnDPOConfig, LnDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["2222"] * 8})
    >>> args = LnDPOConfig("/tmp/ln_dpo", max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> trainer = LnDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    {'train_runtime': ..., 'length_norm/divisor': '3.5', ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = LnDPOConfig
    method = declared("ln_dpo")
    extends = {"scores": {"ln_dpo_length_norm_power": 0.0}}

    def scores(self, record: PreferenceRecord) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = super().scores(record)
        divisor = length_divisor(record.lengths, self.args.ln_dpo_length_norm_power)
        chosen_divisor, rejected_divisor = divisor.chunk(2)
        self.log_mean("length_norm/divisor", divisor.sum(), divisor.new_tensor(len(divisor)))
        return chosen / chosen_divisor, rejected / rejected_divisor
