"""Weight of a pair by how near its chosen completion stays to the prompt, of Sem-DPO."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def semantic_distance(
    source: Float[Tensor, "pairs dim"], target: Float[Tensor, "pairs dim"]
) -> Float[Tensor, " pairs"]:
    """
    d(x, y_w) = 1 − cos(e(x), e(y_w)), in [0, 2].

    Source: arXiv:2507.20133, the distance in the weight of Sem-DPO.

    Args:
        source, target (`torch.Tensor` of shape `(pairs, dim)`):
            e(x) and e(y_w), of any length. A vector that is zero or not finite has cosine 0, hence distance 1.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, without gradient.
    """
    usable = source.isfinite().all(1) & target.isfinite().all(1)
    cosine = F.cosine_similarity(source, target, dim=1).clamp(-1, 1)
    return 1 - cosine.where(usable, 0)


@torch.no_grad()
def semantic_weights(distances: Float[Tensor, " pairs"], alpha: float) -> Float[Tensor, " pairs"]:
    """
    W = exp(−α·d), in [e^(−2α), 1].

    Source: arXiv:2507.20133, the weight of Sem-DPO. The weights are not divided by their mean.

    Args:
        distances (`torch.Tensor` of shape `(pairs,)`):
            d in [0, 2].
        alpha (`float`):
            α ≥ 0; 0 gives 1.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, without gradient.
    """
    return torch.exp(-alpha * distances)
