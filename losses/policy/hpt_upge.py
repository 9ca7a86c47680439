"""UPGE and HPT (arXiv:2509.04419): one policy gradient in four parts, and what each prompt learns from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .surrogate import log_importance_weights

MASKS = ("none", "clip", "cispo", "cap", "sequence")
DENOMINATORS = ("theta", "old", "one", "sequence")
ADVANTAGES = ("rollouts", "one", "sign")
SHAPES = ("none", "p_div_p_gamma")


@dataclass(frozen=True)
class Estimator:
    """
    A policy gradient as a row of the paper's table: mask · (1/denominator) · advantage · ∇π (Eq. 6).

    Args:
        mask (`str`):
            Stabilization mask, see [`stability`].
        denominator (`str`):
            What π is divided by, see [`log_weight`].
        advantage (`str`):
            `"rollouts"`, `"one"` or `"sign"`, see [`choose_advantages`].
        shape (`str`):
            Function of π/denominator whose gradient is taken, see [`magnitude`].
        settings (`dict`):
            TRL settings that belong to the method beside the four parts.
    """

    mask: str
    denominator: str
    advantage: str
    shape: str = "none"
    settings: Mapping[str, Any] = field(default_factory=dict)


# The paper's table. `cispo_minimax` is CISPO as published, where capped tokens keep a gradient. PPO takes its
# advantages, from a value function, as they come
INSTANCES: dict[str, Estimator] = {
    "sft": Estimator("none", "theta", "one"),
    "ppo": Estimator("clip", "old", "rollouts"),
    "grpo": Estimator("clip", "old", "rollouts"),
    "dapo": Estimator("clip", "old", "rollouts", settings={"loss_type": "dapo"}),
    "dr_grpo": Estimator("clip", "old", "rollouts", settings={"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "reinforce": Estimator("none", "theta", "sign"),
    "cispo": Estimator("cispo", "old", "rollouts"),
    "cispo_minimax": Estimator("cap", "old", "rollouts"),
    "gspo": Estimator("sequence", "sequence", "rollouts"),
    "srft": Estimator("none", "one", "rollouts"),
    "luffy": Estimator("none", "one", "rollouts", "p_div_p_gamma"),
}


def choose_advantages(
    kind: Literal["rollouts", "one", "sign"], advantages: Float[Tensor, "batch t"], rewards: Float[Tensor, " batch"]
) -> Float[Tensor, "batch _"]:
    """
    A of the estimator: the advantages at hand, 1, or the reward's sign.

    Args:
        kind (`str`):
            `"rollouts"`, `"one"` or `"sign"`, which is +1 for a reward above 0, else −1, and 0 where it is NaN.
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            What the rollouts' rewards gave.
        rewards (`torch.Tensor` of shape `(batch,)`):
            Rewards.
    """
    if kind == "rollouts":
        return advantages
    if kind == "one":
        return torch.ones_like(advantages)
    sign = torch.where(rewards.isnan(), 0.0, torch.where(rewards > 0, 1.0, -1.0))
    return sign.to(advantages).unsqueeze(1)


def log_weight(
    logps: Float[Tensor, "batch time"],
    log_ratio: Float[Tensor, "batch time"],
    mask: Shaped[Tensor, "batch time"],
    denominator: Literal["theta", "old", "one", "sequence"],
) -> Float[Tensor, "batch time"]:
    """
    log x of the weight x = π/denominator, without gradient.

    The denominator is π itself (x = 1), π_old (x = r), 1 (x = p, the token's probability), or what makes x the
    geometric mean s of r over the sequence (GSPO).

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            logπ in nats.
        log_ratio (`torch.Tensor` of shape `(batch, time)`):
            log r = logπ − logπ_old.
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens of the loss; the sequence's mean runs over these, and is log 1 where there are none.
        denominator (`str`):
            `"theta"`, `"old"`, `"one"` or `"sequence"`.
    """
    if denominator == "theta":
        return torch.zeros_like(logps)
    if denominator == "old":
        return log_ratio.detach()
    if denominator == "one":
        return logps.detach()
    return log_importance_weights(log_ratio.detach(), mask, "sequence").expand_as(logps)


def magnitude(
    log_x: Float[Tensor, "batch time"], shape: Literal["none", "p_div_p_gamma"], gamma: float = 0.1
) -> Float[Tensor, "batch time"]:
    """
    x·f'(x), the factor on ∇ logπ that the gradient of f(x) has.

    `"none"` is f(x) = x, so that it is x. `"p_div_p_gamma"` is f(x) = x/(x + γ), so that it is xγ/(x + γ)²: largest
    at x = γ and at most 1/4 (LUFFY, arXiv:2504.14945).

    Args:
        log_x (`torch.Tensor` of shape `(batch, time)`):
            log x.
        shape (`str`):
            `"none"` or `"p_div_p_gamma"`.
        gamma (`float`, *optional*, defaults to `0.1`):
            γ, greater than 0.
    """
    if shape == "none":
        return log_x.exp()
    distance = log_x - math.log(gamma)
    return torch.sigmoid(distance) * torch.sigmoid(-distance)


def stability(
    log_ratio: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch _"],
    mask: Shaped[Tensor, "batch time"],
    kind: Literal["none", "clip", "cispo", "cap", "sequence"],
    low: float | Float[Tensor, "batch l"],
    high: float | Float[Tensor, "batch h"],
    delta: float | Float[Tensor, "batch d"] | None = None,
) -> Float[Tensor, "batch time"]:
    """
    Stabilization mask, a factor in [0, 1] without gradient.

    - `"none"`: 1.
    - `"clip"`: 0 where A > 0 and r > `high`, or A < 0 and r < `low`, the tokens that PPO's minimum cuts off; with
      `delta`, also where A < 0 and r > `delta`.
    - `"sequence"`: the same with the geometric mean of r over the sequence.
    - `"cispo"`: 0 where r > `high`, whatever the sign of A: the tokens whose weight CISPO caps. The paper has the
      mask's name only; this is our reading.
    - `"cap"`: min(1, `high`/r), so that r times it is CISPO's capped weight min(r, `high`).

    Args:
        log_ratio (`torch.Tensor` of shape `(batch, time)`):
            log r = logπ − logπ_old.
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            A.
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens of the loss.
        kind (`str`):
            One of the above.
        low, high (`float`, or `torch.Tensor` that broadcasts against the ratio):
            Its range, 1 − ε_low and 1 + ε_high.
        delta (`float` or `torch.Tensor`, *optional*):
            Second upper bound (two-sided clipping), at least `high`.
    """
    log_ratio = log_ratio.detach()
    if kind == "none":
        return torch.ones_like(log_ratio)
    if kind == "cap":
        return torch.exp(torch.clamp(torch.as_tensor(high, dtype=log_ratio.dtype).log() - log_ratio, max=0.0))
    ratio = log_ratio.exp()
    if kind == "cispo":
        return (ratio <= high).to(ratio)
    if kind == "sequence":
        ratio = log_importance_weights(log_ratio, mask, "sequence").exp()
    cut = ((advantages > 0) & (ratio > high)) | ((advantages < 0) & (ratio < low))
    if delta is not None:
        cut = cut | ((advantages < 0) & (ratio > delta))
    return (~cut).to(log_ratio).expand_as(log_ratio)


def coefficient(
    estimator: Estimator,
    logps: Float[Tensor, "batch time"],
    log_ratio: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch _"],
    mask: Shaped[Tensor, "batch time"],
    low: float | Float[Tensor, "batch l"] = 0.8,
    high: float | Float[Tensor, "batch h"] = 1.2,
    delta: float | Float[Tensor, "batch d"] | None = None,
    gamma: float = 0.1,
) -> Float[Tensor, "batch time"]:
    """
    c = mask · A · x·f'(x) with x = π/denominator, so that Σ c ∇ logπ is the gradient of Eq. 6. Without gradient.

    Args:
        estimator ([`Estimator`]):
            The four parts.
        logps, log_ratio, mask, low, high, delta:
            As in [`log_weight`] and [`stability`].
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            A, as [`choose_advantages`] gives it.
        gamma (`float`, *optional*, defaults to `0.1`):
            γ of the shape.

    Returns:
        `torch.Tensor` of shape `(batch, time)`: 0 outside the loss mask.
    """
    advantages = advantages.detach()
    stable = stability(log_ratio, advantages, mask, estimator.mask, low, high, delta)
    weight = magnitude(log_weight(logps, log_ratio, mask, estimator.denominator), estimator.shape, gamma)
    # A masked token's weight may be infinite
    return torch.where((stable > 0) & mask.bool(), stable * weight * advantages, 0.0)


def coefficient_loss(
    coefficients: Float[Tensor, "batch time"], logps: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """
    −sg[c]·logπ per token. Its gradient is −c ∇ logπ; its value says nothing.

    Args:
        coefficients (`torch.Tensor` of shape `(batch, time)`):
            c, see [`coefficient`].
        logps (`torch.Tensor` of shape `(batch, time)`):
            logπ, with gradient.
    """
    return -coefficients.detach() * logps


# --- HPT ----------------------------------------------------------------------------------------------------------

# Of eight rows, the demonstration included, so many are right: weight of RL, of off-policy RL on the demonstration,
# and of SFT on it. The released code's table; with none right, which it does not have, as with one
SOFT_WEIGHTS = (
    (0.0, 0.0, 1.0),
    (0.0, 0.0, 1.0),
    (0.125, 0.5, 0.5),
    (0.25, 1.0, 0.25),
    (0.5, 0.5, 0.125),
    (1.0, 0.25, 0.0),
    (1.0, 0.125, 0.0),
    (1.0, 0.0, 0.0),
    (1.0, 0.0, 0.0),
)


def switch_weights(demonstrated: Bool[Tensor, " rows"]) -> Float[Tensor, "rows three"]:
    """Weights of RL, off-policy RL and SFT: (0, 0, 1) for the prompts of Eq. 10's β = 1, else (1, 0, 0)."""
    demonstrated = demonstrated.float()
    return torch.stack([1 - demonstrated, torch.zeros_like(demonstrated), demonstrated], dim=1)


def soft_weights(performance: Float[Tensor, " rows"]) -> Float[Tensor, "rows three"]:
    """
    Weights of RL, off-policy RL and SFT, from [`SOFT_WEIGHTS`] at the nearest eighth.

    Args:
        performance (`torch.Tensor` of shape `(rows,)`):
            Mean score of the row's group, the demonstration included. NaN counts as 1: nothing is known of the prompt.
    """
    eighths = torch.round(8 * torch.nan_to_num(performance, nan=1.0)).clamp(0, 8).long()
    return torch.tensor(SOFT_WEIGHTS, device=performance.device)[eighths]
