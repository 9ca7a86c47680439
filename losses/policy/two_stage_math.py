"""Two-stage recipe (arXiv:2507.08267): what a completion gains by being short, once it is right."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cosine_reward(
    lengths: Float[Tensor, " rows"],
    correct: Bool[Tensor, " rows"],
    max_length: int,
    right: tuple[float, float] = (1.0, 0.1),
    wrong: tuple[float, float] = (-1.0, -0.1),
) -> Float[Tensor, " rows"]:
    """
    Half a cosine from a value for no length to one for `max_length` and beyond.

    With (a, b) the ends for right or wrong completions and x = min(1, L/L_max): b + (a − b)(1 + cos πx)/2. Right ones
    lose by length; wrong ones are forgiven the more, the longer they tried.

    Args:
        lengths (`torch.Tensor` of shape `(rows,)`):
            L, in the unit of `max_length`; NaN stays NaN.
        correct (`torch.Tensor` of shape `(rows,)`):
            Which are right.
        max_length (`int`):
            L_max, above 0. The paper: 30,000 characters.
        right (`tuple[float, float]`), wrong (`tuple[float, float]`):
            Values at length 0 and at L_max.
    """
    falling = 0.5 * (1 + torch.cos(math.pi * torch.clamp(lengths / max_length, max=1.0)))
    short, long = (
        torch.where(correct, lengths.new_tensor(r), lengths.new_tensor(w)) for r, w in zip(right, wrong, strict=True)
    )
    return long + (short - long) * falling


def relative_length_reward(
    lengths: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"], group_ids: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """
    Length reward of Kimi k1.5 (arXiv:2501.12599): λ = 1/2 − (L − L_min)/(L_max − L_min) of the group.

    Right completions get λ, wrong ones min(0, λ); all get 0 where lengths are equal. Range [−1/2, 1/2].

    Args:
        lengths (`torch.Tensor` of shape `(rows,)`):
            L. Rows with NaN get NaN and are left out of the extremes.
        correct (`torch.Tensor` of shape `(rows,)`):
            Which are right.
        group_ids (`torch.Tensor` of shape `(rows,)`):
            Rows whose lengths are compared share an id.
    """
    index = torch.unique(group_ids, return_inverse=True)[1]
    known = ~lengths.isnan()

    def extreme(fill: float, reduce: str) -> Tensor:
        start = lengths.new_full((int(index.max()) + 1,), fill)
        return start.scatter_reduce(0, index, lengths.where(known, fill), reduce)[index]

    shortest, longest = extreme(torch.inf, "amin"), extreme(-torch.inf, "amax")
    varied = longest > shortest
    share = (lengths - shortest) / (longest - shortest).where(varied, 1.0)
    reward = (0.5 - share).where(varied, 0.0)
    return torch.where(correct, reward, reward.clamp(max=0.0)).masked_fill(~known, torch.nan)
