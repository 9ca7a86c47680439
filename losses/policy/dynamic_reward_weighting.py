"""Dynamic reward weighting (arXiv:2509.11452): by hypervolume gained, or by gradients that help all rewards."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

# Weights below e^-30 could not come back
_LOWEST_LOG_WEIGHT = -30.0

Point = Sequence[float]


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """
    Volume of the union of the boxes [reference, p], every coordinate being better the larger it is.

    Cuts along the last coordinate: between two neighboring values of it, the section is the union over the points
    above, one dimension lower. Exact, in O(n^d) for n points in d dimensions. Points are clipped to the reference, so
    that a coordinate below it makes an empty box.

    Args:
        points (`Sequence` of points), reference (point):
            In d ≥ 1 dimensions.
    """
    clipped = [[max(x, r) for x, r in zip(point, reference, strict=True)] for point in points]
    return _union(clipped, list(reference))


def _union(points: list[list[float]], reference: list[float]) -> float:
    if not points:
        return 0.0
    if len(reference) == 1:
        return max(point[0] for point in points) - reference[0]
    volume, bottom = 0.0, reference[-1]
    ascending = sorted(points, key=lambda point: point[-1])
    for i, point in enumerate(ascending):
        if point[-1] > bottom:
            volume += (point[-1] - bottom) * _union([other[:-1] for other in ascending[i:]], reference[:-1])
            bottom = point[-1]
    return volume


def pareto_front(points: Sequence[Point]) -> list[list[float]]:
    """Points that no other one is at least as good as in every coordinate; one of several equal ones."""
    front: list[list[float]] = []
    for point in points:
        if any(all(a >= b for a, b in zip(kept, point, strict=True)) for kept in front):
            continue
        front = [kept for kept in front if not all(a >= b for a, b in zip(point, kept, strict=True))]
        front.append(list(point))
    return front


@dataclass
class HypervolumeGuide:
    """
    The best trade-offs between rewards that a run has reached, and what a new one adds to them.

    Args:
        points (`list` of points):
            The reference, which is the first point observed, then the front beyond it.
    """

    points: list[list[float]] = field(default_factory=list)

    def observe(self, point: Point) -> float:
        """ΔHV = HV(front and point) − HV(front), at least 0; the point joins the front where that is positive."""
        if not self.points:
            self.points = [list(point)]
            return 0.0
        reference, front = self.points[0], self.points[1:]
        clipped = [max(x, r) for x, r in zip(point, reference, strict=True)]
        contribution = hypervolume([*front, clipped], reference) - hypervolume(front, reference)
        # Of a point that the front is as good as, the difference is rounding
        if contribution <= 0 or clipped not in (joined := pareto_front([*front, clipped])):
            return 0.0
        self.points = [reference, *joined]
        return contribution

    def volume(self) -> float:
        """Hypervolume of the front."""
        return hypervolume(self.points[1:], self.points[0])


def meta_reward(contribution: float, low: float = 0.5, gain: float = 1.5) -> float:
    """m = low + gain · tanh(ΔHV), in [low, low + gain) (Sec. 3.1); ΔHV ≥ 0, in the product of the rewards' units."""
    return low + gain * math.tanh(contribution)


def influence(gram: Float[Tensor, "sources sources"]) -> Float[Tensor, " sources"]:
    """I_k = Σ_j ⟨g_k, g_j⟩, j = k included: how much a step along source k's gradient helps all sources."""
    return gram.sum(dim=1)


def clip_factors(gram: Float[Tensor, "sources sources"], max_norm: float) -> Float[Tensor, " sources"]:
    """Factor that brings each gradient, of squared norm `gram[k, k]`, to norm `max_norm` at most; 1 if that is 0."""
    if max_norm == 0:
        return torch.ones_like(gram[0])
    return (max_norm / (gram.diagonal().sqrt() + 1e-6)).clamp(max=1.0)


def exponentiated_gradient(
    weights: Float[Tensor, " sources"], influences: Float[Tensor, " sources"], rate: float
) -> Float[Tensor, " sources"]:
    """
    w ← softmax(log w + rate · I), the mirror step on the simplex; rate = η/μ.

    Log-weights are kept at −30 or above, from where a weight can come back.

    Args:
        weights (`torch.Tensor` of shape `(sources,)`):
            On the simplex.
        influences (`torch.Tensor` of shape `(sources,)`):
            I, see [`influence`].
        rate (`float`):
            Learning rate over the regularization factor.
    """
    return torch.softmax(weights.log().clamp(min=_LOWEST_LOG_WEIGHT) + rate * influences, dim=0)
