"""The stages of a preference step: what a method may change."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from ...losses.preference.pair_losses import call_pair_loss
from ...losses.preference.scores import divergence_score, sequence_logps, wpo_weights
from ...losses.terms import LossTerm
from .collation import model_inputs_of
from .record import PreferenceRecord
from .sampling import SampledCompletions
from .services import PreferenceServices


class PreferenceStages(PreferenceServices):
    """
    Mixin of [`~papertrl.PreferenceTrainer`], which says how the stages follow on each other. A method overrides those
    that it declares, and the hooks at the end; what they may call is in
    [`~papertrl.trainers.preference.services.PreferenceServices`].
    """

    # --- Stages -------------------------------------------------------------------------------------------------

    def prepare(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        """
        Stage *prepare*: columns that a method adds to rows of pairs, once.

        Args:
            dataset (`Dataset` or `IterableDataset`):
                Rows as TRL prepares them: `prompt_ids`, `chosen_ids`, `rejected_ids`, and all columns of the dataset.
            name (`str`):
                `"train"`, `"eval"` or what the evaluation dataset is called.

        Returns:
            The rows with further columns; extend through `super()`. [`carried`] names those that reach `collate`.
        """
        return dataset

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Stage *collate*: tensors of what [`carried`] names, for one batch.

        Args:
            examples (`list[dict]`):
                Rows of the batch.

        Returns:
            `dict[str, torch.Tensor]`: one entry per pair each; extend through `super()`, under names that begin with
            the method's. They arrive in `record.extras`.
        """
        return {}

    def sample(self, inputs: dict[str, Any]) -> dict[str, SampledCompletions]:
        """
        Stage *sample candidates*: completions drawn from the current policy, before its gradient-carrying pass.

        Args:
            inputs (`dict[str, Any]`):
                The collated batch.

        Returns:
            `dict[str, SampledCompletions]`: by method name; extend through `super()`. They arrive in `record.samples`.
        """
        return {}

    def statistics(self, model: torch.nn.Module, inputs: dict[str, Any]) -> PreferenceRecord:
        """
        Stage *statistics*: one pass of the policy and, unless precomputed, one of the reference over all rows.

        Args:
            model (`torch.nn.Module`):
                The policy, as wrapped for training.
            inputs (`dict[str, Any]`):
                The collated batch.
        """
        completion_mask = inputs["completion_mask"]
        shift_mask = completion_mask[:, 1:]
        model_inputs = model_inputs_of(inputs)
        # Vision-language wrappers read this as an argument of the forward pass only
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self.score_tokens(model, {**model_inputs, **router}, completion_mask)
        if self.precompute_ref_logps:
            ref_per_token_logps = None
            ref_logps = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        else:
            ref_per_token_logps = self.reference_logps(model_inputs, completion_mask)
            ref_logps = sequence_logps(ref_per_token_logps, shift_mask, self.ld_alpha)
        return PreferenceRecord(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            completion_mask=completion_mask,
            per_token_logps=outputs["log_probs"],
            logps=sequence_logps(outputs["log_probs"], shift_mask, self.ld_alpha),
            ref_logps=ref_logps,
            ref_per_token_logps=ref_per_token_logps,
            entropy=outputs["entropy"].detach(),
            mean_logits=outputs["mean_logits"].detach(),
            is_top1=outputs["is_top1"],
            log_sum_sq_probs=outputs["log_sum_sq_probs"].detach() if self.use_weighting else None,
            aux_loss=outputs["aux_loss"] if self.aux_loss_enabled else None,
            extras=inputs.get("extras", {}),
        )

    def scores(self, record: PreferenceRecord) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage *scores*: what the margin compares, of chosen and rejected completions, `(pairs,)` each."""
        scores = divergence_score(record.logratios, self.f_divergence_type, self.f_alpha_divergence_coef)
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def margin(
        self, record: PreferenceRecord, chosen_scores: torch.Tensor, rejected_scores: torch.Tensor
    ) -> torch.Tensor:
        """Stage *margin*: Δ of every pair, `(pairs,)`, not yet multiplied by β."""
        return chosen_scores - rejected_scores

    def pair_losses(
        self,
        record: PreferenceRecord,
        chosen_scores: torch.Tensor,
        rejected_scores: torch.Tensor,
        margin: torch.Tensor,
    ) -> list[LossTerm]:
        """
        Stage *pair losses*: one term per entry of `loss_type`, weighted by `loss_weights`.

        Args:
            record ([`~papertrl.trainers.preference.record.PreferenceRecord`]):
                The batch.
            chosen_scores, rejected_scores, margin (`torch.Tensor` of shape `(pairs,)`):
                From the stages before.

        Returns:
            `list[LossTerm]`: with values of shape `(pairs,)`.
        """
        available: dict[str, Any] = {
            "chosen_scores": chosen_scores,
            "rejected_scores": rejected_scores,
            "margin": margin,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "discopop_tau": self.args.discopop_tau,
        }
        available["chosen_mask"], _ = record.shift_completion_mask.chunk(2)
        for name, rows in {
            "logratios": record.logratios,
            "logps": record.logps,
            "per_token_logps": record.per_token_logps,
            # TRL counts all completion tokens here, also one at position 0, which nothing predicts
            "lengths": record.completion_mask.sum(1),
        }.items():
            available[f"chosen_{name}"], available[f"rejected_{name}"] = rows.chunk(2)
        available["ref_chosen_logps"], available["ref_rejected_logps"] = record.ref_logps.chunk(2)
        return [
            LossTerm(name, call_pair_loss(name, available), coef=weight)
            for name, weight in zip(self.loss_types, self.loss_weights, strict=True)
        ]

    def smoothing(self, record: PreferenceRecord) -> torch.Tensor | None:
        """
        Stage *smoothing*: α, how likely the label of each pair is wrong, `(pairs,)` in [0, 1], or `None` for 0.

        Every loss of a pair becomes (1 − α)·ℓ(chosen, rejected) + α·ℓ(rejected, chosen).
        """
        return None

    def pair_weights(self, record: PreferenceRecord) -> torch.Tensor | None:
        """Stage *pair weights*: what multiplies every pair's losses, `(pairs,)`, or `None` for 1."""
        if not self.use_weighting:
            return None
        return wpo_weights(record.per_token_logps, record.log_sum_sq_probs, record.shift_completion_mask)

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        """
        Stage *extra terms*: terms beside the pair losses; extend through `super()`.

        Args:
            model (`torch.nn.Module`):
                The policy, as wrapped for training: for [`score_sequences`].
            record ([`~papertrl.trainers.preference.record.PreferenceRecord`]):
                The batch.

        Returns:
            `list[LossTerm]`: each logged as `loss/{name}`. Every rank must return the same terms.
        """
        return []

    # --- Hooks --------------------------------------------------------------------------------------------------

    @classmethod
    def dataset_formats(cls, args: Any) -> tuple[str, ...]:
        """
        Formats of [`~papertrl.data.FORMATS`] that the training dataset may have under the config `args`, the best
        first: a job converts to them. Extend through `super()`.
        """
        return ("prompts",) if args.online_iterations > 0 else ("pairs",)

    def as_pairs(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Rows with `chosen` and `rejected`, before they are tokenized, from a dataset of another kind."""
        return dataset

    def carried(self) -> list[str]:
        """Columns of prepared rows that the stage *collate* reads. Extend through `super()`."""
        return []

    def set_up_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the groups of a new optimizer, in place: their parameters and learning rates."""

    def check_checkpoint(self, folder: Path) -> None:
        """
        Check that a checkpoint has what the method needs to go on; its files are whole.

        Raises:
            `ValueError`: naming what is missing.
        """

    def after_training(self) -> None:
        """Training has ended, and its metrics are logged. The model may still be changed."""
