"""Losses of SRPO's self-improvement game."""

from jaxtyping import Float
from torch import Tensor


def joint_loss(
    margin: Float[Tensor, " pairs"],
    chosen_after_rejected: Float[Tensor, " pairs"],
    rejected_after_chosen: Float[Tensor, " pairs"],
    beta: float,
) -> Float[Tensor, " pairs"]:
    """
    Where generator and improver meet: (½ − (β/2)·[h†(y_w|y_l) − h†(y_l|y_w) + Δ])².

    At the game's solution p(y_w ≻ y_l) − ½ is (β/2) times the bracket, and p = 1 for a labelled pair.

    Source: derived from the min-max objective of arXiv:2406.01660, see [`SrpoDPOTrainer`]; constants are not confirmed
    by released code.

    Args:
        margin (`torch.Tensor` of shape `(pairs,)`):
            Δ = h(y_w) − h(y_l), h(y) = log π_θ(y|x) − log π_ref(y|x), in nats per sequence.
        chosen_after_rejected, rejected_after_chosen (`torch.Tensor` of shape `(pairs,)`):
            h†(y_w|y_l) and h†(y_l|y_w), h†(a|b) = log π_θ(a|b, x) − log π_ref(a|b, x): the same for the answer a under
            the request to improve on b.
        beta (`float`):
            β > 0.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, with gradient in all three.
    """
    return (0.5 - beta / 2 * (chosen_after_rejected - rejected_after_chosen + margin)).square()


def improver_loss(
    chosen_after_rejected: Float[Tensor, " pairs"],
    rejected_after_rejected: Float[Tensor, " pairs"],
    chosen_after_chosen: Float[Tensor, " pairs"],
    rejected_after_chosen: Float[Tensor, " pairs"],
    beta: float,
) -> Float[Tensor, " pairs"]:
    """
    The improver alone: ½·[(½ − β(h†(y_w|y_l) − h†(y_l|y_l)))² + (½ − β(h†(y_w|y_w) − h†(y_l|y_w)))²].

    At the game's solution p(a ≻ b) is ½ + β(h†(a|b) − h†(b|b)), for b the rejected and for b the chosen answer: to
    repeat b is the even point from which improvement counts.

    Source: as [`joint_loss`].

    Args:
        chosen_after_rejected, rejected_after_rejected, chosen_after_chosen, rejected_after_chosen (`torch.Tensor` of
            shape `(pairs,)`):
            h† as above.
        beta (`float`):
            β > 0.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, with gradient in all four.
    """
    after_rejected = 0.5 - beta * (chosen_after_rejected - rejected_after_rejected)
    after_chosen = 0.5 - beta * (chosen_after_chosen - rejected_after_chosen)
    return (after_rejected.square() + after_chosen.square()) / 2
