"""The reward family: TRL's `RewardTrainer` with its loss opened into stages."""

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from ...core.configuration import MethodConfigMixin, refuse_label_smoothing_factor
from ...core.family import REWARD
from ...losses.terms import LossTerm
from ..method import MethodTrainer
from ..reduction import mean_of_terms
from .record import RewardRecord

# First half of the SHA-256 of the source of what this family relies on in TRL; tests/test_pinned.py
PINNED = {
    "trl.trainer.reward_trainer.RewardTrainer.__init__": "e30bea5e95aadcf9d1831b206f87f761",
    "trl.trainer.reward_trainer.RewardTrainer.compute_loss": "ec4fad890ecfab14023965bf24127765",
    "trl.trainer.reward_trainer.RewardTrainer.log": "0d4c8e5d64f894ace81d347b11fe39d7",
    "trl.trainer.reward_trainer.RewardTrainer.training_step": "bba41f264647016a01309e78b769eb86",
    "trl.trainer.reward_trainer.DataCollatorForPreference.torch_call": "ffa8bd0163c677fb5269a1cca296c250",
}

LOSS_STAGES = ("scores", "margin", "pair_losses", "pair_weights", "extra_terms")


@dataclass
class RewardModelConfig(MethodConfigMixin, RewardConfig):
    """Configuration of [`RewardModelTrainer`]: TRL's [`~trl.RewardConfig`]."""

    def validate(self) -> None:
        super().validate()
        refuse_label_smoothing_factor(self, "smooth by a function of yours in the stage `pair_losses`")


