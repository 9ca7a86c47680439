"""Anchored Supervised Fine-Tuning (ASFT), and with it Dynamic Fine-Tuning (DFT)."""

import math

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.divergence import token_kl
from ...losses.supervised.asft import dft_weight
from ...losses.terms import LossTerm
from .base import SupervisedConfig, SupervisedTrainer
from .record import SupervisedRecord

IGNORED_BELOW = 0.01


@method_config
class AsftSFTConfig(SupervisedConfig):
    """
    Configuration of [`AsftSFTTrainer`]: that of [`~trl.SFTConfig`], whose learning rate of 2e-5 is also that of
    the authors' code, and the fields below.
    """

    asft_anchor_coef: float = method_field(
        0.1,
        "Weight λ of the divergence from the frozen initial model, in nats per token. 0 turns the anchor, and with it "
        "the reference model, off. The authors' script uses 0.1, their README example 0.05.",
        ge=0.0,
        lt=math.inf,
        was="anchor_coef",
    )
    asft_anchor_direction: str = method_field(
        "forward",
        "Divergence that anchors: 'forward' is KL(initial ‖ trained), as in the authors' code; 'reverse' is "
        "KL(trained ‖ initial).",
        choices=("forward", "reverse"),
        was="anchor_direction",
    )
    asft_dft_weight_power: float = method_field(
        1.0,
        "Power a of the detached probability that weighs each label's loss: 1 is DFT and ASFT, 0 is plain supervised "
        "fine-tuning; values between are no paper's.",
        ge=0.0,
        lt=math.inf,
        was="dft_weight_power",
    )

    def validate(self) -> None:
        super().validate()
        if self.loss_type == "dft" and self.asft_dft_weight_power > 0:
            raise ValueError(
                f"`loss_type='dft'` and `asft_dft_weight_power={self.asft_dft_weight_power!r}` would weigh each token "
                "by its probability twice. Set `loss_type='nll'` (the default), or `asft_dft_weight_power=0`."
            )


class AsftSFTTrainer(SupervisedTrainer):
    r"""
    Supervised fine-tuning that does not chase labels the model holds impossible, and stays close to where it started.

    With \\( p_t \\) the trained and \\( q_t \\) the frozen initial model's next-token distribution at label
    \\( y_t \\), and \\( \mathrm{sg} \\) the stop-gradient, it minimizes the mean over label tokens of

    $$ \ell_t = -\,\mathrm{sg}\big(p_t(y_t)^a\big) \log p_t(y_t) + \lambda \, \mathrm{KL}(q_t \,\|\, p_t). $$

    At \\( a = 1 \\) the gradient of the first part is \\( -\nabla p_t(y_t) \\): DFT. It leaves out mislabeled
    tokens, but nothing holds the model back; the anchor does. The divergence is over the full vocabulary, on the label
    tokens of the demonstrations, and not multiplied by the weight.

    Parameters: `asft_anchor_coef` is λ (0.1), `asft_anchor_direction` the order of the KL's arguments,
    `asft_dft_weight_power` is a (1); see [`AsftSFTConfig`]. `a = 1, λ = 0` is DFT, `a = 0, λ > 0` is SFT with KL,
    `a = 0, λ = 0` is [`~trl.SFTTrainer`].

    The initial model is what is passed as `model`: a frozen copy is made of it, or, with PEFT, the adapter is switched
    off (an adapter that `model` came with is copied as `"ref"` instead). To resume, pass the same initial model.

    Logged beside TRL's metrics: `loss/token` and `loss/anchor` (mean per label token, the latter without λ),
    `asft/kl_to_ref` (the anchor's divergence), `asft/label_prob` (mean \\( p_t(y_t) \\)) and `asft/ignored_fraction`
    (share of labels with \\( p_t(y_t) < 0.01 \\), which the DFT weight all but ignores).

    Relations:
        - [`~trl.SFTTrainer`] with `loss_type="dft"` is the case `asft_anchor_coef=0`. Prefer it where drift does no
          harm.
        - [`~trl.SFTTrainer`] learns from rare tokens fastest. Prefer it for clean data that is new to the model: a
          label of probability near 0 teaches ASFT nothing.

    Paper: *Anchored Supervised Fine-Tuning* (arXiv:2509.23753), which builds on DFT (arXiv:2508.05629). The direction
    of the KL, and that the weight does not multiply it, are those of the authors' code. Unlike there, the mean is over
    all label tokens of the optimizer step, as TRL's is, and the initial model runs without dropout.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from papertrl import AsftSFTConfig, AsftSFTTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> sums = [{"prompt": f"{a}+1=", "completion": f"{a + 1}"} for a in range(8)]
    >>> args = AsftSFTConfig(output_dir="asft", asft_anchor_coef=0.1, max_steps=2, use_cpu=True, report_to="none")
    >>> trainer = AsftSFTTrainer(
    ...     tiny_model(tokenizer), args, train_dataset=Dataset.from_list(sums), processing_class=tokenizer
    ... )
    >>> trainer.train()
    {'train_runtime': ...}
    TrainOutput(global_step=2, ...)

    ```
    """

    config_class = AsftSFTConfig
    method = declared("asft")
    extends = {
        # Weighs, and logs what the weights are made of
        "token_weights": {"asft_anchor_coef": 0.0, "asft_dft_weight_power": 0.0},
        "extra_terms": {"asft_anchor_coef": 0.0},
    }
    needs = {"policy": {"asft_anchor_coef": 0.0}, "reference": {"asft_anchor_coef": 0.0}}

    def token_weights(self, record: SupervisedRecord) -> torch.Tensor:
        self._log_labels(record)
        return super().token_weights(record) * dft_weight(record.log_probs, self.args.asft_dft_weight_power)

    def extra_terms(self, record: SupervisedRecord) -> list[LossTerm]:
        terms = super().extra_terms(record)
        reverse = self.args.asft_anchor_direction == "reverse"
        divergence = token_kl(record.policy, record.reference, record.label_mask, reverse)
        self.log_mean("asft/kl_to_ref", divergence.sum(), record.label_mask.sum())
        return [*terms, LossTerm("anchor", divergence, coef=self.args.asft_anchor_coef)]

    def _log_labels(self, record: SupervisedRecord) -> None:
        probs = record.log_probs.detach().exp() * record.label_mask
        ignored = record.label_mask & (probs < IGNORED_BELOW)
        self.log_mean("asft/label_prob", probs.sum(), record.label_mask.sum())
        self.log_mean("asft/ignored_fraction", ignored.sum(), record.label_mask.sum())
