"""Lp-Reg (arXiv:2510.03222): keep low-probability tokens that are not noise from dying out."""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

# log-probability under the proxy of a token that the filter removed; finite, so that masked arithmetic is
NOISE_LOGP = -1e4
_MAX_LOG_RATIO = 20.0
# Difference between the log-probabilities of one token in two passes that counts as none
_ROUNDING = 1e-5


def proxy_logps(
    logps: Float[Tensor, "batch time"],
    log_threshold: Float[Tensor, "batch time"],
    log_kept_mass: Float[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """
    Log-probability of the sampled tokens under the proxy q: the sampling distribution without its noise tail.

    With p the distribution that sampled token o, τ the filter threshold and S = Σ_{p(v) ≥ τ} p(v): log q(o) =
    log p(o) − log S if p(o) ≥ τ (Eq. 4 and 5), else [`NOISE_LOGP`].

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            log p(o), in nats.
        log_threshold, log_kept_mass (`torch.Tensor` of shape `(batch, time)`):
            log τ and log S, from [`~papertrl.losses.head.kept_mass`].

    Returns:
        `torch.Tensor` of shape `(batch, time)`, without gradient.
    """
    # Two passes over the same token may round differently: a token at the threshold is kept
    kept = logps >= log_threshold - _ROUNDING
    return torch.where(kept, logps - log_kept_mass, NOISE_LOGP).detach()


def lowest_share(logps: Float[Tensor, " tokens"], rho: float) -> Float[Tensor, ""]:
    """
    Largest log-probability among the `max(1, floor(rho · tokens))` smallest ones: δ_ρ of Eq. 6. `-inf` for no tokens.
    """
    if logps.numel() == 0:
        return logps.new_tensor(-torch.inf)
    return torch.kthvalue(logps, max(1, int(rho * logps.numel()))).values


def protected_tokens(
    logps: Float[Tensor, "batch time"],
    proxy: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch _"],
    mask: Shaped[Tensor, "batch time"],
    log_delta: Float[Tensor, "batch one"],
) -> Bool[Tensor, "batch time"]:
    """
    Tokens that Lp-Reg protects (Eq. 6): A < 0, π ≤ δ_ρ, not noise, and π < q.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            Current logπ. Its gradient is not used.
        proxy (`torch.Tensor` of shape `(batch, time)`):
            log q, see [`proxy_logps`].
        advantages (`torch.Tensor` of shape `(batch, 1)` or `(batch, time)`):
            A.
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens of the loss.
        log_delta (`torch.Tensor` of shape `(batch, 1)`):
            log δ_ρ, see [`lowest_share`].
    """
    logps = logps.detach()
    # Where the filter removed nothing, q is p up to rounding, and the strict comparison has to fail
    below = logps < proxy - _ROUNDING
    return mask.bool() & (advantages < 0) & (logps <= log_delta) & (proxy > NOISE_LOGP) & below


def forward_kl_penalty(
    logps: Float[Tensor, "batch time"], proxy: Float[Tensor, "batch time"]
) -> Float[Tensor, "batch time"]:
    """
    Estimate of KL(q ‖ π) at the sampled token: clip(exp(d) − d − 1, −10, 10) with d = log q − logπ (Eq. 6).

    Over o ~ π its gradient 1 − q/π has the forward KL's mean. It vanishes at π = q and, by the clip, where d > 2.6.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            logπ in nats, with gradient.
        proxy (`torch.Tensor` of shape `(batch, time)`):
            log q, without gradient.
    """
    difference = torch.clamp(proxy - logps, max=_MAX_LOG_RATIO)
    return torch.clamp(torch.exp(difference) - difference - 1, min=-10.0, max=10.0)
