"""Chase between the fast and the slow module of OFS-DPO (arXiv:2406.05534)."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def chase(
    fast_margins: Float[Tensor, " pairs"],
    slow_margins: Float[Tensor, " pairs"],
    beta: float,
    clip: float | None = None,
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """
    The term L_FS of each pair, once for either module, the other one detached.

    L_FS = −log σ(β(Δ_F − Δ_S)), which the fast module minimizes (+α, it widens its lead) and the slow one maximizes
    (−α, it closes the gap). Both raise the owner's margin: with these signs the derivatives by Δ_F and by Δ_S are both
    −αβ·σ(−β(Δ_F − Δ_S)). Not detached, they would cancel in the sum.

    Source: arXiv:2406.05534, Eqs. 3 to 6, by way of a re-implementation that cites them; the clip is from there.

    Args:
        fast_margins, slow_margins (`torch.Tensor` of shape `(pairs,)`):
            Δ of the two modules, in nats per pair, or on the scale that the base loss has.
        beta (`float`):
            β.
        clip (`float`, *optional*):
            Bound β(Δ_F − Δ_S) to [−clip, clip]; beyond, there is no gradient, so that the modules do not drive each
            other on without limit.

    Returns:
        Two `torch.Tensor` of shape `(pairs,)`, equal in value: the first with gradient to the fast margins alone, the
        second to the slow ones alone.
    """

    def loss(gap: Tensor) -> Tensor:
        gap = beta * gap
        return -F.logsigmoid(gap if clip is None else gap.clamp(-clip, clip))

    return loss(fast_margins - slow_margins.detach()), loss(fast_margins.detach() - slow_margins)
