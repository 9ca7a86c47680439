"""The preference family's base: `DPOTrainer`, opened into stages that methods override."""

import warnings
from contextlib import contextmanager
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.dpo_trainer import global_then_local_main_first
from trl.trainer.utils import use_adapter

from ...core.configuration import MethodConfigMixin, method_config, method_field
from ...core.family import PREFERENCE
from ...losses.preference.pair_losses import call_pair_loss
from ...losses.preference.scores import divergence_score, sequence_logps, wpo_weights
from ...losses.terms import LossTerm
from ..method import MethodTrainer
from ..shared_prefix import SharesPrompts
from .collation import CarryingCollator
from .record import PreferenceRecord
from .rounds import PreferenceRounds
from .sampling import SampledCompletions
from .sharing import pair_inputs

# First half of the SHA-256 of the source of what this family relies on in TRL; tests/test_pinned.py
PINNED = {
    "trl.trainer.dpo_trainer.DPOTrainer.__init__": "632f447c71dcb04361800303be2192d8",
    "trl.trainer.dpo_trainer.DPOTrainer._compute_loss": "5e58a1699e0d76cd093095fa24cfe6ca",
    "trl.trainer.dpo_trainer.DPOTrainer.compute_loss": "c453890e84beb4cb26a59d98dc6c98d0",
    "trl.trainer.dpo_trainer.DPOTrainer.compute_ref_log_probs": "90611af9cbadb8ecfe0152f237177bea",
    "trl.trainer.dpo_trainer.DPOTrainer.log": "e80e122cfe5fd8ad2b36edb3fe106ed2",
    "trl.trainer.dpo_trainer.DataCollatorForPreference.torch_call": "0b8bb4c294bf8420e407a8ba9fa616ec",
    "trl.trainer.utils.add_fused_lm_head": "422d009f04b66659982f9545a90d560b",
    "trl.trainer.utils.use_adapter": "edd0e493f99fa68595b34e5f8e26b7b1",
    "trl.trainer.utils.flush_left": "8454fdab9ffeacb418d44f224eef1a1f",
    "trl.models.utils.disable_gradient_checkpointing": "1f3a5e7ca9cb59025b228c02d9e823f9",
    "trl.models.utils.unwrap_model_for_generation": "583d1303c5c55405c0c7b62819e64a19",
    "transformers.trainer.Trainer._run_epoch": "31aff00f34c302a241b458727e59ae4b",
    "transformers.trainer.Trainer.get_batch_samples": "0b3727386f73f67053b12b91e01c6967",
    "trl.data_utils.common_prefix_length": "34e85554d52b8011c30a25cca000048c",
    "trl.trainer.utils.pad": "5b5cbf5245d686e0d2530e5130eaf2b6",
    "trl.distributed.DistributedBackend": "df5f1ebf26636f63193beaf5e23301d4",
}

_NON_MODEL_KEYS = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "extras")


@method_config
class PreferenceConfig(MethodConfigMixin, DPOConfig):
    """Configuration of [`PreferenceTrainer`]: that of [`~trl.DPOTrainer`] and what every preference method shares."""

    share_prompts: bool = method_field(
        True,
        "Whether the prompt of a pair is computed once for both completions, and completions without their padding. "
        "Same log-probabilities and gradients as TRL's, up to rounding.",
    )
    online_iterations: int = method_field(
        0,
        "Iterations of the online loop: in each, completions of the dataset's prompts are sampled, judged and paired, "
        "and an equal share of the optimizer steps trains on them. 0 trains on the dataset's pairs.",
        ge=0,
    )
    online_num_prompts: int | None = method_field(
        None, "Prompts per iteration. Unset, the dataset is divided evenly among the iterations.", ge=1
    )
    online_num_samples: int = method_field(2, "Completions sampled per prompt.", ge=1)
    online_max_new_tokens: int = method_field(256, "Longest sampled completion, in tokens.", ge=1)
    online_temperature: float = method_field(1.0, "Temperature of sampling.", gt=0.0)
    online_top_p: float = method_field(1.0, "Nucleus of sampling: probability mass that is kept.", gt=0.0, le=1.0)
    online_top_k: int = method_field(0, "Number of most likely tokens to sample from; 0 for all.", ge=0)
    online_batch_size: int = method_field(64, "Rows per forward of sampling and of reward models, per device.", ge=1)
    online_reference: str = method_field(
        "initial",
        "Reference model of an iteration: `initial`, as given; `previous`, the policy with which the iteration "
        "begins; or `ema`, an average over such policies that each iteration updates.",
        choices=("initial", "previous", "ema"),
    )
    online_reference_decay: float = method_field(
        0.9, "With `online_reference='ema'`, weight of the reference against the policy.", ge=0.0, le=1.0
    )
    online_accumulate: bool = method_field(False, "Whether pairs of earlier iterations are trained on as well.")
    online_reward_weights: list[float] | None = method_field(
        None, "Weight of each reward function in a completion's score. Defaults to 1 each."
    )
    check_records: bool = method_field(
        False,
        "Whether to check the values of every preference record, not only its shapes. For debugging: it waits for the "
        "device once per batch.",
    )

    def validate(self) -> None:
        super().validate()
        if self.online_iterations == 0:
            return
        if 0 < self.max_steps < self.online_iterations:
            raise ValueError(
                f"`online_iterations` must be at most `max_steps` ({self.max_steps}), got {self.online_iterations}."
            )
        if self.precompute_ref_log_probs:
            raise ValueError(
                "`precompute_ref_log_probs` must be False with `online_iterations` > 0, got True: the pairs do not "
                "exist yet."
            )
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"`online_iterations={self.online_iterations}` samples from whole prompts and needs `truncation_mode="
                f"'keep_start'`, got {self.truncation_mode!r}, which cuts the prompt."
            )


