"""Accepted values of config fields: of a method's own, which declare them, and of those that come from TRL."""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Valid:
    """
    Accepted values of a field: bounds (`ge`, `gt`, `le`, `lt`) or an explicit tuple of `choices`.

    `optional` adds `None`, `besides` single values outside the bounds; `whole` demands an integer.
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    choices: tuple | None = None
    optional: bool = False
    besides: tuple = ()
    whole: bool = False

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.choices is not None:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, Integral if self.whole else Real):
            return False
        if value in self.besides:
            return True
        return (
            math.isfinite(value)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        if self.choices is not None:
            text = "one of " + ", ".join(repr(choice) for choice in self.choices)
        else:
            low = f"[{self.ge}" if self.ge is not None else f"({self.gt}" if self.gt is not None else "(-inf"
            high = f"{self.le}]" if self.le is not None else f"{self.lt})" if self.lt is not None else "inf)"
            text = f"{'an integer' if self.whole else 'a number'} in {low}, {high}"
        return " or ".join([text, *map(str, self.besides), *(["None"] if self.optional else [])])


# More steps, rows or tokens than anybody counts: beyond it, a setting is a slip of the pen
MOST = 10**9
_count = Valid(ge=1, le=MOST, whole=True)
_from_zero = Valid(ge=0, le=MOST, whole=True)
_not_negative = Valid(ge=0)
_positive = Valid(gt=0)
_share = Valid(ge=0, le=1)
_seed = Valid(ge=0, lt=2**32, whole=True)
# A bound that is never reached
_cap = Valid(gt=0, besides=(math.inf,), optional=True)


def _or_none(valid: Valid) -> Valid:
    return replace(valid, optional=True)


_length = {"max_length": _or_none(_count), "dataset_num_proc": _or_none(_count)}
_reference = {"ref_model_mixup_alpha": _share, "ref_model_sync_steps": _count}
# What TRL, transformers and PEFT take without a word, or fail on late, by the class that introduces the field. A
# method that redeclares one with its own range is held to that.
RANGES: Mapping[str, Mapping[str, Valid]] = {
    "TrainingArguments": {
        "max_steps": replace(_count, besides=(-1,)),
        "learning_rate": _not_negative,
        "weight_decay": _not_negative,
        "warmup_steps": Valid(ge=0, le=MOST),
        "adam_beta1": Valid(ge=0, lt=1),
        "adam_beta2": Valid(ge=0, lt=1),
        "adam_epsilon": _not_negative,
        # 0 and None leave gradients as they are
        "max_grad_norm": Valid(ge=0, besides=(math.inf,), optional=True),
        "label_smoothing_factor": Valid(ge=0, lt=1),
        "neftune_noise_alpha": _or_none(_not_negative),
        "per_device_train_batch_size": _count,
        "per_device_eval_batch_size": _count,
        "gradient_accumulation_steps": _count,
        "eval_accumulation_steps": _or_none(_count),
        "eval_delay": _not_negative,
        # 0 keeps all checkpoints, as None
        "save_total_limit": _or_none(_from_zero),
        "seed": _seed,
        "data_seed": _or_none(_seed),
        "dataloader_num_workers": Valid(ge=0, le=4096, whole=True),
        "dataloader_prefetch_factor": _or_none(_count),
        "ddp_timeout": _positive,
    },
    "GRPOConfig": _reference
    | {
        "num_generations": Valid(ge=2, le=MOST, whole=True),
        "num_generations_eval": _or_none(_count),
        "max_completion_length": _or_none(_count),
        "generation_batch_size": _or_none(_count),
        "steps_per_generation": _or_none(_count),
        "num_iterations": _count,
        "temperature": _positive,
        "top_p": Valid(gt=0, le=1),
        "top_k": Valid(ge=0, le=MOST, besides=(-1,), whole=True, optional=True),
        "min_p": _or_none(_share),
        "repetition_penalty": _positive,
        "beta": _not_negative,
        "epsilon": _not_negative,
        "epsilon_high": replace(_cap, gt=None, ge=0),
        "delta": _cap,
        "sapo_temperature_neg": _positive,
        "sapo_temperature_pos": _positive,
        "top_entropy_quantile": _share,
        "importance_sampling_level": Valid(choices=("token", "sequence")),
        "multi_objective_aggregation": Valid(choices=("sum_then_normalize", "normalize_then_sum")),
        "scale_rewards": Valid(choices=("group", "batch", "none", True, False)),
        "loss_type": Valid(choices=("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")),
        "off_policy_mask_threshold": _or_none(_not_negative),
        "max_tool_calling_iterations": _or_none(_from_zero),
        "num_completions_to_print": _or_none(_from_zero),
        "vllm_mode": Valid(choices=("server", "colocate")),
        "vllm_gpu_memory_utilization": Valid(gt=0, le=1),
        "vllm_tensor_parallel_size": _count,
        "vllm_max_model_length": _or_none(_count),
        "vllm_server_port": Valid(ge=1, lt=2**16, whole=True),
        "vllm_group_port": Valid(ge=1, lt=2**16, whole=True),
        "vllm_server_timeout": _positive,
        "vllm_importance_sampling_clip_max": _cap,
        "vllm_importance_sampling_clip_min": _or_none(_not_negative),
    },
    "DPOConfig": _reference
    | _length
    | {
        "beta": _not_negative,
        "label_smoothing": Valid(ge=0, lt=1),
        "ld_alpha": _or_none(_share),
        "discopop_tau": _positive,
        "precompute_ref_batch_size": _or_none(_count),
        "truncation_mode": Valid(choices=("keep_start", "keep_end")),
    },
    "SFTConfig": _length | {"truncation_mode": Valid(choices=("keep_start", "keep_end"))},
    "RewardConfig": _length | {"center_rewards_coefficient": _or_none(_not_negative)},
    "ModelConfig": {
        "lora_r": _count,
        "lora_alpha": _count,
        "lora_dropout": Valid(ge=0, lt=1),
    },
}


def check_ranges(config: Any) -> None:
    """
    Check every field of a config against its range: the declared one, else that of [`RANGES`].

    Args:
        config (dataclass instance):
            A config of this library or of TRL.

    Raises:
        `ValueError`: naming the field, the value and what is accepted.
    """
    # A composed config is held to the ranges of all that it was made of
    parts = filter(is_dataclass, (type(config), *getattr(config, "combined", ())))
    declared = ((cls, f) for cls in parts for f in fields(cls))
    for cls, f in declared:
        value, valid = getattr(config, f.name), range_of(cls, f)
        if valid is not None and not valid.accepts(value):
            raise ValueError(f"`{f.name}` must be {valid}, got {value!r}.")
        if valid is None and any(isinstance(x, float) and not math.isfinite(x) for x in _items(value)):
            raise ValueError(f"`{f.name}` must be finite, got {value!r}.")
    if hasattr(config, "max_steps"):
        _check_schedule(config)


def range_of(cls: type, f: Field) -> Valid | None:
    """What a field of a config class accepts: as it declares, else as [`RANGES`] has it."""
    return f.metadata.get("valid") or _from_trl(cls).get(f.name)


@lru_cache
def _from_trl(cls: type) -> dict[str, Valid]:
    found: dict[str, Valid] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith(("trl.", "transformers.")):
            found |= RANGES.get(base.__name__, {})
    return found


def _items(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _check_schedule(config: Any) -> None:
    """Check what is counted in steps, or, below 1, as a share of them."""
    steps = {"logging_steps": config.logging_strategy, "save_steps": config.save_strategy}
    for name, strategy in steps.items():
        value = getattr(config, name)
        if strategy == "steps" and not (_positive.accepts(value) and value <= MOST):
            raise ValueError(
                f"`{name}` must be a number above 0, below 1 a share of all steps, got {value!r}. "
                f"`{name.removesuffix('steps')}strategy` 'no' turns it off."
            )
    if not _or_none(Valid(ge=0, le=MOST)).accepts(config.eval_steps):
        raise ValueError(f"`eval_steps` must be {_or_none(Valid(ge=0, le=MOST))}, got {config.eval_steps!r}.")
    epochs = Valid(gt=0, le=MOST)
    if config.max_steps < 0 and not epochs.accepts(config.num_train_epochs):
        raise ValueError(
            f"`num_train_epochs` must be {epochs} where `max_steps` is -1, got {config.num_train_epochs!r}."
        )
