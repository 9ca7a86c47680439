"""Guide-GRPO (arXiv:2506.13923): completions sampled with a hint, trained as if there had been none."""

import torch
from jaxtyping import Float
from torch import Tensor


def reshape_ratio(ratio: Float[Tensor, "*tokens"], gamma: Float[Tensor, ""] | float) -> Float[Tensor, "*tokens"]:
    """
    f(r) = r / (r + γ), the bounded stand-in for the ratio of guided tokens.

    Its derivative times r, the weight of ∇ logπ, is rγ/(r + γ)²: largest at r = γ, there 1/4, and 0 at both ends.

    Args:
        ratio (`torch.Tensor`):
            r = π(o|q) / π_old(o|q, hint) ≥ 0, with gradient.
        gamma (`float` or 0-d `torch.Tensor`):
            γ > 0, without gradient.
    """
    return ratio / (ratio + gamma)


def percentile_gamma(ratios: Float[Tensor, " tokens"], level: float) -> Float[Tensor, ""]:
    """
    γ as a quantile of the guided ratios, at least 1e-4; without gradient. Without tokens it is 1e-4.

    Args:
        ratios (`torch.Tensor` of shape `(tokens,)`):
            Ratios of the guided tokens of the loss: no padding.
        level (`float`):
            Level of the quantile, in (0, 1], linearly interpolated.
    """
    ratios = ratios.detach()
    if ratios.numel() == 0:
        return ratios.new_tensor(1e-4)
    return torch.quantile(ratios, level).clamp(min=1e-4)
