"""
Per-token policy-gradient losses and divergence estimates.

In all of them logπ is the policy's log-probability of the sampled token in nats, r = π/π_old, A the advantage. The
gradient is a coefficient times ∇ logπ; what is held fixed is said where it matters.
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def log_importance_weights(
    log_ratio: Float[Tensor, "batch time"], mask: Shaped[Tensor, "batch time"], level: Literal["token", "sequence"]
) -> Float[Tensor, "batch time_or_one"]:
    """
    log r per token, or its mean over each sequence's tokens (GSPO, arXiv:2507.18071, Eq. 7).

    Args:
        log_ratio (`torch.Tensor` of shape `(batch, time)`):
            logπ − logπ_old.
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens of the loss. An empty row has weight log 1.
        level (`str`):
            `"token"` or `"sequence"`.

    Returns:
        `torch.Tensor` of shape `(batch, time)` or, for sequences, `(batch, 1)`.
    """
    if level == "token":
        return log_ratio
    return ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)


def clipped_surrogate(
    ratio: Float[Tensor, "batch t"],
    advantages: Float[Tensor, "batch a"],
    epsilon_low: float | Float[Tensor, "batch c"],
    epsilon_high: float | Float[Tensor, "batch c"],
    delta: float | Float[Tensor, "batch d"] | None = None,
) -> Float[Tensor, "batch _"]:
    """
    PPO's loss −min(rA, clip(r, 1−ε_low, 1+ε_high)·A), with r ≤ δ in the first part (arXiv:1707.06347, Eq. 7).

    Args:
        ratio (`torch.Tensor` of shape `(batch, time)` or `(batch, 1)`):
            r, with gradient.
        advantages (`torch.Tensor` of shape `(batch, time)` or `(batch, 1)`):
            A, without gradient.
        epsilon_low, epsilon_high (`float`, or both `torch.Tensor` that broadcast against `ratio`):
            Clip range; infinite where nothing is clipped.
        delta (`float` or `torch.Tensor`, *optional*):
            Upper bound of the unclipped part (two-sided clipping).
    """
    bounded = ratio if delta is None else torch.clamp(ratio, max=delta)
    clipped = torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high)
    return -torch.min(bounded * advantages, clipped * advantages)


def cispo_surrogate(
    ratio: Float[Tensor, "batch t"],
    advantages: Float[Tensor, "batch a"],
    logps: Float[Tensor, "batch time"],
    epsilon_high: float | Float[Tensor, "batch c"],
) -> Float[Tensor, "batch time"]:
    """−min(r, ε_high)·A·logπ with the clipped ratio held fixed (CISPO, arXiv:2506.13585, Eq. 4)."""
    return -torch.clamp(ratio, max=epsilon_high).detach() * advantages * logps


def sapo_surrogate(
    ratio: Float[Tensor, "batch t"],
    advantages: Float[Tensor, "batch a"],
    temperature_pos: float,
    temperature_neg: float,
) -> Float[Tensor, "batch _"]:
    """−(4/τ)·σ(τ(r−1))·A with τ by the sign of A (SAPO, arXiv:2511.20347)."""
    tau = torch.where(advantages > 0, temperature_pos, temperature_neg)
    return -torch.sigmoid(tau * (ratio - 1)) * 4 / tau * advantages


def kl_estimate(
    logps: Float[Tensor, "batch time"],
    ref_logps: Float[Tensor, "batch time"],
    estimator: Literal["k2", "k3"] = "k3",
) -> Float[Tensor, "batch time"]:
    """
    Per-token estimate of KL(π ‖ π_ref) at the sampled token (http://joschu.net/blog/kl-approx.html).

    With d = logπ_ref − logπ: `"k3"` is exp(d) − d − 1, `"k2"` is d²/2.

    Args:
        logps, ref_logps (`torch.Tensor` of shape `(batch, time)`):
            logπ with gradient, logπ_ref without.
        estimator (`str`, *optional*, defaults to `"k3"`):
            Which estimate.
    """
    difference = ref_logps - logps
    if estimator == "k2":
        return 0.5 * difference.square()
    return torch.exp(difference) - difference - 1
