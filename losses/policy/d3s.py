"""D³S (arXiv:2509.22115): the rollouts with the most varied advantages, and their most telling tokens."""

import math

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def max_variance_subset(advantages: Float[Tensor, " rows"], size: int) -> Bool[Tensor, " rows"]:
    """
    The `size` rows whose advantages have the largest variance: argmax over subsets S of mean(A²) − mean(A)².

    The optimum consists of the j lowest and `size` − j highest values for some j; prefix sums over the sorted values
    find it in O(n log n). At most as many rows are taken as have A ≠ 0, since the others carry no gradient, unless
    all have A = 0. Ties go to the row that comes first.

    Args:
        advantages (`torch.Tensor` of shape `(rows,)`):
            A, finite, over the groups' full statistics.
        size (`int`):
            Rows to keep, between 1 and `rows`.
    """
    nonzero = int((advantages != 0).sum())
    size = min(size, nonzero) if nonzero else size
    values, order = torch.sort(advantages.double(), stable=True)
    zero = values.new_zeros(1)
    first = torch.cat([zero, values.cumsum(0)])
    second = torch.cat([zero, values.square().cumsum(0)])
    low = torch.arange(size + 1, device=advantages.device)
    high = values.numel() - (size - low)
    total = first[low] + first[-1] - first[high]
    squares = second[low] + second[-1] - second[high]
    variance = squares / size - (total / size).square()
    rounding = 1e-12 * values.square().amax()
    best = int((variance >= variance.max() - rounding).int().argmax())
    keep = torch.zeros_like(advantages, dtype=torch.bool)
    keep[order[:best]] = True
    highest = torch.argsort(advantages, descending=True, stable=True)
    keep[highest[~keep[highest]][: size - best]] = True
    return keep


def max_variance_per_group(
    advantages: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"], ratio: float
) -> Bool[Tensor, " rows"]:
    """[`max_variance_subset`] inside every group, with [`share_of`] the group's rows (D³S-I)."""
    keep = torch.zeros_like(advantages, dtype=torch.bool)
    for group in torch.unique(group_ids):
        rows = (group_ids == group).nonzero().squeeze(1)
        keep[rows] = max_variance_subset(advantages[rows], share_of(rows.numel(), ratio))
    return keep


def share_of(total: int, ratio: float) -> int:
    """⌈`ratio` · `total`⌉, at least 1, and not one more for a rounding error of the product."""
    return max(1, math.ceil(ratio * total - 1e-9))


def token_scores(
    advantages: Float[Tensor, "batch _"], entropies: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """z = |A| · H: what a token has to say, times how open the choice was (H in nats). Without gradient."""
    return (advantages.abs() * entropies).detach()


def largest_share(scores: Float[Tensor, " tokens"], ratio: float) -> Float[Tensor, ""]:
    """Smallest score among the largest ones, [`share_of`] all; `-inf` for no tokens."""
    if scores.numel() == 0:
        return scores.new_tensor(-torch.inf)
    count = share_of(scores.numel(), ratio)
    return torch.kthvalue(scores, scores.numel() - count + 1).values


def select_tokens(
    scores: Float[Tensor, "batch time"], mask: Shaped[Tensor, "batch time"], threshold: Float[Tensor, "batch one"]
) -> Bool[Tensor, "batch time"]:
    """
    Tokens of `mask` that score at least `threshold`. Those of score 0 carry no gradient and are never kept.
    """
    return mask.bool() & (scores > 0) & (scores >= threshold)


def linear_schedule(start: float, end: float, progress: float) -> float:
    """start + (end − start) · min(1, progress)."""
    return start + (end - start) * min(1.0, progress)
