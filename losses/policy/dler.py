"""DLER (arXiv:2510.15110): length limits done right, whitened advantages, and merging of selected updates."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from .groups import expand_groups


def length_limits(
    correct_share: Float[Tensor, " groups"], thresholds: list[float], lengths: list[int]
) -> Int[Tensor, " groups"]:
    """
    Token limit of each group by its difficulty (DA-DLER, Sec. 3.3).

    Args:
        correct_share (`torch.Tensor` of shape `(groups,)`):
            ρ, the share of correct responses under the longest limit.
        thresholds (`list[float]` of length `n`):
            Ascending. A group at a threshold counts as past it.
        lengths (`list[int]` of length `n + 1`):
            Limit for groups below the first threshold, …, past the last.
    """
    level = torch.bucketize(correct_share, correct_share.new_tensor(thresholds), right=True)
    return torch.tensor(lengths, device=correct_share.device)[level]


def truncated_rewards(
    rewards: Float[Tensor, "rows sources"],
    lengths: Int[Tensor, " rows"],
    truncated: Bool[Tensor, " rows"],
    limits: Int[Tensor, " rows"],
) -> Float[Tensor, "rows sources"]:
    """
    R = c · 1[finished within the limit] (Eq. 2). A response of exactly the limit that ends properly is within.

    Args:
        rewards (`torch.Tensor` of shape `(rows, sources)`):
            c; NaN stays NaN.
        lengths (`torch.Tensor` of shape `(rows,)`):
            Tokens, the end token included.
        truncated (`torch.Tensor` of shape `(rows,)`):
            True if generation stopped without an end token.
        limits (`torch.Tensor` of shape `(rows,)`):
            Limit of each row.
    """
    finished = ~truncated & (lengths <= limits)
    return torch.where(finished.unsqueeze(1) | rewards.isnan(), rewards, torch.zeros_like(rewards))


def whiten(
    centered: Float[Tensor, " rows"], weights: Shaped[Tensor, " rows"], live: Bool[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """
    A = (a − μ) / √(σ² + 1e-8), with mean μ and unbiased variance σ² over all units of the batch (Eq. 3).

    Args:
        centered (`torch.Tensor` of shape `(rows,)`):
            a = R − mean of the group.
        weights (`torch.Tensor` of shape `(rows,)`):
            Units per row: its tokens, so that long responses weigh more, or 1.
        live (`torch.Tensor` of shape `(rows,)`):
            Rows that take part; the others, those of groups without variance, get 0.

    Returns:
        `torch.Tensor` of shape `(rows,)`; all 0 where fewer than two units take part.
    """
    weights = weights.to(centered.dtype) * live
    centered = centered.masked_fill(~live, 0.0)
    total = weights.sum()
    mean = (weights * centered).sum() / total.clamp(min=1.0)
    variance = (weights * (centered - mean).square()).sum() / (total - 1).clamp(min=1.0)
    return (centered - mean) * torch.rsqrt(variance + 1e-8) * live


def solved_share(correct: Bool[Tensor, " rows"], group_ids: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Share of correct responses in each row's group."""
    _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    solved = torch.zeros_like(counts, dtype=torch.float32).index_add(0, index, correct.float())
    return expand_groups(solved / counts, group_ids)


def merge_updates(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    keep_ratio: float = 0.25,
    scale: float = 0.7,
    scope: Literal["tensor", "global"] = "tensor",
) -> dict[str, Tensor]:
    """
    Update-selective merging (Sec. 3.4): θ_base + scale · δ, of δ = θ_tuned − θ_base only the largest entries.

    Computed in float32; entries as large as the last one kept are kept too. Give tied weights once, and merge a LoRA
    adapter into its base first. Non-float tensors are taken from `tuned`.

    Args:
        base, tuned (`Mapping[str, torch.Tensor]`):
            State dicts with the same names and shapes.
        keep_ratio (`float`, *optional*, defaults to `0.25`):
            Share of the entries kept, rounded up.
        scale (`float`, *optional*, defaults to `0.7`):
            Factor on what is kept.
        scope (`str`, *optional*, defaults to `"tensor"`):
            Whether the share is taken of each tensor or of all together; the paper does not say.

    Returns:
        `dict[str, torch.Tensor]` in the dtypes of `base`.

    Raises:
        `ValueError`: if names or shapes differ, or `keep_ratio` is not in (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"`keep_ratio` must be a number in (0, 1], got {keep_ratio!r}.")
    different = {n for n in base.keys() | tuned.keys() if n not in base or n not in tuned}
    different |= {n for n in base.keys() & tuned.keys() if base[n].shape != tuned[n].shape}
    if different:
        raise ValueError(f"`base` and `tuned` differ in names or shapes: {sorted(different)[:5]}.")
    deltas = {n: tuned[n].float() - base[n].float() for n in base if base[n].is_floating_point()}

    def cut(parts: list[Tensor]) -> Tensor | float:
        values = torch.cat([part.flatten() for part in parts]).abs() if parts else torch.zeros(0)
        count = math.ceil(keep_ratio * values.numel())
        return torch.kthvalue(values, values.numel() - count + 1).values if count else 0.0

    if scope == "global":
        cuts = dict.fromkeys(deltas, cut(list(deltas.values())))
    else:
        cuts = {name: cut([delta]) for name, delta in deltas.items()}
    merged = {
        name: (base[name].float() + scale * delta * (delta.abs() >= cuts[name])).to(base[name].dtype)
        for name, delta in deltas.items()
    }
    return {name: merged.get(name, tuned[name]) for name in base}
