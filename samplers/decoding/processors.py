"""What components of the slot *decoding* have in common: their processors, and that they need our rollout loop."""

from typing import Any

from torch import Tensor
from transformers import LogitsProcessor, TrainingArguments

from ...core.declaration import Method
from ...core.stages import remedy


class RowProcessor(LogitsProcessor):
    """A processor that keeps something for each row, and is told by the rollout loop which rows there are."""

    def begin(self, prompt_ids: Tensor, attention_mask: Tensor | None) -> None:
        """
        Rows are the prompts, before any of them is repeated.

        Args:
            prompt_ids (`torch.Tensor` of shape `(prompts, width)`):
                Padded on the left.
            attention_mask (`torch.Tensor` of shape `(prompts, width)`, *optional*):
                1 for tokens, 0 for padding; `None` without padding.
        """

    def select(self, rows: Tensor) -> None:
        """Keep, or repeat, the rows at `rows`."""


def check_config(args: Any, method: Method) -> None:
    """
    Check that a trainer samples by the rollout loop of this library, which the component `method` needs.

    Args:
        args (config):
            The component's own config, of which nothing is known, or that of a trainer.
        method ([`~papertrl.core.declaration.Method`]):
            The component's declaration.

    Raises:
        `ValueError`: naming the option that stands in the way.
    """
    if not isinstance(args, TrainingArguments):
        return
    without = f"or set `{remedy(method.neutral)}`."
    for name, value in (
        ("use_vllm", False),
        ("use_transformers_continuous_batching", False),
        ("fast_rollouts", True),
    ):
        if getattr(args, name) is not value:
            raise ValueError(
                f"Component '{method.name}' needs the rollout loop of this library: `{name}` must be {value}, got "
                f"{not value}. Change it, {without}"
            )


def check_trainer(trainer: Any, method: Method) -> None:
    """
    Check that nothing samples in place of the rollout loop.

    Raises:
        `ValueError`: naming `rollout_func`, if there is one.
    """
    if trainer.rollout_func is not None:
        raise ValueError(
            f"`rollout_func` samples by itself, where component '{method.name}' has no effect. Leave it out, or set "
            f"`{remedy(method.neutral)}`."
        )


def check_sampled(args: Any, method: Method, field: str) -> None:
    """
    Check, after sampling, that the rollout loop supports the model.

    Args:
        args (config):
            That of the trainer, whose loop switches `fast_rollouts` off where it does not.
        method ([`~papertrl.core.declaration.Method`]):
            The component's declaration.
        field (`str`):
            Field of its config that turns it off.

    Raises:
        `ValueError`: naming the field.
    """
    if not args.fast_rollouts:
        raise ValueError(
            f"`{field}` must be {method.neutral[field]:g} with this model, which the rollout loop of this library "
            f"does not support, got {getattr(args, field)}."
        )
