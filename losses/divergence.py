"""Divergences between the next-token distributions of two models, from their hidden states."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


@dataclass
class LazyLogits:
    """
    What logits are made of; they are formed tile by tile where needed and never exist for a whole batch.

    logits = softcap(logit_scale · (hidden · weightᵀ + bias)), with softcap(x) = c · tanh(x / c).

    Args:
        hidden (`torch.Tensor` of shape `(batch, time, hidden)`):
            Final hidden states.
        weight (`torch.Tensor` of shape `(vocab, hidden)`), bias (`torch.Tensor` of shape `(vocab,)`, *optional*):
            LM head.
        logit_scale (`float`, *optional*, defaults to `1.0`), softcap (`float`, *optional*):
            What the architecture applies to its logits, in this order.
    """

    hidden: Float[Tensor, "batch time hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def token_kl(
    policy: LazyLogits, reference: LazyLogits, mask: Bool[Tensor, "batch time"], reverse: bool = False
) -> Float[Tensor, "batch time"]:
    """
    Kullback-Leibler divergence between policy and reference at every masked-in position, over the full vocabulary.

    With p the policy's and q the reference's next-token distribution: KL(q ‖ p) = Σ_v q(v) · (log q(v) − log p(v)),
    or KL(p ‖ q) with `reverse`. Only positions in `mask` are projected.

    Args:
        policy (`LazyLogits`):
            The trained model; gradient flows to its hidden states and head.
        reference (`LazyLogits`):
            The frozen model; it gets no gradient.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Where a divergence is wanted.
        reverse (`bool`, *optional*, defaults to `False`):
            KL(p ‖ q) instead of KL(q ‖ p).

    Returns:
        `torch.Tensor` of shape `(batch, time)`, `float32`, in nats; 0 outside `mask`, and, where `mask` is empty,
        a zero that is still connected to the policy.
    """
    divergence, _ = ChunkedDivergenceFunction.apply(
        policy.hidden[mask],
        policy.weight,
        policy.bias,
        reference.hidden[mask],
        reference.weight,
        reference.bias,
        1.0 if reverse else 0.0,
        1.0,
        policy.logit_scale,
        policy.softcap,
        reference.logit_scale,
        reference.softcap,
    )
    return divergence.new_zeros(mask.shape).masked_scatter(mask, divergence)
