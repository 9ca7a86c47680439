"""The batch, with what methods made of further dataset columns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class CarryingCollator:
    """
    A collator of pairs whose batch has `extras` beside what TRL's has.

    Args:
        collator (`Callable`):
            TRL's, or the user's.
        collate (`Callable`):
            Rows → tensors with one entry per pair: the stage *collate*.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return self.collator(examples) | {"extras": self.collate(examples)}


_NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "extras")


def model_inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch is an argument of the model."""
    return {name: value for name, value in batch.items() if name not in _NOT_OF_THE_MODEL}