class RewardModelTrainer(MethodTrainer, RewardTrainer):
    r"""
    TRL's [`~trl.RewardTrainer`] with the loss opened into stages; without a method it is that trainer.

    With the rewards \\( r \\) of the chosen and the rejected text of a pair, the stages make one value per pair,

    $$ L = \mathrm{mean}_i \; w_i \, \ell(\Delta_i) + \sum_k c_k \, \mathrm{mean}(t_k). $$

    In this order:

    | stage | input → output |
    |---|---|
    | [`scores`] | record → what is compared, of chosen and rejected texts, `(pairs,)` each: the rewards |
    | [`margin`] | scores → \\( \Delta \\) `(pairs,)`: their difference, less the dataset's `margin` if it has one |
    | [`pair_losses`] | record, scores, \\( \Delta \\) → \\( \ell \\) `(pairs,)`: \\( -\log \sigma(\Delta) \\) |
    | [`pair_weights`] | record → \\( w \\) `(pairs,)`, or `None` for 1 |
    | [`extra_terms`] | record → named terms, one value per pair: the one of `center_rewards_coefficient` |

    A method overrides the stages that its paper changes and extends what `super()` returns. The weighted losses of
    pairs are logged as `loss/pair` and each term as `loss/{name}`, its mean without coefficient; TRL's metrics are on
    the rewards, whatever methods make of them. Where nobody acts in a stage of the loss, it is TRL's own.

    Args:
        model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`):
            See [`~trl.RewardTrainer`]: a sequence classifier with one label, or the name of a model that gets such a
            head.
        args ([`RewardModelConfig`] or [`~trl.RewardConfig`], *optional*):
            Given TRL's, the fields of the methods take their defaults.
        *trl_args, **trl_kwargs:
            As for [`~trl.RewardTrainer`], in its order.
        stages (`dict[str, Callable]`, *optional*):
            Functions that act in stages.

    Raises:
        `ValueError`: if the dataset is empty or lacks a column that a method needs.
    """

    family = REWARD
    stages = {
        "columns": ("needed_columns", "dataset_formats"),
        "scores": ("scores",),
        "margin": ("margin",),
        "pair_losses": ("pair_losses",),
        "pair_weights": ("pair_weights",),
        "extra_terms": ("extra_terms",),
        "after_backward": ("after_backward",),
        "before_update": ("before_update",),
    }
    config_class = RewardModelConfig
    architecture = AutoModelForSequenceClassification
    architecture_kwargs = {"num_labels": 1}
    _tag_names = ["trl", "papertrl", "reward"]

    def __init__(self, model: Any, args: Any = None, *trl_args: Any, stages: Any = None, **trl_kwargs: Any):
        super().__init__(**self.trl_arguments(RewardTrainer, model, args, *trl_args, stages=stages, **trl_kwargs))
        self.attach_slots()

    @classmethod
    def dataset_formats(cls, args: Any) -> tuple[str, ...]:
        return ("pairs",)

    # Nothing is sampled
    sampled_tokens = 0

    @property
    def trained_tokens(self) -> int:
        """Tokens that training has gone through so far."""
        return int(self._total_train_tokens)

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"num_tokens": self._total_train_tokens}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._total_train_tokens = state["num_tokens"]

    # --- Stages -------------------------------------------------------------------------------------------------

    def scores(self, record: RewardRecord) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage *scores*: what the margin compares, of chosen and rejected texts, `(pairs,)` each, with gradient."""
        chosen, rejected = record.rewards.chunk(2)
        return chosen, rejected

    def margin(self, record: RewardRecord, chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
        """Stage *margin*: Δ of every pair, `(pairs,)`, that the losses make positive."""
        margin = chosen_scores - rejected_scores
        return margin if record.least_margins is None else margin - record.least_margins

    def pair_losses(
        self,
        record: RewardRecord,
        chosen_scores: torch.Tensor,
        rejected_scores: torch.Tensor,
        margin: torch.Tensor,
    ) -> torch.Tensor:
        """
        Stage *pair losses*: −log σ(Δ).

        Args:
            record ([`~papertrl.trainers.reward.record.RewardRecord`]):
                The batch.
            chosen_scores, rejected_scores, margin (`torch.Tensor` of shape `(pairs,)`):
                From the stages before.

        Returns:
            `torch.Tensor` of shape `(pairs,)`.
        """
        return -logsigmoid(margin)

    def pair_weights(self, record: RewardRecord) -> torch.Tensor | None:
        """Stage *pair weights*: what multiplies every pair's loss, `(pairs,)`, detached, or `None` for 1."""
        return None

    def extra_terms(self, record: RewardRecord) -> list[LossTerm]:
        """
        Stage *extra terms*: terms beside the losses of pairs. Append to what `super()` returns.

        Returns:
            `list` of [`LossTerm`] with one value per pair or per row; with `center_rewards_coefficient`, the squared
            sum of a pair's rewards. Every rank must return the same terms.
        """
        coef = self.args.center_rewards_coefficient
        if coef is None:
            return []
        chosen, rejected = record.rewards.chunk(2)
        return [LossTerm("center", (chosen + rejected) ** 2, coef=coef)]

    # --- The step -----------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # The pass and the metrics are TRL's; where somebody acts, TRL's loss gives way to that of the stages
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.acting_in(*LOSS_STAGES) or self.chooses_rows:
            loss = self._staged_loss(
                RewardRecord(
                    inputs["input_ids"], inputs["attention_mask"], outputs.logits.squeeze(-1), inputs.get("margin")
                )
            )
        return (loss, outputs) if return_outputs else loss

    def _staged_loss(self, record: RewardRecord) -> torch.Tensor:
        chosen_scores, rejected_scores = self.scores(record)
        margin = self.margin(record, chosen_scores, rejected_scores)
        values = self.pair_losses(record, chosen_scores, rejected_scores, margin)
        weights = self.pair_weights(record)
        pairs = LossTerm("pair", values if weights is None else values * weights)
        if pairs.values.shape != margin.shape:
            raise ValueError(
                f"The losses and weights of pairs must be of shape {tuple(margin.shape)}, got "
                f"{tuple(pairs.values.shape)}."
            )
        self.observe_rows(pairs.values)
        terms = [pairs, *sorted(self.extra_terms(record), key=attrgetter("name"))]
        for term in terms:
            self.log_mean(f"loss/{term.name}", term.sum(), term.count())
        return mean_of_terms(terms, self.accelerator)