class PreferenceTrainer(PreferenceRounds, MethodTrainer, SharesPrompts, DPOTrainer):
    """
    [`~trl.DPOTrainer`] whose step is a sequence of stages. By itself it trains as its parent does: to the bit with
    `share_prompts` off, up to rounding with it on, as it is by default.

    In the order in which data flows:

    | stage | method to override | input → output |
    |---|---|---|
    | prepare | `prepare` | tokenized rows of pairs → the same with further columns |
    | collate | `collate` | rows of a batch → tensors of these columns |
    | sample candidates | `sample` | batch → completions of the current policy, by method name |
    | statistics | `statistics` | batch → `PreferenceRecord` |
    | scores | `scores` | record → scores of chosen and rejected `(pairs,)` each |
    | margin | `margin` | scores → Δ `(pairs,)` |
    | pair losses | `pair_losses` | record, scores, Δ → one term per `loss_type`, values `(pairs,)` |
    | smoothing | `smoothing` | record → probabilities `(pairs,)` that the labels are wrong, or `None` for 0 |
    | pair weights | `pair_weights` | record → weights `(pairs,)` or `None` |
    | extra terms | `extra_terms` | record → named terms |

    Every value stays per pair until [`reduce_terms`], which takes means, weights and adds. `sample` and `extra_terms`
    act in evaluation too unless a method says otherwise.

    With `online_iterations` > 0, the pairs are made of the policy's own completions of the dataset's prompts; see
    [`~papertrl.trainers.preference.rounds.PreferenceRounds`] for the stages of that loop.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`PreferenceConfig`] or a [`~trl.DPOConfig`].
        reward_funcs (`str`, `~transformers.PreTrainedModel`, `Callable`, or a list of these, *optional*):
            Score sampled completions, as in [`~trl.GRPOTrainer`]: functions with TRL's signature, sequence
            classifiers with one label, or ids or folders of such.
        judge (`Callable`, *optional*):
            Pairwise preference model instead: (prompts, firsts, seconds) → P(first ≻ second), lists of texts or of
            messages in and a list of numbers in [0, 1] out. It is asked in both orders.
        reward_processing_classes (`~transformers.PreTrainedTokenizerBase` or a list, *optional*):
            Tokenizers of the reward models.

    Raises:
        `ValueError`: if the dataset lacks a column, or the online loop has nobody to judge, or two that do.
    """

    family = PREFERENCE
    stages = {
        "columns": ("needed_columns", "dataset_formats"),
        "choose_prompts": ("choose_prompts",),
        "propose": ("propose",),
        "judge": ("judge", "needs_scores"),
        "pair": ("pair",),
        "select_pairs": ("select_pairs",),
        "prepare": ("prepare",),
        "collate": ("carried", "collate"),
        "sample": ("sample",),
        "statistics": ("statistics",),
        "scores": ("scores",),
        "margin": ("margin",),
        "pair_losses": ("pair_losses",),
        "smoothing": ("smoothing",),
        "pair_weights": ("pair_weights",),
        "extra_terms": ("extra_terms",),
        "after_backward": ("after_backward",),
        "before_update": ("before_update",),
    }
    hooks = (
        *MethodTrainer.hooks,
        "check_online",
        # For ofs_dpo and irpo, until the base has services for them
        "log_metric",
        "create_optimizer",
        "_load_from_checkpoint",
        "reference_logps",
        "_compute_loss",
        "pair_terms",
        "training_step",
        "train",
        "_prepare_dataset",
    )
    config_class = PreferenceConfig
    _tag_names = ["trl", "papertrl", "dpo"]

    def __init__(
        self,
        model,
        ref_model=None,
        args=None,
        *trl_args,
        reward_funcs=None,
        judge=None,
        reward_processing_classes=None,
        stages=None,
        **trl_kwargs,
    ):
        given = self.trl_arguments(DPOTrainer, model, ref_model, args, *trl_args, stages=stages, **trl_kwargs)
        args, dataset = given["args"], given.get("train_dataset")
        self.check_online(dataset, reward_funcs, judge)
        # What TRL must leave as it is
        self._prompts = dataset if args.online_iterations > 0 else None
        super().__init__(**given)
        if args.online_iterations > 0:
            self.set_up_online(reward_funcs, judge, reward_processing_classes)
        if self.carried():
            if self._is_vision_dataset:
                raise ValueError(
                    f"{[m.name for m in self.methods]} need the columns {self.carried()} of prepared rows, and "
                    "datasets with images are prepared batch by batch. Use a dataset without images."
                )
            self.data_collator = CarryingCollator(self.data_collator, self.collate)
        fields = ("log_probs", "entropy", "mean_logits", "is_top1")
        self._set_up_sharing(1.0, False, (*fields, "log_sum_sq_probs") if self.use_weighting else fields)
        self.attach_slots()

    # --- Rows ---------------------------------------------------------------------------------------------------

    @classmethod
    def dataset_formats(cls, args: Any) -> tuple[str, ...]:
        """
        Formats of [`~papertrl.data.FORMATS`] that the training dataset may have under the config `args`, the best
        first: a job converts to them. Extend through `super()`.
        """
        return ("prompts",) if args.online_iterations > 0 else ("pairs",)

    def carried(self) -> list[str]:
        """Columns of prepared rows that the stage *collate* reads. Extend through `super()`."""
        return []

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        if dataset is self._prompts:
            return dataset
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        with global_then_local_main_first():
            return self.prepare(dataset, dataset_name)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in self.carried() if name not in self._signature_columns]

    def compute_ref_log_probs(self, model, inputs):
        return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "extras"})

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
        model_inputs = {k: v for k, v in inputs.items() if k not in _NON_MODEL_KEYS}
        # Vision-language wrappers read this as an argument of the forward pass only
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self._score(model, {**model_inputs, **router}, completion_mask)
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

    # --- Services -----------------------------------------------------------------------------------------------

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
            return self._score(model, model_inputs, completion_mask)["log_probs"]
        if role == "reference":
            return self.reference_logps(model_inputs, completion_mask)
        raise ValueError(f"`role` must be 'policy' or 'reference', got {role!r}.")

    def reference_logps(self, model_inputs: dict[str, Any], completion_mask: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of completion tokens under the reference, `(rows, length − 1)`; without gradient."""
        with self.reference_model() as reference:
            return self._score(reference, model_inputs, completion_mask)["log_probs"]

    @contextmanager
    def reference_model(self):
        """Yield the model that acts as reference while the context is active, with gradients off."""
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.ref_model is None and is_peft_model(self.model):
                unwrapped = self.accelerator.unwrap_model(self.model)
                with use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None):
                    yield self.model
            else:
                yield self.ref_model

    def _score(
        self, model: torch.nn.Module, model_inputs: dict[str, Any], completion_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        if self._shares_prompts and model_inputs.keys() <= {"input_ids", "attention_mask"}:
            inputs, place = pair_inputs(**model_inputs, completion_mask=completion_mask)
            if inputs is not None:
                return place(model(**inputs).scores)
        labels = model_inputs["input_ids"].masked_fill(completion_mask == 0, -100)
        outputs = model(**model_inputs, labels=labels, use_cache=False, fused_lm_head=True)
        time = labels.shape[1] - 1
        # Prompt-learning adapters put virtual tokens in front
        return {k: v[:, -time:] if v is not None and v.ndim == 2 else v for k, v in outputs.items()}

    # --- The step -----------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs, return_outputs):
        samples = self.sample(inputs)
        record = self.statistics(model, inputs)
        record.samples = samples
        if self.args.check_records:
            record.check_values()
        pair_losses = self.pair_terms(record)
        extra_terms = self.extra_terms(model, record)

        loss = pair_loss = self.reduce_terms(pair_losses)
        if record.aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * record.aux_loss
        if extra_terms:
            loss = loss + self.reduce_terms(extra_terms)
            self.log_mean("loss/pair", pair_loss, torch.ones_like(pair_loss))
            for term in extra_terms:
                self.log_mean(f"loss/{term.name}", term.sum(), term.count())
        self._log_tokens(record)
        self._log_rewards(record)
        if not return_outputs:
            return loss
        warnings.warn(
            "`return_outputs=True` and the logits it passes to `compute_metrics` are deprecated in TRL; they cost a "
            "further forward pass.",
            FutureWarning,
            stacklevel=2,
        )
        model_inputs = {k: v for k, v in inputs.items() if k not in _NON_MODEL_KEYS}
        with torch.no_grad():
            return loss, model(**model_inputs, use_cache=False)

    def pair_terms(self, record: PreferenceRecord) -> list[LossTerm]:
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

    def reduce_terms(self, terms: list[LossTerm]) -> torch.Tensor:
        """
        Sum of the terms' weighted means.

        A term without mask is averaged over this rank's units; a masked one over the units that count on all ranks,
        scaled so that the average of all ranks' losses, and of their gradients, is the global mean. The trainer then
        averages over the micro-batches of a step.

        Args:
            terms (`list[LossTerm]`):
                The same names on every rank.
        """
        loss = sum(term.values.mean() * term.coef for term in terms if term.mask is None)
        masked = [term for term in terms if term.mask is not None]
        if masked:
            counts = self.accelerator.reduce(torch.stack([term.count().float() for term in masked]), reduction="sum")
            counts = counts.clamp(min=1.0) / self.accelerator.num_processes
            loss = loss + sum(term.sum() / count * term.coef for term, count in zip(masked, counts, strict=True))
        return loss

    # --- Metrics ------------------------------------------------------------------------------------------------

    def _log_tokens(self, record: PreferenceRecord) -> None:
        mask = record.shift_completion_mask
        chosen_mask, rejected_mask = mask.chunk(2)
        chosen_logits, rejected_logits = record.mean_logits.chunk(2)
        chosen_is_top1, _ = record.is_top1.chunk(2)
        local = {
            "processed": record.attention_mask.sum(),
            "scored": mask.sum(),
            "chosen": chosen_mask.sum(),
            "rejected": rejected_mask.sum(),
            "entropy": (record.entropy * mask).sum(),
            "logits/chosen": (chosen_logits * chosen_mask).sum(),
            "logits/rejected": (rejected_logits * rejected_mask).sum(),
            "top1": (chosen_is_top1 * chosen_mask).sum(),
        }
        if record.aux_loss is not None:
            local |= {"aux_loss": record.aux_loss.detach(), "ranks": torch.ones_like(record.aux_loss)}
        gathered = self.accelerator.gather_for_metrics(torch.stack([v.float() for v in local.values()])[None])
        total = dict(zip(local, gathered.sum(0), strict=True))

        def log_ratio(name: str, numerator: str, denominator: str) -> None:
            self.log_metric(name, total[numerator] / total[denominator].clamp(min=1))

        log_ratio("entropy", "entropy", "scored")
        log_ratio("logits/chosen", "logits/chosen", "chosen")
        log_ratio("logits/rejected", "logits/rejected", "rejected")
        log_ratio("mean_token_accuracy", "top1", "chosen")
        if record.aux_loss is not None:
            log_ratio("aux_loss", "aux_loss", "ranks")
        if self.model.training:
            # Kept on the device: nothing waits for it until the log is written
            self._total_train_tokens = self._total_train_tokens + total["processed"].long() // self._tp_size
        self._metrics["train" if self.model.training else "eval"]["num_tokens"] = [self._total_train_tokens]

    def _log_rewards(self, record: PreferenceRecord) -> None:
        chosen_rewards, rejected_rewards = (self.beta * record.logratios.detach()).chunk(2)
        chosen_logps, rejected_logps = record.logps.detach().chunk(2)
        per_pair = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": chosen_rewards > rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            # On the scale that the losses see, which methods may have changed
            "rewards/optimized_margins": self.beta * record.margins.detach(),
            "logps/chosen": chosen_logps,
            "logps/rejected": rejected_logps,
        }
        gathered = self.accelerator.gather(torch.stack([v.float() for v in per_pair.values()], dim=1))
        for name, value in zip(per_pair, gathered.mean(0), strict=True):
            self.log_metric(name, value)

    # --- State --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return {**super().method_state(), "num_tokens": int(self._total_train_tokens)}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._total_train_tokens = state["num_tokens"]
