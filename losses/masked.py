"""Means and sums over masked positions."""

from jaxtyping import Float, Shaped
from torch import Tensor


def masked_mean(
    values: Float[Tensor, "*shape"], mask: Shaped[Tensor, "*shape"], dim: int | None = None
) -> Float[Tensor, "..."]:
    """
    Mean of `values` where `mask` is non-zero; 0 where nothing is (still connected to the graph).

    Args:
        values (`torch.Tensor` of any shape):
            Finite everywhere, also where masked.
        mask (`torch.Tensor` of the same shape):
            1 where a value counts, 0 elsewhere.
        dim (`int`, *optional*):
            Dimension to reduce; all of them by default.
    """
    mask = mask.to(values.dtype)
    if dim is None:
        return (values * mask).sum() / mask.sum().clamp(min=1.0)
    return (values * mask).sum(dim) / mask.sum(dim).clamp(min=1.0)
