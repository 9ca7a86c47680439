"""Token weight of Dynamic Fine-Tuning (DFT, arXiv:2508.05629), which Anchored Supervised Fine-Tuning builds on."""

from jaxtyping import Float
from torch import Tensor


def dft_weight(log_probs: Float[Tensor, "batch time"], power: float) -> Float[Tensor, "batch time"]:
    """
    Weight that turns the negative log-likelihood of a label into the DFT loss.

    w_t = sg(p_t(y_t)^a). With a = 1 (arXiv:2508.05629; the first term of ASFT, arXiv:2509.23753) the gradient of
    −w_t · log p_t is −∇p_t: it vanishes for labels the model holds impossible, which plain fine-tuning, a = 0,
    weighs by 1/p_t. Other powers are this library's own and interpolate between the two.

    Args:
        log_probs (`torch.Tensor` of shape `(batch, time)`):
            log p_t(y_t) of the labels, in nats.
        power (`float`):
            The exponent a ≥ 0.

    Returns:
        `torch.Tensor` of shape `(batch, time)` in (0, 1], detached. At positions without a label, whose `log_probs`
        are 0, it is 1.
    """
    return (power * log_probs.detach()).exp()
