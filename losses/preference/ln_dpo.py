"""Length normalization of LN-DPO."""

from jaxtyping import Float, Shaped
from torch import Tensor


def length_divisor(lengths: Shaped[Tensor, " rows"], power: float = 1.0) -> Float[Tensor, " rows"]:
    """
    What a sequence's score is divided by: |y|^p, in tokens.

    Source: arXiv:2407.15229, the LN-DPO objective, where p = 1; p = 0 is DPO, values between are this library's.

    Args:
        lengths (`torch.Tensor` of shape `(rows,)`):
            Number of scored completion tokens |y|, with EOS. An empty completion counts as 1.
        power (`float`, *optional*, defaults to `1.0`):
            p in [0, 1].

    Returns:
        `torch.Tensor` of shape `(rows,)`, at least 1 and without gradient.
    """
    return lengths.clamp(min=1).float() ** power
