"""From per-token log-probabilities to what pair losses compare: sequence sums, divergence scores, pair weights."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def sequence_logps(
    per_token_logps: Float[Tensor, "rows time"], mask: Shaped[Tensor, "rows time"], ld_alpha: float | None = None
) -> Float[Tensor, " rows"]:
    """
    Log-probability of each completion, its verbose part optionally counted less.

    With |y| the number of completion tokens of a row and l = min(|y_w|, |y_l|) of its pair,

    log π(y|x) = Σ_{t ≤ l} log π(y_t) + α · Σ_{t > l} log π(y_t)

    Source: LD-DPO (arXiv:2409.06411); without α, the plain sum.

    Args:
        per_token_logps (`torch.Tensor` of shape `(2·pairs, time)`):
            In nats; chosen rows first, then their rejected partners.
        mask (`torch.Tensor` of the same shape):
            1 at completion tokens. A row without any gives 0.
        ld_alpha (`float`, *optional*):
            α in [0, 1]. `None` or 1 counts all tokens alike.

    Returns:
        `torch.Tensor` of shape `(2·pairs,)`, in nats, with gradient.
    """
    if ld_alpha is None:
        return (per_token_logps * mask).sum(1)
    position = mask.cumsum(1)
    chosen_length, rejected_length = mask.sum(1).chunk(2)
    shared_length = torch.minimum(chosen_length, rejected_length).repeat(2).unsqueeze(1)
    shared = mask * (position <= shared_length)
    tail = mask * (position > shared_length)
    return (per_token_logps * shared).sum(1) + ld_alpha * (per_token_logps * tail).sum(1)


def divergence_score(
    logratios: Float[Tensor, " rows"], divergence: str = "reverse_kl", alpha: float = 0.5
) -> Float[Tensor, " rows"]:
    """
    f'(u) at u = π_θ(y|x) / π_ref(y|x), the reward that a divergence implies (up to β and a constant per prompt).

    - `reverse_kl`: log u
    - `forward_kl`: 1 − 1/u
    - `js_divergence`: log(2u / (1 + u))
    - `alpha_divergence`: (u^(α−1) − 1) / (α − 1), which tends to log u as α tends to 1

    Source: f-DPO (arXiv:2309.16240).

    Args:
        logratios (`torch.Tensor` of shape `(rows,)`):
            log u, in nats.
        divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            One of the four above.
        alpha (`float`, *optional*, defaults to `0.5`):
            α of the last.

    Returns:
        `torch.Tensor` of shape `(rows,)`, with gradient. The exponent of the α-divergence is bounded, so that the
        score stays finite.
    """
    if divergence == "forward_kl":
        return 1 - torch.exp(-logratios)
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(logratios)
    if divergence == "alpha_divergence" and abs(alpha - 1.0) >= 1e-6:
        bound = 11.0 if logratios.dtype == torch.float16 else 80.0
        power = ((alpha - 1.0) * logratios).float().clamp(max=bound).exp()
        return (power - 1.0).to(logratios.dtype) * (1.0 / (alpha - 1.0))
    return logratios


@torch.no_grad()
def wpo_weights(
    per_token_logps: Float[Tensor, "rows time"],
    log_sum_sq_probs: Float[Tensor, "rows time"],
    mask: Shaped[Tensor, "rows time"],
) -> Float[Tensor, " pairs"]:
    """
    Weight of each pair by how likely the current policy is to produce it.

    w(y) = exp(1/|y| Σ_t [log π(y_t) − log Σ_v π(v)²]),  weight of a pair = w(y_w) · w(y_l)

    Source: WPO (arXiv:2406.11827), equation 2, with sampled alignment.

    Args:
        per_token_logps, log_sum_sq_probs (`torch.Tensor` of shape `(2·pairs, time)`):
            log π(y_t) and log Σ_v π(v)², in nats; chosen rows first.
        mask (`torch.Tensor` of the same shape):
            1 at completion tokens. A row without any has w = 1.

    Returns:
        `torch.Tensor` of shape `(pairs,)`, without gradient.
    """
    aligned = (per_token_logps - log_sum_sq_probs) * mask
    chosen, rejected = torch.exp(aligned.sum(1) / mask.sum(1).clamp(min=1)).chunk(2)
    return chosen * rejected


def either_wrong(first: Float[Tensor, " pairs"] | None, second: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """
    Probability α that a label is wrong for one of two independent reasons: α = p(1 − q) + (1 − p)q.

    Wrong twice is right. `None` stands for p = 0.

    Args:
        first, second (`torch.Tensor` of shape `(pairs,)`):
            p and q in [0, 1].

    Returns:
        `torch.Tensor` of shape `(pairs,)`.
    """
    return second if first is None else first * (1 - second) + (1 - first) * second
