"""HAPO (arXiv:2509.16591): the entropy of a token decides on temperature, advantage and clip range."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .groups import by_group, expand_groups, group_mean, group_std

_SMALLEST_ENTROPY = 1e-8
# Floor of the range that scales entropies: where they are equal up to rounding, none is high or low
_SMALLEST_RANGE = 1e-4


def entropy_scale(entropies: Float[Tensor, " tokens"], quantile: float) -> Float[Tensor, "3"]:
    """
    What entropies are measured by: pivot, lowest and highest of x = log max(H, 1e-8) (Eq. 5).

    The pivot is the value at place round(quantile · (n − 1)) of the sorted x, not interpolated. Zeros for no tokens.

    Args:
        entropies (`torch.Tensor` of shape `(tokens,)`):
            H in nats.
        quantile (`float`):
            In [0, 1].
    """
    if entropies.numel() == 0:
        return entropies.new_zeros(3)
    x = torch.sort(_log(entropies)).values
    return torch.stack([x[round(quantile * (x.numel() - 1))], x[0], x[-1]])


def normalized_entropy(
    entropies: Float[Tensor, "*shape"],
    pivot: Float[Tensor, "*scale"],
    lowest: Float[Tensor, "*scale"],
    highest: Float[Tensor, "*scale"],
    signed: bool = True,
) -> Float[Tensor, "*shape"]:
    """
    h in [−1, 1]: how far a token's log-entropy lies above the pivot, or below it, on the way to the extreme (Eq. 6).

    h = (x − Q)/(max − Q) above the pivot Q and (x − Q)/(Q − min) below. The deviation s by which the paper divides
    first cancels; its floor is that of the ranges here. Beyond the extremes, which may be those of another pass, h
    is ±1. Without gradient.

    Args:
        entropies (`torch.Tensor`):
            H in nats.
        pivot, lowest, highest (`torch.Tensor` that broadcast against `entropies`):
            From [`entropy_scale`].
        signed (`bool`, *optional*, defaults to `True`):
            As in the paper. The released code has |h|, by which no token ever counts as one of low entropy.
    """
    distance = _log(entropies.detach()) - pivot
    above, below = (highest - pivot).clamp(min=_SMALLEST_RANGE), (pivot - lowest).clamp(min=_SMALLEST_RANGE)
    h = torch.where(distance > 0, distance / above, distance / below).clamp(min=-1.0, max=1.0)
    return h if signed else h.abs()


def next_token_entropy(logits: Float[Tensor, "rows vocab"], temperature: float) -> Float[Tensor, " rows"]:
    """Entropy in nats of softmax(logits / temperature); logits may be −∞."""
    logps = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logps.exp() * logps).nansum(-1)


def token_mean(
    values: Float[Tensor, " rows"], lengths: Int[Tensor, " rows"], group_ids: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """
    Mean over all tokens of each row's group, every token having its row's value (Eq. 9); NaN does not take part.

    Args:
        values (`torch.Tensor` of shape `(rows,)`):
            One value per row.
        lengths (`torch.Tensor` of shape `(rows,)`):
            Tokens per row.
    """
    grouped = by_group(values, group_ids).double()
    weights = by_group(lengths.double(), group_ids).nan_to_num() * ~grouped.isnan()
    # In float64, so that equal values have exactly their value as mean
    mean = (weights * grouped.nan_to_num()).sum(1) / weights.sum(1).clamp(min=1.0)
    return expand_groups(mean, group_ids).to(values.dtype)


def token_group_advantages(
    rewards: Float[Tensor, " rows"],
    centered: Float[Tensor, " rows"],
    lengths: Int[Tensor, " rows"],
    group_ids: Int[Tensor, " rows"],
    fallback: float | None,
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """
    A = (R − μ)/(σ + 1e-6) with mean and population deviation over the group's tokens (Eq. 9).

    A short right answer among long wrong ones then weighs more, and A sums to 0 over the group's tokens. Where some
    |A| in the group reaches `fallback`, the whole group has GRPO's (R − mean)/(std + 1e-6), over rows.

    Args:
        rewards, centered (`torch.Tensor` of shape `(rows,)`):
            R, and R − μ with μ from [`token_mean`].
        lengths (`torch.Tensor` of shape `(rows,)`):
            Tokens per row.
        fallback (`float`, *optional*):
            Threshold; `None` never falls back.

    Returns:
        Advantages, 0 in groups of equal rewards, and whether the row's group fell back.
    """
    advantages = centered / (token_mean(centered.square(), lengths, group_ids).sqrt() + 1e-6)
    if fallback is None:
        return advantages, torch.zeros_like(advantages, dtype=torch.bool)
    largest = by_group(advantages.abs(), group_ids).nan_to_num().amax(1)
    fell = expand_groups(largest >= fallback, group_ids)
    plain = (rewards - group_mean(rewards, group_ids)) / (group_std(rewards, group_ids) + 1e-6)
    return torch.where(fell, plain, advantages), fell


def range_factors(h: Float[Tensor, "batch time"], alpha: float) -> tuple[Tensor, Tensor]:
    """
    Factors on the lower and the upper clip range (Eqs. 12 and 13): 1 − αh where h ≤ 0, and 1 + αh where h > 0; else 1.

    Tokens of low entropy may lose more probability, those of high entropy gain more. A lower range of 1 or more does
    not clip.
    """
    return 1 - alpha * h.clamp(max=0.0), 1 + alpha * h.clamp(min=0.0)


def advantage_factor(
    h: Float[Tensor, "batch time"],
    ratio: Float[Tensor, "batch time"],
    epsilon_low: Float[Tensor, "batch time"],
    epsilon_high: Float[Tensor, "batch time"],
    beta: float,
) -> Float[Tensor, "batch time"]:
    """
    Factor 1 + βh on the advantage (Eqs. 10 and 11) of open tokens whose ratio has moved and closed ones whose has not.

    A token is open if h > 0. Its ratio has moved if it is outside of (1 − ε_low/2, 1 + ε_high/2). Other tokens keep
    their advantage. Without gradient.

    Args:
        h (`torch.Tensor` of shape `(batch, time)`):
            From [`normalized_entropy`].
        ratio (`torch.Tensor` of shape `(batch, time)`):
            π/π_old.
        epsilon_low, epsilon_high (`torch.Tensor` of shape `(batch, time)`):
            The token's clip range, after [`range_factors`].
        beta (`float`):
            In [0, 1].
    """
    ratio = ratio.detach()
    moved = (ratio <= 1 - epsilon_low / 2) | (ratio >= 1 + epsilon_high / 2)
    return torch.where((h > 0) == moved, 1 + beta * h, torch.ones_like(h))


def _log(entropies: Tensor) -> Tensor:
    return entropies.clamp(min=_SMALLEST_ENTROPY).log()
