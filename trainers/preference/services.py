"""What the stages of the preference family may call: passes of policy and reference, pair losses, generation."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from ...losses.terms import LossTerm
from ...models.tokenization import end_tokens
from ..packed_forward import FIELDS
from ..packing import pack
from ..reference import REFERENCE_ADAPTER, trainable_kept
from .record import PreferenceRecord
from .sampling import SampledCompletions


class PreferenceServices:
    """Mixin of [`~papertrl.PreferenceTrainer`]; methods call these, and override none of them."""

    # Adapter that is the policy for the time being, beside the trained one
    _other_adapter: str | None = None
    # What the reference says in the evaluation at hand: a list to note it in, or an iterator that says it again
    _reference_passes: list[torch.Tensor] | Iterator[torch.Tensor] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of prompts and completions, also where a processor holds it."""
        return self._tokenizer

    @property
    def has_images(self) -> bool:
        """Whether the datasets hold images."""
        return self._is_vision_dataset

    # --- Scores -------------------------------------------------------------------------------------------------

    def score_sequences(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        completion_mask: torch.Tensor,
        role: Literal["policy", "reference"] = "policy",
        **model_inputs: Any,
    ) -> torch.Tensor:
        """
        Log-probabilities of further sequences, by the same policy and reference that score the pairs.

        Args:
            model (`torch.nn.Module`):
                The policy, as the stages receive it.
            input_ids, attention_mask, completion_mask (`torch.Tensor` of shape `(rows, length)`):
                Right-padded token ids; 1 at real tokens; 1 at the tokens to score.
            role (`str`, *optional*, defaults to `"policy"`):
                `"policy"`, with gradient, or `"reference"`, without: the reference model, the initial copy of a
                retrained adapter, or the base model under the adapter.
            **model_inputs:
                Further inputs of the model, such as pixel values.

        Returns:
            `torch.Tensor` of shape `(rows, length − 1)`, in nats; 0 outside the completion. The policy's is connected
            to the graph even if nothing is scored.
        """
        model_inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_inputs}
        if role == "policy":
            return self.score_tokens(model, model_inputs, completion_mask)["log_probs"]
        if role == "reference":
            return self.reference_logps(model_inputs, completion_mask)
        raise ValueError(f"`role` must be 'policy' or 'reference', got {role!r}.")

    def score_tokens(
        self, model: torch.nn.Module, model_inputs: dict[str, Any], completion_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        Everything that one pass says of completion tokens: what [`score_sequences`] has, as `log_probs`, and the
        per-token fields of the record, each `(rows, length − 1)`; with a mixture of experts `aux_loss`.
        """
        text = model_inputs.keys() <= {"input_ids", "attention_mask"}
        if text and self.shares(model_inputs["input_ids"].shape[1]):
            mask, labels = model_inputs["attention_mask"], completion_mask.bool()
            prompts = (mask - completion_mask).sum(1).cpu()
            # A completion without a token before it has none that predicts its first
            if bool((prompts > 0).all()):
                scores = model(packing=pack(**model_inputs, prompt_lengths=prompts, labels=labels)).scores
                return {name: scores[name][:, 1:] if name in scores else None for name in (*FIELDS, "aux_loss")}
        labels = model_inputs["input_ids"].masked_fill(completion_mask == 0, -100)
        outputs = model(**model_inputs, labels=labels, use_cache=False, fused_lm_head=True)
        time = labels.shape[1] - 1
        # Prompt-learning adapters put virtual tokens in front
        return {k: v[:, -time:] if v is not None and v.ndim == 2 else v for k, v in outputs.items()}

    def reference_logps(self, model_inputs: dict[str, Any], completion_mask: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of completion tokens under the reference, `(rows, length − 1)`; without gradient."""
        if isinstance(self._reference_passes, Iterator):
            return next(self._reference_passes)
        with self.reference_model() as reference:
            logps = self.score_tokens(reference, model_inputs, completion_mask)["log_probs"]
        if self._reference_passes is not None:
            self._reference_passes.append(logps)
        return logps

    @contextmanager
    def reference_model(self) -> Iterator[torch.nn.Module]:
        """Yield the model that acts as reference while the context is active, with gradients off."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is None and is_peft_model(self.model):
                policy = self.accelerator.unwrap_model(self.model)
                name = REFERENCE_ADAPTER if REFERENCE_ADAPTER in policy.peft_config else None
                with trainable_kept(policy), use_adapter(policy, adapter_name=name):
                    yield self.model
            else:
                yield self.ref_model

    # --- Pairs --------------------------------------------------------------------------------------------------

    def pair_statistics(self, model: torch.nn.Module, record: PreferenceRecord, adapter: str) -> PreferenceRecord:
        """
        The stages from *statistics* to *pair weights* on the same batch once more, with another adapter as the policy.

        What is logged meanwhile goes under `{adapter}/`. The reference says the same again, without a pass. For
        methods that train a second adapter: both take gradients, and the optimizer has the parameters of both.

        Args:
            model (`torch.nn.Module`):
                The policy, as the stages receive it.
            record ([`~papertrl.trainers.preference.record.PreferenceRecord`]):
                The batch, as the stages of the step made it.
            adapter (`str`):
                Name of the adapter.

        Returns:
            [`~papertrl.trainers.preference.record.PreferenceRecord`]: with `margins` and `pair_losses`.
        """
        policy = self.accelerator.unwrap_model(self.model)
        active, self._other_adapter = policy.active_adapter, adapter
        with trainable_kept(policy):
            policy.set_adapter(adapter)
            try:
                return self._evaluate_pairs(model, record.inputs, record.samples, iter(record.reference_passes))
            finally:
                self._other_adapter = None
                policy.set_adapter(active)

    def _evaluate_pairs(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        samples: dict[str, SampledCompletions],
        reference_passes: list[torch.Tensor] | Iterator[torch.Tensor],
    ) -> PreferenceRecord:
        """The stages from *statistics* to *pair weights*."""
        self._reference_passes = reference_passes
        try:
            record = self.statistics(model, inputs)
            record.inputs, record.samples = inputs, samples
            if self.args.check_records:
                record.check_values()
            record.pair_losses = self._pair_losses_of(record)
        finally:
            self._reference_passes = None
        if isinstance(reference_passes, list):
            record.reference_passes = reference_passes
        return record

    def _pair_losses_of(self, record: PreferenceRecord) -> list[LossTerm]:
        """The stages from *scores* to *pair weights*: weighted losses of every pair. Sets `record.margins`."""
        chosen_scores, rejected_scores = self.scores(record)
        margin = self.margin(record, chosen_scores, rejected_scores)
        record.margins = margin
        pair_losses = self.pair_losses(record, chosen_scores, rejected_scores, margin)
        alpha = self.smoothing(record)
        if alpha is not None:
            flipped_losses = self.pair_losses(record.flipped(), rejected_scores, chosen_scores, -margin)
            for term, other in zip(pair_losses, flipped_losses, strict=True):
                term.values = torch.lerp(term.values, other.values, alpha)
        weights = self.pair_weights(record)
        if weights is not None:
            for term in pair_losses:
                term.values = term.values * weights
        return pair_losses

    def log_metric(self, name: str, value: torch.Tensor | float) -> None:
        super().log_metric(name if self._other_adapter is None else f"{self._other_adapter}/{name}", value)

    # --- Generation ---------------------------------------------------------------------------------------------

    @contextmanager
    def generation_model(self, source: Literal["policy", "reference"] = "policy") -> Iterator[torch.nn.Module]:
        """Yield the unwrapped policy, or reference, ready to generate."""
        if source == "reference" and self.ref_model is not None:
            with self.reference_model() as reference:
                yield self.accelerator.unwrap_model(reference)
            return
        reference = self.reference_model() if source == "reference" else nullcontext()
        with self.unwrapped_policy() as model, reference, torch.no_grad():
            yield model

    def eos_token_ids(self, model: torch.nn.Module) -> list[int]:
        """Tokens that end a completion."""
        return end_tokens(self.tokenizer, model.generation_config)
