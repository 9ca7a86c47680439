"""Constrained RLHF (arXiv:2310.04373): rewards as constraints with learned weights, and their thresholds' search."""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import pstdev
from typing import Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

Kind = Literal["equality", "inequality"]

# Difference between the log-probabilities of one token under two models that counts as none
_ROUNDING = 1e-5


def kl_reward(
    old_logps: Float[Tensor, "batch time"],
    ref_logps: Float[Tensor, "batch time"],
    mask: Shaped[Tensor, "batch time"],
) -> Float[Tensor, " batch"]:
    """
    Reward for staying near the reference: −Σ_t (logπ_old − logπ_ref), in nats per sequence, without gradient.

    Differences of rounding size count as 0: where policy and reference are still the same, standardization would blow
    them up to a signal.

    Args:
        old_logps, ref_logps (`torch.Tensor` of shape `(batch, time)`):
            Log-probabilities of the sampled tokens under the policy that sampled them and under the reference.
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens that the policy chose.
    """
    difference = (old_logps - ref_logps).detach()
    counts = mask.bool() & (difference.abs() > _ROUNDING)
    return -difference.where(counts, 0.0).sum(1)


def difference(values: Float[Tensor, " rows"], others: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """values − others, and 0 where that is of rounding size: equal values must not differ from their mean."""
    return (values - others).masked_fill((values - others).abs() <= 1e-6 * values.abs(), 0.0)


def standardize(values: Float[Tensor, " rows"], live: Bool[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """
    (x − mean) / (std + 1e-8), with the unbiased deviation, over the `live` rows that are not NaN; 0 elsewhere, and
    where values do not vary.

    Args:
        values (`torch.Tensor` of shape `(rows,)`):
            One value per row of the generation batch on all ranks; NaN where there is none.
        live (`torch.Tensor` of shape `(rows,)`):
            Rows that count.
    """
    live = live & ~values.isnan()
    values = values.where(live, 0.0)
    count = live.sum()
    centered = difference(values, (values.sum() / count.clamp(min=1)).expand_as(values)).where(live, 0.0)
    return centered / ((centered.square().sum() / (count - 1).clamp(min=1)).sqrt() + 1e-8)


def constraint_weights(raw: Float[Tensor, " sources"], kind: Kind, squash: bool) -> Float[Tensor, " sources"]:
    """w = f(λ): tanh(λ) for equalities (ξ), sigmoid(λ) for inequalities (μ), λ itself without `squash`."""
    if not squash:
        return raw
    return torch.tanh(raw) if kind == "equality" else torch.sigmoid(raw)


def mix_advantages(
    kl_advantages: Float[Tensor, " rows"],
    advantages: Float[Tensor, "rows sources"],
    weights: Float[Tensor, " sources"],
) -> Float[Tensor, " rows"]:
    """
    (N − Σ w_i)·A_0 + Σ w_i·A_i for N constraints: the factor of the objective keeps the total weight at N.

    Args:
        kl_advantages (`torch.Tensor` of shape `(rows,)`):
            A_0, standardized.
        advantages (`torch.Tensor` of shape `(rows, sources)`):
            A_i, each standardized.
        weights (`torch.Tensor` of shape `(sources,)`):
            w_i.
    """
    return (weights.numel() - weights.sum()) * kl_advantages + advantages @ weights


def update_multipliers(
    raw: Float[Tensor, " sources"],
    velocity: Float[Tensor, " sources"],
    violations: Float[Tensor, " sources"],
    kind: Kind,
    squash: bool,
    learning_rate: float,
    momentum: float,
    max_norm: float,
) -> tuple[Float[Tensor, " sources"], Float[Tensor, " sources"]]:
    """
    One step of SGD with momentum on L(λ) = Σ f(λ_i)·(J_i − θ_i): a reward above its threshold loses weight.

    The gradient f'(λ_i)·(J_i − θ_i) is scaled down to the norm `max_norm`, over all constraints. A multiplier whose
    violation is NaN stays as it is. Multipliers of inequalities that are not squashed stay at 0 or above.

    Args:
        raw (`torch.Tensor` of shape `(sources,)`), velocity (`torch.Tensor` of shape `(sources,)`):
            λ, and the optimizer's running sum.
        violations (`torch.Tensor` of shape `(sources,)`):
            J − θ, in units of the reward.
        kind, squash:
            As in [`constraint_weights`].

    Returns:
        New `raw` and `velocity`.
    """
    known = ~violations.isnan()
    slope = torch.ones_like(raw)
    if squash:
        weights = constraint_weights(raw, kind, squash)
        slope = 1 - weights.square() if kind == "equality" else weights * (1 - weights)
    gradient = (slope * violations).where(known, 0.0)
    gradient = gradient * (max_norm / (gradient.norm() + 1e-6)).clamp(max=1.0)
    velocity = torch.where(known, momentum * velocity + gradient, velocity)
    moved = torch.where(known, raw - learning_rate * velocity, raw)
    return moved.clamp(min=0.0) if kind == "inequality" and not squash else moved, velocity


def within(
    returns: Float[Tensor, " sources"], thresholds: Float[Tensor, " sources"], tolerance: float
) -> Bool[Tensor, " sources"]:
    """
    Where J_i is within `tolerance`·θ_i of θ_i. Of a θ_i ≤ 0, of which a share makes no band, within `tolerance`.
    """
    return (returns - thresholds).abs() <= tolerance * thresholds.where(thresholds > 0, 1.0)


def nelder_mead(
    simplex: Sequence[Sequence[float]],
    alpha: float = 1.0,
    gamma: float = 2.0,
    rho: float = 0.5,
    sigma: float = 0.5,
    tolerance: float = 0.01,
) -> Generator[list[float], float, list[float]]:
    """
    Minimize a function by Nelder and Mead's search: yields points, is sent their values, returns the best vertex.

    From the worst vertex x_w and the centroid c of the others, the reflection c + α(c − x_w) is accepted if its value
    is between those of the best and the second worst vertex. If it is the best of all, so is the expansion c + γ(x_r −
    c) in its place, if that also beats the best vertex; else the contraction c + ρ(x_w − c) is tried, if it beats the
    worst; failing that, all vertices shrink to best + σ(v − best). Ends when the standard deviation of the vertices'
    values is below `tolerance`.

    Args:
        simplex (`Sequence` of points):
            N + 1 vertices in N dimensions.
        alpha, gamma, rho, sigma, tolerance (`float`):
            α, γ, ρ, σ and the tolerance.
    """

    def along(start: Sequence[float], end: Sequence[float], factor: float) -> list[float]:
        return [a + factor * (b - a) for a, b in zip(start, end, strict=True)]

    vertices = []
    for vertex in simplex:
        vertices.append(((yield list(vertex)), list(vertex)))
    while True:
        vertices.sort(key=lambda pair: pair[0])
        if pstdev(value for value, _ in vertices) < tolerance:
            return vertices[0][1]
        best, second_worst, (worst_value, worst) = vertices[0][0], vertices[-2][0], vertices[-1]
        others = [vertex for _, vertex in vertices[:-1]]
        centroid = [sum(coordinates) / len(others) for coordinates in zip(*others, strict=True)]
        reflected = along(centroid, worst, -alpha)
        value = yield reflected
        if value < best:
            expanded = along(centroid, reflected, gamma)
            expanded_value = yield expanded
            vertices[-1] = (expanded_value, expanded) if expanded_value < best else (value, reflected)
        elif value < second_worst:
            vertices[-1] = (value, reflected)
        else:
            contracted = along(centroid, worst, rho)
            value = yield contracted
            if value < worst_value:
                vertices[-1] = (value, contracted)
            else:
                for i, (_, vertex) in enumerate(vertices[1:], start=1):
                    shrunk = along(vertices[0][1], vertex, sigma)
                    vertices[i] = ((yield shrunk), shrunk)


@dataclass
class ProxyPointSearch:
    """
    Search for the thresholds at which a trusted score is highest, one evaluation at a time.

    All that it remembers are the evaluations: [`nelder_mead`] is deterministic, so that replaying them gives the next
    point. A point within `same` of an evaluated one in every coordinate counts as evaluated.

    Args:
        simplex (`list` of points):
            N + 1 threshold vectors.
        coefficients (`dict[str, float]`):
            `alpha`, `gamma`, `rho`, `sigma` and `tolerance` of [`nelder_mead`].
        same (`float`, *optional*, defaults to `5e-3`):
            In units of the rewards.
        evaluations (`list` of (point, score)):
            What was evaluated, in order.
    """

    simplex: list[list[float]]
    coefficients: Mapping[str, float]
    same: float = 5e-3
    evaluations: list[tuple[list[float], float]] = field(default_factory=list)

    def propose(self) -> list[float] | None:
        """The next point to evaluate, or `None` where the search is over."""
        search = nelder_mead(self.simplex, **self.coefficients)
        try:
            point = next(search)
            while (score := self._known(point)) is not None:
                point = search.send(-score)
        except StopIteration:
            return None
        return point

    def tell(self, point: Sequence[float], score: float) -> None:
        """Record the trusted score, higher being better, of a point."""
        self.evaluations.append((list(point), score))

    def best(self) -> tuple[list[float], float]:
        """The evaluated point of the highest score, the first of several, and its score."""
        return max(self.evaluations, key=lambda pair: pair[1])

    def _known(self, point: Sequence[float]) -> float | None:
        for seen, score in self.evaluations:
            if all(abs(a - b) <= self.same for a, b in zip(seen, point, strict=True)):
                return score
        return None
