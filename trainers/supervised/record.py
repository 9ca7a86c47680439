"""What the stages of a supervised step share."""

from dataclasses import dataclass, fields

import torch

from ...losses.divergence import LazyLogits


@dataclass
class SupervisedRecord:
    """
    One micro-batch after the forward pass. Column `t` describes the prediction of token `t + 1`.

    Under packing or padding-free training the batch is a single row that holds several examples.

    Args:
        label_mask (`torch.Tensor` of shape `(batch, time - 1)`, `bool`):
            Whether the predicted token is a label, that is, not `-100`.
        log_probs (`torch.Tensor` of shape `(batch, time - 1)`, `float32`):
            Log-probability of the label in nats, with gradient; 0 where there is none.
        entropy (`torch.Tensor` of shape `(batch, time - 1)`):
            Entropy of the next-token distribution in nats, detached; 0 where there is no label.
        is_top1 (`torch.Tensor` of shape `(batch, time - 1)`, `bool`):
            Whether the label is the most likely token; `False` where there is none.
        example_ids (`torch.Tensor` of shape `(batch, time - 1)`, integer):
            Which example of the micro-batch the predicted token belongs to, from 0 to `num_examples - 1`.
        num_examples (`int`):
            Number of examples in the micro-batch.
        policy (`LazyLogits`, *optional*):
            Hidden states and head of the trained model, with gradient.
        reference (`LazyLogits`, *optional*):
            The same of the frozen initial model, without gradient.
        ref_log_probs (`torch.Tensor` of shape `(batch, time - 1)`, `float32`, *optional*):
            Log-probability of the label under the frozen initial model in nats, without gradient; 0 where there is
            none.
        labels_per_example (`torch.Tensor` of shape `()`, *optional*):
            Mean number of labels of those examples of the optimizer step, on all ranks, that have one; `None` outside
            of training.

    The optional fields are there if a method names them in its `needs`.

    Raises:
        `ValueError`: if a shape or dtype is not as stated.
    """

    label_mask: torch.Tensor
    log_probs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    example_ids: torch.Tensor
    num_examples: int
    policy: LazyLogits | None = None
    reference: LazyLogits | None = None
    ref_log_probs: torch.Tensor | None = None
    labels_per_example: torch.Tensor | None = None

    def __post_init__(self):
        shape = self.label_mask.shape
        for name in ("label_mask", "log_probs", "entropy", "is_top1", "example_ids"):
            found = getattr(self, name).shape
            if len(found) != 2 or found != shape:
                raise ValueError(f"`{name}` must be of shape (batch, time - 1) = {tuple(shape)}, got {tuple(found)}.")
        for name in ("policy", "reference"):
            logits = getattr(self, name)
            if logits is not None and logits.hidden.shape[:2] != shape:
                raise ValueError(
                    f"`{name}.hidden` must start with (batch, time - 1) = {tuple(shape)}, "
                    f"got {tuple(logits.hidden.shape)}."
                )
        for name, dtype in {"label_mask": torch.bool, "is_top1": torch.bool, "log_probs": torch.float32}.items():
            found = getattr(self, name).dtype
            if found != dtype:
                raise ValueError(f"`{name}` must be `{dtype}`, got `{found}`.")
        if self.ref_log_probs is not None and self.ref_log_probs.shape != shape:
            raise ValueError(
                f"`ref_log_probs` must be of shape (batch, time - 1) = {tuple(shape)}, "
                f"got {tuple(self.ref_log_probs.shape)}."
            )
        for name in ("entropy", "ref_log_probs"):
            value = getattr(self, name)
            if value is not None and value.requires_grad:
                raise ValueError(f"`{name}` must be detached.")


# Those that are there on demand
OPTIONAL_FIELDS = tuple(field.name for field in fields(SupervisedRecord) if field.default is None)
