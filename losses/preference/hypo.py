"""Reverse-KL penalty on the policy's own samples, of HyPO."""

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def online_kl_weights(
    log_ratios: Float[Tensor, "prompts samples"], estimator: str = "rloo", clip: float | None = None
) -> Float[Tensor, "prompts samples"]:
    """
    Weight of each sample in the policy gradient of KL(π_θ ‖ π_ref).

    With K_i = log π_θ(y_i|x) − log π_ref(y_i|x) for y_i ~ π_θ(·|x),

    - `rloo`: w_i = K_i − mean_{j≠i} K_j, over the other samples of the same prompt
    - `reinforce`: w_i = K_i

    E[w_i ∇ log π_θ(y_i|x)] = ∇ KL(π_θ ‖ π_ref | x) for both: the baseline is independent of y_i, and the derivative of
    log π_θ inside K has zero mean.

    Source: arXiv:2406.01462, the online term of HyPO; the clip is this library's option.

    Args:
        log_ratios (`torch.Tensor` of shape `(prompts, samples)`):
            K, summed over the completion's tokens, in nats.
        estimator (`str`, *optional*, defaults to `"rloo"`):
            `"rloo"`, which needs at least two samples per prompt, or `"reinforce"`.
        clip (`float`, *optional*):
            Bound K to [−clip, clip] first. This biases the estimate.

    Returns:
        `torch.Tensor` of shape `(prompts, samples)`, in nats and without gradient.
    """
    if clip is not None:
        log_ratios = log_ratios.clamp(-clip, clip)
    if estimator == "reinforce":
        return log_ratios.clone()
    others = log_ratios.shape[1] - 1
    return log_ratios - (log_ratios.sum(1, keepdim=True) - log_ratios) / others
