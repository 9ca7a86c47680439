"""Exploration of XPO: which completions are pushed down, and how strongly."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def explored_logps(
    per_token_logps: Float[Tensor, "rows time"], explored: Shaped[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """
    log π_θ(ỹ|x) = Σ_t log π_θ(ỹ_t|x, ỹ_<t) of the pair's completion that the sampling policy π̃ wrote.

    Source: arXiv:2405.21046, Algorithm 1: α Σ log π(ỹ|x) is *added* to the loss that is minimized, whether ỹ was
    chosen or rejected.

    Args:
        per_token_logps (`torch.Tensor` of shape `(2·pairs, time)`):
            Of the policy alone, in nats; chosen rows first, then their rejected partners; 0 outside the completion.
        explored (`torch.Tensor` of shape `(pairs,)`):
            1 where ỹ is the chosen completion, -1 where it is the rejected one, 0 where it is neither.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, in nats, summed over tokens, with gradient; 0 where ỹ is neither, and for
        an empty ỹ.
    """
    chosen, rejected = per_token_logps.sum(1).chunk(2)
    return torch.where(explored > 0, chosen, rejected).where(explored != 0, 0)


def scheduled(values: Sequence[float], iteration: int) -> float:
    """Entry of `values` for an iteration, counted from 0; the last one for all further ones."""
    return values[min(iteration, len(values) - 1)]
