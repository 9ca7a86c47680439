"""What the stages of a step of a reward model share."""

from dataclasses import dataclass

import torch


@dataclass
class RewardRecord:
    """
    One micro-batch of pairs after the forward pass.

    Rows are `2·pairs`: all chosen texts, then their rejected partners in the same order; a tensor of rows splits with
    `chunk(2)`.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, length)`):
            Token ids; 1 at real tokens. A text is prompt and completion, right-padded.
        rewards (`torch.Tensor` of shape `(rows,)`):
            What the model says of each text, with gradient.
        least_margins (`torch.Tensor` of shape `(pairs,)`, *optional*):
            By how much the chosen text should at least lead: the dataset's column `margin`.

    Raises:
        `ValueError`: naming the field, if a shape is not as stated.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    rewards: torch.Tensor
    least_margins: torch.Tensor | None = None

    def __post_init__(self):
        rows, length = self.input_ids.shape
        if rows % 2:
            raise ValueError(f"`input_ids` must have an even number of rows, chosen and rejected, got {rows}.")
        expected = {"attention_mask": (rows, length), "rewards": (rows,), "least_margins": (rows // 2,)}
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"`{name}` must be of shape {shape}, got {tuple(value.shape)}.")
