"""Utilities of implicit rewards that f-divergences imply for supervised fine-tuning (arXiv:2507.00018)."""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

DIVERGENCES = ("tv", "pearson_chi2", "squared_hellinger", "jensen_shannon", "reverse_kl")
# Where φ is cut: short of the poles of squared Hellinger at −1 and of Jensen-Shannon at −ln 2, and, for reverse KL,
# whose φ is defined everywhere, where float32 would overflow
FLOORS = {
    "tv": -math.inf,
    "pearson_chi2": -math.inf,
    "squared_hellinger": -0.9,
    "jensen_shannon": -0.6,
    "reverse_kl": -60.0,
}


def utility(rewards: Float[Tensor, "*shape"], divergence: str) -> Float[Tensor, "*shape"]:
    """
    φ(x), what imitation maximizes of an implicit reward x.

    | divergence | φ(x) | φ'(x) | floor |
    |---|---|---|---|
    | `tv` | x | 1 | |
    | `pearson_chi2` | x − x²/4 | 1 − x/2 | |
    | `squared_hellinger` | x / (1 + x) | 1 / (1 + x)² | −0.9 |
    | `jensen_shannon` | log(2 − e⁻ˣ) | e⁻ˣ / (2 − e⁻ˣ) | −0.6 |
    | `reverse_kl` | −e^(−x−1) | e^(−x−1) | −60 |

    All are concave, with φ'(0) = 1, but 1/e for `reverse_kl`: a label that is already likelier than under the
    reference counts less, and `pearson_chi2` pushes it back from x = 2 on.

    Source: arXiv:2507.00018, whose objective E[φ(r)] this is for the conjugates of f-divergences. The table was
    derived from the standard conjugates and not compared with the paper's. Forward KL, φ = 1 + log x, is not here: it
    is undefined at x = 0, where training starts.

    Args:
        rewards (`torch.Tensor` of any shape):
            x = β · log(π_θ / π_ref), of a token or of a sequence.
        divergence (`str`):
            One of `DIVERGENCES`.

    Returns:
        `torch.Tensor` of the same shape, with gradient; below the floor φ is constant, without gradient.

    Raises:
        `ValueError`: if there is no such divergence.
    """
    x = rewards.clamp(min=_floor(divergence))
    if divergence == "tv":
        return x
    if divergence == "pearson_chi2":
        return x - x.square() / 4
    if divergence == "squared_hellinger":
        return x / (1 + x)
    if divergence == "jensen_shannon":
        return torch.log(2 - torch.exp(-x))
    return -torch.exp(-x - 1)


@torch.no_grad()
def utility_slope(rewards: Float[Tensor, "*shape"], divergence: str) -> Float[Tensor, "*shape"]:
    """φ'(x) of [`utility`], the weight on the gradient of supervised fine-tuning; 0 below the floor. Detached."""
    floor = _floor(divergence)
    x = rewards.clamp(min=floor)
    slope = {
        "tv": lambda: torch.ones_like(x),
        "pearson_chi2": lambda: 1 - x / 2,
        "squared_hellinger": lambda: (1 + x) ** -2,
        "jensen_shannon": lambda: 1 / (2 * torch.exp(x) - 1),
        "reverse_kl": lambda: torch.exp(-x - 1),
    }[divergence]()
    return slope.masked_fill(rewards < floor, 0.0)


def sequence_rewards(
    rewards: Float[Tensor, "batch time"], example_ids: Shaped[Tensor, "batch time"], num_examples: int
) -> Float[Tensor, " examples"]:
    """Σ_t x_t of each example. `rewards` must be 0 where there is no label; an example without labels has 0."""
    return rewards.new_zeros(num_examples).index_add(0, example_ids.flatten().long(), rewards.flatten())


def sequence_utility(
    rewards: Float[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time"],
    example_ids: Shaped[Tensor, "batch time"],
    num_examples: int,
    divergence: str,
) -> Float[Tensor, "batch time"]:
    """
    φ(X_e) of each example e, X_e = Σ_t x_t, shared out among its labels.

    At label t stand the value φ(X_e) / n_e, with n_e the example's number of labels, and the gradient φ'(X_e) · ∇x_t,
    so that the sum over an example has φ(X_e) as its value and ∇φ(X_e) as its gradient, and a weight on label t, such
    as another method's, weighs this label's part of the gradient.

    Args:
        rewards (`torch.Tensor` of shape `(batch, time)`):
            x_t, 0 where there is no label.
        mask (`torch.Tensor` of shape `(batch, time)`):
            Where there is a label.
        example_ids (`torch.Tensor` of shape `(batch, time)`):
            Which example a token belongs to, from 0 to `num_examples − 1`.
        num_examples (`int`):
            Number of examples.
        divergence (`str`):
            As in [`utility`].

    Returns:
        `torch.Tensor` of shape `(batch, time)`, 0 where there is no label.
    """
    labels = sequence_rewards(mask.to(rewards), example_ids, num_examples)
    total = sequence_rewards(rewards.detach(), example_ids, num_examples)
    share = (utility(total, divergence) / labels.clamp(min=1))[example_ids]
    through = utility_slope(total, divergence)[example_ids] * (rewards - rewards.detach())
    return (share + through) * mask


def _floor(divergence: str) -> float:
    if divergence not in FLOORS:
        raise ValueError(f"`divergence` must be one of {DIVERGENCES}, got {divergence!r}.")
    return FLOORS[divergence]
