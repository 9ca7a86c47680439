"""
The losses of a preference pair that `DPOConfig.loss_type` names, one value per pair.

Every function declares by the names of its arguments what it needs, so that a caller with all of them at hand can look
up a loss in `PAIR_LOSSES` and call it with [`call_pair_loss`]. Names, and notation of the equations:

- `margin`: Δ = s(y_w) − s(y_l); `chosen_scores`, `rejected_scores`: s(y_w), s(y_l). For the reverse KL divergence a
  score is the log-ratio.
- `chosen_logratios`, `rejected_logratios`: h = log π_θ(y|x) − log π_ref(y|x), summed over tokens, in nats.
- `chosen_logps` …, `ref_chosen_logps` …: the two parts of h; those of the reference carry no gradient.
- `chosen_lengths`, `rejected_lengths`: number of completion tokens.
- `beta`: β > 0; `label_smoothing`: ε.

Nothing is detached. Where lengths divide, an empty completion counts as length 1.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def sigmoid(margin: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """DPO (arXiv:2305.18290), equation 7: −log σ(βΔ)."""
    return -F.logsigmoid(beta * margin)


def hinge(margin: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """SLiC (arXiv:2305.10425), normalized by RSO (arXiv:2309.06657): max(0, 1 − βΔ)."""
    return torch.relu(1 - beta * margin)


def ipo(
    chosen_scores: Float[Tensor, " pairs"],
    rejected_scores: Float[Tensor, " pairs"],
    chosen_lengths: Shaped[Tensor, " pairs"],
    rejected_lengths: Shaped[Tensor, " pairs"],
    beta: float,
) -> Float[Tensor, " pairs"]:
    """IPO (arXiv:2310.12036), equation 17, per token: (s(y_w)/|y_w| − s(y_l)/|y_l| − 1/(2β))²."""
    margin = chosen_scores / chosen_lengths.clamp(min=1) - rejected_scores / rejected_lengths.clamp(min=1)
    return (margin - 1 / (2 * beta)) ** 2


def sigmoid_norm(
    chosen_scores: Float[Tensor, " pairs"],
    rejected_scores: Float[Tensor, " pairs"],
    chosen_lengths: Shaped[Tensor, " pairs"],
    rejected_lengths: Shaped[Tensor, " pairs"],
    beta: float,
) -> Float[Tensor, " pairs"]:
    """DPO on scores per token: −log σ(β(s(y_w)/|y_w| − s(y_l)/|y_l|))."""
    margin = chosen_scores / chosen_lengths.clamp(min=1) - rejected_scores / rejected_lengths.clamp(min=1)
    return -F.logsigmoid(beta * margin)


def exo_pair(margin: Float[Tensor, " pairs"], beta: float, label_smoothing: float) -> Float[Tensor, " pairs"]:
    """EXO (arXiv:2402.00856), equation 16 with two candidates: KL((σ(βΔ), σ(−βΔ)) ‖ (1 − ε, ε)); ε in (0, 1)."""
    epsilon = torch.tensor(label_smoothing, device=margin.device)
    kept = torch.sigmoid(beta * margin) * (F.logsigmoid(beta * margin) - torch.log1p(-epsilon))
    flipped = torch.sigmoid(-beta * margin) * (F.logsigmoid(-beta * margin) - torch.log(epsilon))
    return kept + flipped


def nca_pair(
    chosen_logratios: Float[Tensor, " pairs"], rejected_logratios: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """NCA (arXiv:2402.05369), pairwise: −log σ(βh_w) − ½ log σ(−βh_w) − ½ log σ(−βh_l)."""
    chosen, rejected = beta * chosen_logratios, beta * rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def robust(margin: Float[Tensor, " pairs"], beta: float, label_smoothing: float) -> Float[Tensor, " pairs"]:
    """Robust DPO (arXiv:2403.00409): [−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε); ε in [0, ½)."""
    clean = -(1 - label_smoothing) * F.logsigmoid(beta * margin)
    flipped = label_smoothing * F.logsigmoid(-beta * margin)
    return (clean + flipped) / (1 - 2 * label_smoothing)


def bco_pair(
    chosen_logratios: Float[Tensor, " pairs"], rejected_logratios: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """BCO (arXiv:2404.04656) without reward shift: −log σ(βh_w) − log σ(−βh_l)."""
    return -F.logsigmoid(beta * chosen_logratios) - F.logsigmoid(-(beta * rejected_logratios))


def sppo_hard(
    chosen_logratios: Float[Tensor, " pairs"], rejected_logratios: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """SPPO (arXiv:2405.00675), equation 4.7 with hard win probabilities: (h_w − 1/(2β))² + (h_l + 1/(2β))²."""
    return (chosen_logratios - 0.5 / beta) ** 2 + (rejected_logratios + 0.5 / beta) ** 2


def aot(
    chosen_logps: Float[Tensor, " pairs"],
    rejected_logps: Float[Tensor, " pairs"],
    ref_chosen_logps: Float[Tensor, " pairs"],
    ref_rejected_logps: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, " pairs"]:
    """
    AOT (arXiv:2406.05882), paired: quantiles of log π_θ(y_w) − log π_θ(y_l) against those of the reference.

    With δ the difference of the sorted values, −(1 − ε) log σ(βδ) − ε log σ(−βδ). Values are in sorted order, so that
    they belong to quantiles of the batch passed in, no longer to pairs.
    """
    policy, _ = torch.sort(chosen_logps - rejected_logps)
    reference, _ = torch.sort(ref_chosen_logps - ref_rejected_logps)
    return _smoothed(policy - reference, beta, label_smoothing)


def aot_unpaired(
    chosen_logratios: Float[Tensor, " pairs"],
    rejected_logratios: Float[Tensor, " pairs"],
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, " pairs"]:
    """AOT (arXiv:2406.05882), unpaired: as [`aot`], with quantiles of h_w against those of h_l."""
    chosen, _ = torch.sort(chosen_logratios)
    rejected, _ = torch.sort(rejected_logratios)
    return _smoothed(chosen - rejected, beta, label_smoothing)


def _smoothed(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    kept, flipped = -F.logsigmoid(beta * margin), -F.logsigmoid(-beta * margin)
    return kept * (1 - label_smoothing) + flipped * label_smoothing


def apo_zero(
    chosen_logratios: Float[Tensor, " pairs"], rejected_logratios: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """APO-zero (arXiv:2408.06266), equation 7: 1 − σ(βh_w) + σ(βh_l)."""
    return 1 - torch.sigmoid(beta * chosen_logratios) + torch.sigmoid(beta * rejected_logratios)


def apo_down(
    chosen_logratios: Float[Tensor, " pairs"], rejected_logratios: Float[Tensor, " pairs"], beta: float
) -> Float[Tensor, " pairs"]:
    """APO-down (arXiv:2408.06266), equation 8: σ(βh_w) + 1 − σ(β(h_w − h_l))."""
    rejected_part = 1 - torch.sigmoid(beta * (chosen_logratios - rejected_logratios))
    return torch.sigmoid(beta * chosen_logratios) + rejected_part


def discopop(margin: Float[Tensor, " pairs"], beta: float, discopop_tau: float) -> Float[Tensor, " pairs"]:
    """DiscoPOP (arXiv:2406.08414), equation 5: −(1 − m) log σ(βΔ) + m exp(−βΔ) with m = σ(βΔ/τ)."""
    logits = beta * margin
    mix = torch.sigmoid(logits / discopop_tau)
    return -F.logsigmoid(logits) * (1 - mix) + torch.exp(-logits) * mix


def sft(
    chosen_per_token_logps: Float[Tensor, "pairs time"], chosen_mask: Shaped[Tensor, "pairs time"]
) -> Float[Tensor, " pairs"]:
    """Mean of −log π_θ(y_t) over all chosen tokens of the batch passed in, the same for every pair; 0 if empty."""
    mask = chosen_mask.bool()
    return (-chosen_per_token_logps[mask].sum() / mask.sum().clamp(min=1)).expand(len(mask))


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
    )
}

# What each loss needs, by name
PAIR_LOSS_INPUTS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(loss).parameters) for name, loss in PAIR_LOSSES.items()
}


def call_pair_loss(name: str, available: dict[str, Any]) -> Tensor:
    """
    Values of a loss, with the arguments it needs taken from `available`.

    Args:
        name (`str`):
            A key of `PAIR_LOSSES`.
        available (`dict[str, Any]`):
            Arguments by the names that this module lists.

    Raises:
        `ValueError`: if there is no such loss; the message names those there are.
    """
    if name not in PAIR_LOSSES:
        raise ValueError(f"`loss_type` must be among {list(PAIR_LOSSES)}, got {name!r}.")
    return PAIR_LOSSES[name](**{need: available[need] for need in PAIR_LOSS_INPUTS[name]})
