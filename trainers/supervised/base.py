"""The supervised family: TRL's `SFTTrainer` with its loss opened into stages."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ...core.configuration import MethodConfigMixin
from ...core.family import SUPERVISED
from ...core.stages import Off, is_off
from ...losses.divergence import LazyLogits
from ...losses.terms import LossTerm
from ...models.observation import Pass, backbone, lm_head, observe
from ..answering import AnswersPrompts
from ..method import MethodTrainer
from ..reference import as_reference, frozen_copy, keep_adapter
from .record import OPTIONAL_FIELDS, SupervisedRecord

# First half of the SHA-256 of the source of what this family relies on in TRL; tests/test_pinned.py
PINNED = {
    "trl.trainer.sft_trainer.SFTTrainer.__init__": "90b61e42b6900b05ae668cb2aeaee6c8",
    "trl.trainer.sft_trainer.SFTTrainer.compute_loss": "ca448211ff653fe621b45498c79bf4f9",
    "trl.trainer.sft_trainer.SFTTrainer.prediction_step": "2db888fb0567422fe7f2470d6a35e1a6",
    "trl.trainer.sft_trainer.DataCollatorForLanguageModeling.torch_call": "e9f4cd36d5ba7c3c351e5a2ae1d77af8",
    "trl.trainer.utils.FusedCausalLMOutput": "5ccdd6e41dcb9f2c1037b461b852cd0c",
    "trl.trainer.utils.add_fused_lm_head": "422d009f04b66659982f9545a90d560b",
    "trl.trainer.utils.use_adapter": "edd0e493f99fa68595b34e5f8e26b7b1",
    "trl.models.utils.prepare_deepspeed": "86d126e5d92c55d24a93f055b4c21656",
    "trl.models.utils.prepare_fsdp": "80d48284544e7ceb51c094984a8bb375",
    "trl.kernels.chunked_divergence.ChunkedDivergenceFunction": "3920655a8f12b3a4a38258cd412accf4",
    "transformers.trainer.Trainer.get_batch_samples": "0b3727386f73f67053b12b91e01c6967",
}

LOSS_STAGES = ("token_loss", "token_weights", "example_weights", "extra_terms")


@dataclass
class SupervisedConfig(MethodConfigMixin, SFTConfig):
    """Configuration of [`SupervisedTrainer`]: TRL's [`~trl.SFTConfig`]."""


