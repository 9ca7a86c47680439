"""OBLR-PO (arXiv:2511.23310): the baseline of least variance, and a learning rate for the noise of the gradient."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from .groups import by_group, from_groups


def logit_energy(
    logps: Float[Tensor, "batch time"],
    sum_of_squares: Float[Tensor, "batch time"],
    mask: Shaped[Tensor, "batch time"],
) -> Float[Tensor, " batch"]:
    """
    W = Σ_t (1 − 2 p_t + Σ_v p_t(v)²), a stand-in for the squared norm of a sequence's score ∇ logπ.

    Each summand is |∂ log p_t / ∂ logits|², the squared norm of onehot − p_t; products between different tokens are
    left out. Without gradient; 0 for a row without tokens.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            log p_t of the sampled tokens, in nats, under the distribution that sampled them.
        sum_of_squares (`torch.Tensor` of shape `(batch, time)`):
            Σ_v p_t(v)², from [`~papertrl.losses.head.sum_of_squares`].
        mask (`torch.Tensor` of shape `(batch, time)`):
            1 on tokens of the loss.
    """
    p = logps.exp()
    # As (1 − p)² + what the other tokens add, so that rounding cannot make it negative
    energy = (1 - p).square() + (sum_of_squares - p.square()).clamp(min=0.0)
    return (energy * mask).sum(1).detach()


def optimal_baseline(
    rewards: Float[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
    group_ids: Int[Tensor, " rows"],
    leave_one_out: bool,
) -> Float[Tensor, " rows"]:
    """
    b = Σ_j W_j R_j / Σ_j W_j over a row's group, which minimizes E |(R − b) ∇ logπ|² for W = |∇ logπ|².

    Args:
        rewards (`torch.Tensor` of shape `(rows,)`):
            R; rows with NaN do not take part.
        weights (`torch.Tensor` of shape `(rows,)`):
            W, at least 0. Where they sum to 0, the plain mean is taken.
        group_ids (`torch.Tensor` of shape `(rows,)`):
            Rows of one prompt share an id.
        leave_one_out (`bool`):
            Whether the sums leave out the row itself, so that its baseline does not depend on it and the gradient is
            unbiased. The baseline of a row that is alone is then 0.
    """
    grouped = by_group(rewards, group_ids).double()
    counts = (~grouped.isnan()).double()
    values = grouped.nan_to_num()
    weights = by_group(weights, group_ids).nan_to_num().double() * counts
    # Sums over the others themselves, not total minus own: a row may hold nearly all of the weight
    others = torch.ones(grouped.shape[1], grouped.shape[1], dtype=torch.float64, device=rewards.device)
    if leave_one_out:
        others.fill_diagonal_(0.0)
    total = weights @ others
    plain = (values @ others) / (counts @ others).clamp(min=1.0)
    baseline = torch.where(total > 0, (weights * values) @ others / total, plain)
    return from_groups(baseline, group_ids).to(rewards.dtype)


def gradient_noise(
    square: Float[Tensor, ""], sum_of_squares: Float[Tensor, ""], micro_batches: int, ranks: int = 1
) -> Float[Tensor, ""]:
    """
    Unbiased estimate of V = E |G − E G|² for an update's gradient G = Σ_m g_m / ranks of independent, alike g_m.

    V = n/(n−1) · (Σ_m |g_m|² / ranks² − |G|²/n), n being the number of g_m; at least 0 up to rounding.

    Args:
        square (0-d `torch.Tensor`):
            |G|².
        sum_of_squares (0-d `torch.Tensor`):
            Σ_m |g_m|² over all micro-batches of all ranks.
        micro_batches (`int`):
            n, at least 2.
        ranks (`int`, *optional*, defaults to `1`):
            Processes whose gradients are averaged.
    """
    scatter = sum_of_squares / ranks**2 - square / micro_batches
    return (micro_batches / (micro_batches - 1) * scatter).clamp(min=0.0)


def snr_multiplier(square: Float[Tensor, ""], noise: Float[Tensor, ""], minimum: float) -> Float[Tensor, ""]:
    """
    SNR / (1 + SNR) with SNR = max(|G|² − V, 0) / V, at least `minimum`: the best step size over 1/L.

    It maximizes η |∇J|² − (L η²/2)(|∇J|² + V), the progress that an L-smooth objective guarantees. 1 where neither
    signal nor noise is left, since nothing moves there.

    Args:
        square, noise (0-d `torch.Tensor`):
            |G|², of which V is noise, and V.
        minimum (`float`):
            Floor, without which a start that is all noise never moves.
    """
    signal = (square - noise).clamp(min=0.0)
    both = signal + noise
    return torch.where(both > 0, signal / both, torch.ones_like(both)).clamp(min=minimum)
