"""GAIN-RL (arXiv:2506.02281): how concentrated the angles between a model's token vectors are."""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor


def mean_pairwise_cosine(
    vectors: Float[Tensor, "batch time hidden"], mask: Shaped[Tensor, "batch time"]
) -> Float[Tensor, " batch"]:
    """
    Mean cosine between the vectors of two different tokens of a sequence, in [-1, 1].

    With unit vectors x̂ over T tokens, Σ_{i≠j} cos(x_i, x_j) = ‖Σ x̂‖² − Σ ‖x̂‖², so that no (T, T) matrix is needed.

    Args:
        vectors (`torch.Tensor` of shape `(batch, time, hidden)`):
            Token vectors.
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens that take part.

    Returns:
        `torch.Tensor` of shape `(batch,)`, NaN for sequences of fewer than two tokens.
    """
    units = _units(vectors, mask)
    count = mask.sum(1).to(units.dtype)
    pairs = units.sum(1).square().sum(-1) - units.square().sum((1, 2))
    return torch.where(count > 1, pairs / (count * (count - 1)).clamp(min=1.0), torch.nan)


def mean_cross_cosine(
    vectors: Float[Tensor, "batch time hidden"],
    first: Shaped[Tensor, "batch time"],
    second: Shaped[Tensor, "batch time"],
) -> Float[Tensor, " batch"]:
    """Mean cosine between a token of mask `first` and one of mask `second`; 0 where either is empty."""
    left, right = _units(vectors, first).sum(1), _units(vectors, second).sum(1)
    pairs = first.sum(1) * second.sum(1)
    return (left * right).sum(-1) / pairs.clamp(min=1).to(left.dtype)


def prefill_signal(
    vectors: Float[Tensor, "batch time hidden"],
    prefix: Shaped[Tensor, "batch time"],
    question: Shaped[Tensor, "batch time"],
    inter_weight: float = 1.0,
) -> Float[Tensor, " batch"]:
    """
    Signal of a prompt: C = C_intra + w · C_inter (Sec. 3).

    C_intra is the mean cosine between tokens of the question, C_inter that between its tokens and those of the prefix
    (system prompt, earlier turns).

    Args:
        vectors (`torch.Tensor` of shape `(batch, time, hidden)`):
            Input of the last layer's MLP at the prompt's tokens.
        prefix, question (`torch.Tensor` of shape `(batch, time)`):
            Masks of the two parts; padding is in neither.
        inter_weight (`float`, *optional*, defaults to `1.0`):
            w; 8 in the released code.

    Returns:
        `torch.Tensor` of shape `(batch,)`, NaN for questions of fewer than two tokens.
    """
    return mean_pairwise_cosine(vectors, question) + inter_weight * mean_cross_cosine(vectors, question, prefix)


def _units(vectors: Tensor, mask: Tensor) -> Tensor:
    # Padding may hold anything, NaN included
    return torch.nn.functional.normalize(vectors.float(), dim=-1).masked_fill(mask.unsqueeze(-1) == 0, 0.0)