class SupervisedTrainer(MethodTrainer, AnswersPrompts, SFTTrainer):
    r"""
    TRL's [`~trl.SFTTrainer`] with the loss opened into stages; without a method it is that trainer.

    With the labels' log-probabilities \\( \log p_t \\), the stages make one value per label token,

    $$ \ell_t = w_t \, v_{e(t)} \, s_t + \sum_k c_k \, r_{k,t}, $$

    and TRL divides their sum by the number of label tokens in the whole optimizer step. The stages, in this order:

    | stage | returns |
    |---|---|
    | [`token_loss`] | \\( s_t \\), the negative log-likelihood |
    | [`token_weights`] | \\( w_t \\), ones |
    | [`example_weights`] | \\( v_e \\), ones |
    | [`extra_terms`] | the terms \\( r_k \\) with their coefficients \\( c_k \\), none |

    A method overrides the stages that its paper changes, extends what `super()` returns, and names in `needs` those of
    the record's fields that are there on demand only, with the config values under which it does not read them, as in
    `extends`. Each term is logged as `loss/{name}`, its mean per label token without coefficient; the weighted token
    loss is the term `token`. Where nobody acts in a stage of the loss, it is TRL's own.

    Args:
        model (`str`, `~transformers.PreTrainedModel` or `~peft.PeftModel`):
            See [`~trl.SFTTrainer`]. The model as passed, before training, is the reference of methods that need one.
        args ([`SupervisedConfig`], [`~trl.SFTConfig`] or `~transformers.TrainingArguments`, *optional*):
            Given one of the latter two, the fields of the methods take their defaults.
        *trl_args, **trl_kwargs:
            As for [`~trl.SFTTrainer`], in its order.

    Raises:
        `TypeError`: at class creation, if `needs` names a field that is no such one.
        `ValueError`: if the dataset is empty or lacks a column, or if an option takes the loss out of the stages that
            a method needs: `compute_loss_func`, `label_smoothing_factor`, `loss_type="dft"`, context or sequence
            parallelism; and, where a reference is needed, prompt-learning adapters or ZeRO-3 without an adapter.
    """

    family = SUPERVISED
    stages = {
        "columns": ("needed_columns",),
        "token_loss": ("token_loss",),
        "token_weights": ("token_weights",),
        "example_weights": ("example_weights",),
        "extra_terms": ("extra_terms",),
        "after_backward": ("after_backward",),
        "before_update": ("before_update",),
    }
    hooks = (*MethodTrainer.hooks, "needs")
    needs: ClassVar[Mapping[str, Off]] = {}
    config_class = SupervisedConfig
    # Nothing is sampled
    sampled_tokens = 0
    # Of the present optimizer step, on all ranks
    _labels_per_example: torch.Tensor | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        unknown = [name for name in cls.needs if name not in OPTIONAL_FIELDS]
        if unknown:
            raise TypeError(
                f"`{cls.__name__}.needs` names {unknown}, but the fields on demand of a record are {OPTIONAL_FIELDS}."
            )

    def __init__(self, model: Any, args: Any = None, *trl_args: Any, stages: Any = None, **trl_kwargs: Any):
        super().__init__(**self.trl_arguments(SFTTrainer, model, args, *trl_args, stages=stages, **trl_kwargs))
        self.ref_model = None
        if self.acting_in(*LOSS_STAGES):
            self._refuse_unstaged()
        if self.reads("reference", "ref_log_probs"):
            self._refuse_reference()
            if not is_peft_model(self.model):
                self.ref_model = frozen_copy(
                    self.model, self.accelerator, self.is_deepspeed_enabled, self.is_fsdp_enabled
                )
            elif isinstance(model, PeftModel):
                keep_adapter(self.model)
        self.attach_slots()

    @classmethod
    def make_config(cls, args: Any, model: Any) -> Any:
        if isinstance(args, TrainingArguments) and not isinstance(args, SFTConfig):
            # As TRL does; `to_dict` hides the token
            args = cls.config_class(**(args.to_dict() | {"hub_token": args.hub_token}))
        return super().make_config(args, model)

    def _refuse_unstaged(self) -> None:
        parallelism = self.accelerator.parallelism_config
        sharded = parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled)
        refused = {
            "compute_loss_func": (self.compute_loss_func is not None, "Leave it out"),
            "label_smoothing_factor": (self.args.label_smoothing_factor > 0, "Set it to 0"),
            "loss_type='dft'": (
                self.args.loss_type == "dft",
                "Set `loss_type='nll'`; the same weight is `asft_dft_weight_power=1` of the method 'asft'",
            ),
            "parallelism_config": (sharded, "Set `cp_size` and `sp_size` to 1"),
        }
        for name, (active, remedy) in refused.items():
            if active:
                raise ValueError(
                    f"`{name}` computes the loss outside the stages that {self._names()} changes. {remedy}, or use "
                    "the method's neutral setting."
                )

    def _refuse_reference(self) -> None:
        if is_peft_model(self.model) and self.model.active_peft_config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` is `{type(self.model.active_peft_config).__name__}`, whose virtual tokens the "
                f"reference model of {self._names()} does not have. Use an adapter of the weights, for example "
                "`LoraConfig`."
            )
        plugin = self.args.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3 and not is_peft_model(self.model):
            raise ValueError(
                f"`deepspeed` with ZeRO-3 shards the model before {self._names()} can keep a frozen copy of it. Use "
                "ZeRO-2, FSDP, or a `peft_config`, which needs no copy."
            )

    def _names(self) -> str:
        return " + ".join(f"'{name}'" for name in self.acting_in(*LOSS_STAGES))

    @property
    def trained_tokens(self) -> int:
        """Tokens that training has gone through so far."""
        return int(self._total_train_tokens)

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"total_train_tokens": self._total_train_tokens}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._total_train_tokens = state["total_train_tokens"]

    # --- What the methods need ----------------------------------------------------------------------------------

    def reads(self, *fields: str) -> bool:
        """Whether somebody reads one of these fields of a record under the present config, as `needs` says."""
        return any(
            field in fields and not is_off(off, self.args)
            for cls in type(self).__mro__
            for field, off in cls.__dict__.get("needs", {}).items()
        )

    # --- Stages -------------------------------------------------------------------------------------------------

    def token_loss(self, record: SupervisedRecord) -> torch.Tensor:
        """
        Loss of each token.

        Returns:
            `torch.Tensor` of shape `(batch, time - 1)`, with gradient; finite also where there is no label.
        """
        return -record.log_probs

    def token_weights(self, record: SupervisedRecord) -> torch.Tensor:
        """
        Weight of each token's loss. Multiply what `super()` returns.

        Returns:
            `torch.Tensor` of shape `(batch, time - 1)`, detached.
        """
        return torch.ones_like(record.log_probs)

    def example_weights(self, record: SupervisedRecord) -> torch.Tensor:
        """
        Weight of each example's tokens. Multiply what `super()` returns.

        Returns:
            `torch.Tensor` of shape `(record.num_examples,)`, detached.
        """
        return record.log_probs.new_ones(record.num_examples)

    def extra_terms(self, record: SupervisedRecord) -> list[LossTerm]:
        """
        Terms added to the weighted token loss. Append to what `super()` returns.

        Returns:
            `list` of [`LossTerm`] with one value per token, `(batch, time - 1)`. A mask takes tokens out of a term;
            positions without a label are out of it anyway. Like the token loss, a term is divided by the number of
            all label tokens.
        """
        return []

    # --- The step -----------------------------------------------------------------------------------------------

    def per_token_loss(self, record: SupervisedRecord) -> torch.Tensor:
        """Run the stages, log their terms and add them up: `(batch, time - 1)`, 0 where there is no label."""
        weights = self.token_weights(record) * self.example_weights(record)[record.example_ids]
        terms = [
            LossTerm("token", self.token_loss(record) * weights),
            *sorted(self.extra_terms(record), key=attrgetter("name")),
        ]
        count = record.label_mask.sum()
        total = torch.zeros_like(record.log_probs)
        for term in terms:
            if term.values.shape != record.label_mask.shape:
                raise ValueError(
                    f"The loss term '{term.name}' must have one value per token, {tuple(record.label_mask.shape)}, "
                    f"got {tuple(term.values.shape)}."
                )
            mask = record.label_mask if term.mask is None else record.label_mask * term.mask
            values = term.values * mask
            self.log_mean(f"loss/{term.name}", values.sum(), count)
            total = total + term.coef * values
        if self.chooses_rows:
            sums = total.new_zeros(2, record.num_examples)
            sums.index_add_(
                1, record.example_ids.flatten(), torch.stack([total.detach(), record.label_mask]).flatten(1)
            )
            self.observe_rows(sums[0] / sums[1].clamp(min=1))
        return total

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.reads("labels_per_example") and num_labels is not None:
            examples = torch.stack([_count_examples(batch) for batch in batches]).sum().to(device)
            if self.args.average_tokens_across_devices:
                examples = self.accelerator.reduce(examples, reduction="sum")
            self._labels_per_example = torch.as_tensor(num_labels, device=device) / examples.clamp(min=1)
        return batches, num_labels

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if self.acting_in(*LOSS_STAGES) or self.chooses_rows:
            model = self._staged(model)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _staged(self, model: nn.Module) -> Callable[..., Any]:
        # TRL's loss is the sum of −`log_probs` over the step's label count, so the per-token loss takes their place.
        # All the rest of TRL's `compute_loss`, from normalization to metrics, stays TRL's.
        def forward(**inputs: Any) -> Any:
            if not inputs.get("fused_lm_head", False):
                return model(**inputs)
            on_demand = self._reference_pass(inputs) if self.reads("reference", "ref_log_probs") else {}
            observer = observe(backbone(model), Pass.GRADIENT) if self.reads("policy") else nullcontext()
            with observer as observation:
                outputs = model(**inputs)
            if self.reads("policy"):
                on_demand["policy"] = _lazy_logits(model, observation.hidden_states())
            if self.model.training:
                on_demand["labels_per_example"] = self._labels_per_example
            outputs.log_probs = -self.per_token_loss(_make_record(inputs, outputs, on_demand))
            return outputs

        return forward

    def _reference_pass(self, inputs: dict[str, Any]) -> dict[str, Any]:
        model = self.model if self.ref_model is None else self.ref_model
        scored = self.reads("ref_log_probs")
        if not scored:
            # Without labels the fused head has no position to project
            inputs = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
        if "output_router_logits" in inputs:
            inputs = {**inputs, "output_router_logits": False}
        with (
            as_reference(model, self.accelerator.unwrap_model(model)),
            observe(backbone(model), Pass.REFERENCE) as observation,
        ):
            outputs = model(**inputs)
            logits = _lazy_logits(model, observation.hidden_states())
        return {"reference": logits, "ref_log_probs": outputs.log_probs if scored else None}


def _lazy_logits(model: nn.Module, hidden_states: torch.Tensor) -> LazyLogits:
    with lm_head(model) as (weight, bias, logit_scale, softcap):
        return LazyLogits(hidden_states[:, :-1].to(weight.device), weight, bias, logit_scale, softcap)


def _count_examples(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Number of examples of a collated batch that have a label which something predicts."""
    mask = batch["labels"][:, 1:] != -100
    if "seq_idx" in batch:
        return torch.tensor(batch["seq_idx"][:, 1:][mask].unique().numel())
    return mask.any(1).sum()


def _make_record(inputs: dict[str, Any], outputs: FusedCausalLMOutput, on_demand: dict[str, Any]) -> SupervisedRecord:
    batch, time = outputs.log_probs.shape
    if "seq_idx" in inputs:
        example_ids, num_examples = inputs["seq_idx"][:, 1:], inputs["cu_seq_lens_q"].numel() - 1
    else:
        example_ids = torch.arange(batch, device=outputs.log_probs.device).unsqueeze(1).expand(batch, time)
        num_examples = batch
    return SupervisedRecord(
        label_mask=outputs.label_mask,
        log_probs=outputs.log_probs,
        entropy=outputs.entropy.detach(),
        is_top1=outputs.is_top1,
        example_ids=example_ids,
        num_examples=num_examples,
        **on_demand,
    )
