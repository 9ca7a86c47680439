"""Imitation term of RPO."""

from jaxtyping import Float, Shaped
from torch import Tensor

from ..masked import masked_mean


def sequence_nll(
    per_token_logps: Float[Tensor, "pairs time"], mask: Shaped[Tensor, "pairs time"], per_token: bool = False
) -> Float[Tensor, " pairs"]:
    """
    Negative log-likelihood of each baseline response under the policy.

    −Σ_t log π_θ(y_t|x, y_<t), or its mean over the |y| tokens of the response with `per_token`.

    Source: arXiv:2405.16436, the imitation term E_{y⁰~π_base}[−log π_θ(y⁰|x)] of the practical objective, with the
    chosen responses as y⁰. The sum is the paper's form, the mean that of the authors' later code.

    Args:
        per_token_logps (`torch.Tensor` of shape `(pairs, time)`):
            log π_θ(y_t) of the policy alone, in nats; the reference plays no part.
        mask (`torch.Tensor` of shape `(pairs, time)`):
            1 at the response's tokens. A response without any gives 0.
        per_token (`bool`, *optional*, defaults to `False`):
            Divide by the number of tokens.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, with gradient.
    """
    if per_token:
        return -masked_mean(per_token_logps, mask, dim=1)
    return -(per_token_logps * mask).sum(1)
