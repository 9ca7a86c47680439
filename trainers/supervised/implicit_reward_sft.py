"""Supervised fine-tuning as imitation by implicit rewards, with another f-divergence than SFT's."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.supervised.implicit_reward_sft import (
    DIVERGENCES,
    FLOORS,
    sequence_rewards,
    sequence_utility,
    utility,
    utility_slope,
)
from .base import SupervisedConfig, SupervisedTrainer
from .record import SupervisedRecord

# β where none is set
TOKEN_BETA, SEQUENCE_BETA = 1.0, 0.1
# Under which it is SFT
SFT = {"implicit_divergence": "tv", "implicit_divergence_level": "token", "implicit_scale_by_beta": True}


@method_config
class ImplicitRewardSFTConfig(SupervisedConfig):
    """Configuration of [`ImplicitRewardSFTTrainer`]."""

    implicit_divergence: str = method_field(
        "pearson_chi2",
        "f-divergence whose conjugate gives the utility φ of the implicit reward. 'tv' is SFT: φ(x) = x.",
        choices=DIVERGENCES,
        was="sft_divergence",
    )
    implicit_divergence_level: str = method_field(
        "token",
        "What a reward belongs to: 'token', with the mean over labels, or 'sequence', the sum over an example's "
        "labels, with the mean over examples.",
        choices=("token", "sequence"),
        was="sft_divergence_level",
    )
    implicit_beta: float | None = method_field(
        None,
        "β, scale of the implicit reward x = β · log(π_θ / π_ref). Unset, 1 per token and 0.1 per sequence, which are "
        "this library's: the paper's values are not known to us.",
        gt=0.0,
        was="sft_beta",
    )
    implicit_scale_by_beta: bool = method_field(
        True,
        "Whether the loss is divided by β, so that its gradient at the start is that of SFT at the same learning rate "
        "(1/e of it for 'reverse_kl').",
        was="sft_scale_by_beta",
    )
    learning_rate: float = method_field(
        5e-6,
        "The paper's rule is a clearly lower learning rate than usual, chosen by the score after the DPO stage. "
        "Default: a quarter of that of `SFTConfig`.",
        ge=0.0,
    )

    @property
    def implicit_reward_beta(self) -> float:
        """β, also where `implicit_beta` is unset."""
        if self.implicit_beta is not None:
            return self.implicit_beta
        return TOKEN_BETA if self.implicit_divergence_level == "token" else SEQUENCE_BETA

    def validate(self) -> None:
        super().validate()
        if self.implicit_divergence_level == "sequence" and self.packing and self.packing_strategy == "wrapped":
            raise ValueError(
                "`implicit_divergence_level='sequence'` needs to know where sequences end, which `packing_strategy="
                "'wrapped'` forgets. Set `packing_strategy='bfd'`, `packing=False` or "
                "`implicit_divergence_level='token'`."
            )


class ImplicitRewardSFTTrainer(SupervisedTrainer):
    r"""
    Supervised fine-tuning that stays within reach of preference optimization: by a concave utility of the implicit
    reward, so that labels already raised above the initial model count less, and by a low learning rate.

    DPO's implicit reward \\( x_t = \beta \log \frac{\pi_\theta(y_t|y_{<t})}{\pi_{ref}(y_t|y_{<t})} \\) makes SFT the
    imitation objective of a linear utility, which the distance to the reference drops out of. With the utility
    \\( \varphi \\) of another f-divergence it does not:

    $$ L = -\frac{1}{\beta} \frac{\sum_t \varphi(x_t)}{\sum_t 1} \quad \text{or} \quad
       L = -\frac{1}{\beta} \, \mathrm{mean}_e \; \varphi\Big(\sum_{t \in e} x_t\Big) $$

    over label tokens t, or over examples e with `implicit_divergence_level="sequence"`; both means are over the whole
    optimizer step on all ranks. Token t's gradient is SFT's times \\( \varphi'(x) \\), which is 1 at the start (1/e
    for `reverse_kl`). The utilities are listed at
    [`utility`](../../losses/supervised/implicit_reward_sft.py). `squared_hellinger` and `jensen_shannon` have a pole
    below 0; a reward below −0.9 or −0.6 is clamped there and teaches nothing until other tokens bring it back.

    Implemented is the value gauge V ≡ 0, in which a token's reward is its log-ratio alone; this, β, and the table of
    utilities are derived, not the paper's text. No code was released. The paper's other remedy is a schedule: SFT at
    `learning_rate` of a quarter of the usual or less, chosen by the score *after* DPO and not by SFT's loss. The
    recipe has it in two stages. The diagnostic of logits as values, β · logsumexp, is left out: it is defined only up
    to a constant of the state.

    The initial model is what is passed as `model`; see [`AsftSFTTrainer`](asft.py). With packing, the pieces of an
    example that `packing_strategy="bfd_split"` splits count as sequences of their own.

    Logged beside TRL's metrics: `implicit_reward/mean` (x), `implicit_reward/slope` (mean \\( \varphi'(x) \\)),
    `implicit_reward/reweighting` (mean \\( |\varphi'(x) / \varphi'(0) - 1| \\), how far this is from SFT) and
    `implicit_reward/clamped_fraction` (share of rewards below the floor), over tokens or examples as the loss is.

    Relations:
        - [`~trl.SFTTrainer`] is `implicit_divergence="tv"`. Prefer it where no preference stage follows.
        - [`AsftSFTTrainer`](asft.py) bounds the drift by a divergence over the whole vocabulary and distrusts
          unlikely labels; here the bound is on each label's own gain. The two combine.
        - [`~trl.DPOTrainer`] is the stage after: the same implicit reward, compared within pairs.

    Paper: [Implicit Reward as the Bridge: A Unified View of SFT and DPO
    Connections](https://arxiv.org/abs/2507.00018)

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from papertrl import ImplicitRewardSFTConfig, ImplicitRewardSFTTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer
    >>> tokenizer = tiny_tokenizer()
    >>> sums = [{"prompt": f"{a}+1=", "completion": f"{a + 1}"} for a in range(8)]
    >>> args = ImplicitRewardSFTConfig(output_dir="implicit", max_steps=2, use_cpu=True, report_to="none")
    >>> trainer = ImplicitRewardSFTTrainer(
    ...     tiny_model(tokenizer), args, train_dataset=Dataset.from_list(sums), processing_class=tokenizer
    ... )
    >>> trainer.train()
    {'train_runtime': ...}
    TrainOutput(global_step=2, ...)

    ```
    """

    config_class = ImplicitRewardSFTConfig
    method = declared("implicit_reward_sft")
    replaces = {"token_loss": SFT}
    needs = {"ref_log_probs": SFT, "labels_per_example": {"implicit_divergence_level": "token"}}

    def token_loss(self, record: SupervisedRecord) -> torch.Tensor:
        args = self.args
        beta, divergence = args.implicit_reward_beta, args.implicit_divergence
        scale = 1 / beta if args.implicit_scale_by_beta else 1.0
        rewards = beta * (record.log_probs - record.ref_log_probs)
        if args.implicit_divergence_level == "token":
            self._log_rewards(rewards.detach(), record.label_mask)
            return -scale * utility(rewards, divergence)
        examples = (record.example_ids, record.num_examples)
        labels = sequence_rewards(record.label_mask.to(rewards), *examples)
        self._log_rewards(sequence_rewards(rewards.detach(), *examples), labels > 0)
        values = sequence_utility(rewards, record.label_mask, *examples, divergence)
        # The base divides by the number of labels, the mean is over examples
        ratio = record.labels_per_example
        if ratio is None:
            ratio = labels.sum() / (labels > 0).sum().clamp(min=1)
        return -scale * ratio * values

    def _log_rewards(self, rewards: torch.Tensor, mask: torch.Tensor) -> None:
        divergence, count = self.args.implicit_divergence, mask.sum()
        slope = utility_slope(rewards, divergence)
        departure = (slope / utility_slope(torch.zeros_like(slope), divergence) - 1).abs()
        for name, values in {
            "mean": rewards,
            "slope": slope,
            "reweighting": departure,
            "clamped_fraction": rewards < FLOORS[divergence],
        }.items():
            self.log_mean(f"implicit_reward/{name}", (values * mask).sum(), count)
