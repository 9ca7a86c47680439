"""Uncertainty of preference labels, of UPO: how far Monte-Carlo-dropout passes of a pair classifier disagree."""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

LN2 = math.log(2)


def binary_entropy(p: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−p log p − (1 − p) log(1 − p), in nats; 0 at 0 and 1."""
    return torch.special.entr(p) + torch.special.entr(1 - p)


@torch.no_grad()
def bald(probabilities: Float[Tensor, "passes pairs"]) -> Float[Tensor, " pairs"]:
    """
    Information that the classifier's weights hold about each label: B = H(mean_t p_t) − mean_t H(p_t).

    Source: arXiv:2409.11212, the acquisition function of its estimator, BALD (arXiv:1112.5745). High where passes are
    sure of different answers. Low where all are sure of one, but also where all of them say ½.

    Args:
        probabilities (`torch.Tensor` of shape `(passes, pairs)`):
            p_t, that the chosen completion is the better one, under the t-th draw of dropout.

    Returns:
        `torch.Tensor` of shape `(pairs,)`: in nats, in [0, log 2] and without gradient.
    """
    return (binary_entropy(probabilities.mean(0)) - binary_entropy(probabilities).mean(0)).clamp(0.0, LN2)


@torch.no_grad()
def majority_agrees(probabilities: Float[Tensor, "passes pairs"]) -> Bool[Tensor, " pairs"]:
    """Whether more than half of the passes say that the chosen completion is the better one."""
    return 2 * (probabilities > 0.5).sum(0) > len(probabilities)


@torch.no_grad()
def selection_probabilities(
    uncertainty: Float[Tensor, " pairs"], eligible: Bool[Tensor, " pairs"], mu: float = 1.0
) -> Float[Tensor, " pairs"]:
    """
    Probability to draw each pair: P_j = (1 − B_j)^μ / Σ_k (1 − B_k)^μ over those that are eligible, 0 for the others.

    Source: arXiv:2409.11212. The text prints μ as a factor, which would cancel; it is read as an exponent here. The
    authors' code has no μ, which is μ = 1.

    Args:
        uncertainty (`torch.Tensor` of shape `(pairs,)`):
            B in [0, log 2].
        eligible (`torch.Tensor` of shape `(pairs,)`, bool):
            Whose label the majority shares. If none is, all probabilities are 0.
        mu (`float`, *optional*, defaults to `1.0`):
            μ > 0; the larger, the more certain pairs are preferred.
    """
    weights = (1 - uncertainty) ** mu * eligible
    return weights / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)


@torch.no_grad()
def smoothing_alpha(
    uncertainty: Float[Tensor, " pairs"],
    probabilities: Float[Tensor, " pairs"],
    eligible: Shaped[Tensor, " pairs"],
    mode: str = "certainty",
    alpha_max: float = 0.5,
) -> Float[Tensor, " pairs"]:
    """
    α_j: how much of a pair's loss is that of the exchanged labels, (1 − α_j) ℓ(y_w, y_l) + α_j ℓ(y_l, y_w).

    - `certainty`: α_max · B_j / log 2. This library's: from 0 where the passes agree to α_max where they cannot
      disagree more.
    - `scaled`: 1 / (1 + n P_j) with n the number of eligible pairs. ½ for a pair of average probability, which then
      teaches nothing, and more for a less certain one, whose label it turns around.
    - `paper`: 1 / (1 + P_j), as arXiv:2409.11212 prints it. P_j is about 1/n, so that α_j is close to 1 and training
      turns nearly every label around; here to be able to show that.
    - `none`: 0, as in the authors' code.

    Args:
        uncertainty, probabilities (`torch.Tensor` of shape `(pairs,)`):
            B_j and P_j.
        eligible (`torch.Tensor` of shape `(pairs,)`):
            What P is a distribution over.
        mode (`str`, *optional*, defaults to `"certainty"`):
            One of the four.
        alpha_max (`float`, *optional*, defaults to `0.5`):
            α_max, of the first.

    Returns:
        `torch.Tensor` of shape `(pairs,)`: in [0, 1] and without gradient.
    """
    if mode == "none":
        return torch.zeros_like(uncertainty)
    if mode == "certainty":
        return alpha_max * (uncertainty / LN2).clamp(0.0, 1.0)
    count = eligible.sum() if mode == "scaled" else 1
    return 1 / (1 + count * probabilities)


@torch.no_grad()
def draw_pairs(
    uncertainty: Float[Tensor, " pairs"],
    eligible: Bool[Tensor, " pairs"],
    mu: float,
    rate: float,
    hard_rate: float,
    generator: torch.Generator,
) -> tuple[Shaped[Tensor, " easy"], Shaped[Tensor, " hard"]]:
    """
    Draw certain pairs by [`selection_probabilities`], and of the rest uncertain ones in proportion to B.

    Source: arXiv:2409.11212 and the authors' code, without replacement.

    Args:
        uncertainty, eligible (`torch.Tensor` of shape `(pairs,)`):
            B, and whose label the majority shares. Others are never drawn.
        mu (`float`):
            μ.
        rate (`float`), hard_rate (`float`):
            Shares of the eligible pairs to draw, rounded; where there are not as many left, all of them. At least one
            certain pair is drawn if there is an eligible one.
        generator (`torch.Generator`):
            On the tensors' device.

    Returns:
        Places of certain and of uncertain pairs, in the order of drawing.
    """

    def draw(weights: Tensor, share: float, least: int) -> Tensor:
        count = min(max(least, round(share * int(eligible.sum()))), int((weights > 0).sum()))
        if count == 0:
            return torch.empty(0, dtype=torch.long, device=weights.device)
        return torch.multinomial(weights, count, generator=generator)

    easy = draw(selection_probabilities(uncertainty, eligible, mu), rate, 1)
    left = eligible.index_fill(0, easy, False)
    return easy, draw(uncertainty * left, hard_rate, 0)


def halves(scores: list[float]) -> list[tuple[int, int]]:
    """
    Pairs of a prompt's responses: each of the upper half of scores as chosen, each of the lower half as rejected.

    Source: arXiv:2409.11212. With an odd number of responses, the middle one is in neither half. Pairs of equal scores
    are left out.

    Args:
        scores (`list[float]`):
            Without NaN.

    Returns:
        `list[tuple[int, int]]`: places of chosen and rejected.
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    half = len(order) // 2
    upper, lower = order[:half], order[len(order) - half :]
    return [(chosen, rejected) for chosen in upper for rejected in lower if scores[chosen] > scores[rejected]]
