"""Scaf-GRPO (arXiv:2510.19807): ladders of hints, the weakest that helps, and when hints are due."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def cumulative_hints(tiers: Mapping[str, Sequence[str]], separator: str = " ") -> list[str]:
    """
    Hints from the weakest to the strongest: in each tier the first item, the first two, and so on (Sec. 3.2).

    Args:
        tiers (`dict[str, list[str]]`):
            Items of each tier by its label, weakest tier first. The paper has knowledge, planning and solution hints
            of four items each.
        separator (`str`, *optional*, defaults to a space):
            What stands between items.

    Returns:
        `list[str]`: `"{label}: {items}"`, each hint once.

    Example:

    ```python
    >>> from papertrl.losses.policy.scaf_grpo import cumulative_hints
    >>> cumulative_hints({"Knowledge Hints": ["Carry.", "From the right."], "Solution Hints": ["5+6=11."]})
    ['Knowledge Hints: Carry.', 'Knowledge Hints: Carry. From the right.', 'Solution Hints: 5+6=11.']
    ```
    """
    hints = [
        f"{label}: {separator.join(items[:count])}"
        for label, items in tiers.items()
        for count in range(1, len(items) + 1)
    ]
    return list(dict.fromkeys(hints))


def weakest_success(
    solved: Bool[Tensor, " tries"], group: Int[Tensor, " tries"], groups: int
) -> Int[Tensor, " groups"]:
    """
    First successful try of each group, by place; the number of tries where a group has none.

    Args:
        solved (`torch.Tensor` of shape `(tries,)`):
            Whether the completion sampled with a hint is right.
        group (`torch.Tensor` of shape `(tries,)`):
            Which group each try is for; within a group, from the weakest hint to the strongest.
        groups (`int`):
            Number of groups.
    """
    tries = len(solved)
    places = torch.arange(tries, device=solved.device).masked_fill(~solved, tries)
    first = torch.full((groups,), tries, device=solved.device)
    return first.scatter_reduce(0, group, places, "amin")


def exempt_steps(ratio: float, total_steps: int, steps: int | None = None) -> int:
    """
    Optimizer steps at the beginning in which no hint is given: `steps`, or a share of all of them (Sec. 3.1).

    Args:
        ratio (`float`):
            Share, in [0, 1].
        total_steps (`int`):
            Steps of the whole training.
        steps (`int`, *optional*):
            Number that takes precedence over the share.
    """
    return round(ratio * total_steps) if steps is None else steps
