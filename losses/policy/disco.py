"""DisCO (arXiv:2505.12366): score right answers above wrong ones, within a trust region around the sampling policy."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_MAX_LOG_RATIO = 20.0


def answer_labels(
    rewards: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"], threshold: float
) -> Float[Tensor, " rows"]:
    """
    1 on right answers (reward above `threshold`) and -1 on wrong ones, where their group has both; else 0.

    Args:
        rewards (`torch.Tensor` of shape `(rows,)`):
            R; rows with NaN are neither right nor wrong.
        group_ids (`torch.Tensor` of shape `(rows,)`):
            Question of each answer.
        threshold (`float`):
            Largest reward of a wrong answer.
    """
    labels = torch.where(rewards > threshold, 1.0, -1.0).to(rewards).masked_fill(rewards.isnan(), 0.0)
    return labels * in_mixed_group(labels, group_ids)


def in_mixed_group(labels: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """Whether a row's group has rows of either sign."""
    index = _index(group_ids)
    right, wrong = _group_sum((labels > 0).to(labels), index), _group_sum((labels < 0).to(labels), index)
    return ((right > 0) & (wrong > 0))[index]


def capped_ratio(log_ratio: Float[Tensor, "batch time"]) -> Float[Tensor, "batch time"]:
    """π/π_old, without gradient beyond e²⁰: the score has no clip that would bound it."""
    return torch.exp(torch.clamp(log_ratio, max=_MAX_LOG_RATIO))


def answer_shares(
    scores: Float[Tensor, " rows"],
    labels: Float[Tensor, " rows"],
    group_ids: Int[Tensor, " rows"],
    tau: float | None,
) -> Float[Tensor, " rows"]:
    """
    Weight of each answer's score in the gradient of its question's objective, without sign and gradient.

    With P and N the right and wrong answers of a question: 1/|P| on P and exp(s_j/τ) / Σ_N exp(s_k/τ) on N, the
    gradient of the distributionally robust form (DisCO); 1/|N| on N without τ (DisCO-b). 0 where P or N is empty.

    Args:
        scores (`torch.Tensor` of shape `(rows,)`):
            s under the current policy. Their gradient is not used.
        labels (`torch.Tensor` of shape `(rows,)`):
            Above 0 on P, below 0 on N; other rows are left out.
        group_ids (`torch.Tensor` of shape `(rows,)`):
            Question of each answer.
        tau (`float`, *optional*):
            τ: the lower, the more the best-scored wrong answers weigh. `None` for equal weights.
    """
    index = _index(group_ids)
    exponents = torch.zeros_like(scores) if tau is None else scores.detach() / tau
    right, wrong = (labels > 0).to(scores), (labels < 0).to(scores)
    peak = _group_peak(exponents, labels, index)
    mass = wrong * torch.exp(torch.where(labels < 0, exponents - peak[index], 0.0))
    shares = right / _group_sum(right, index)[index].clamp(min=1) + mass / _group_sum(mass, index)[index].clamp(min=1)
    return shares * in_mixed_group(labels, group_ids)


def discriminative_objective(
    scores: Float[Tensor, " rows"],
    labels: Float[Tensor, " rows"],
    group_ids: Int[Tensor, " rows"],
    tau: float | None,
) -> Float[Tensor, " groups"]:
    """
    Objective of each question, by group id: mean_P s − τ log mean_N exp(s/τ), or mean_P s − mean_N s without τ.

    0 where P or N is empty. Arguments as in [`answer_shares`], whose signed result is the gradient.
    """
    index = _index(group_ids)
    right, wrong = (labels > 0).to(scores), (labels < 0).to(scores)
    positives, negatives = _group_sum(right, index), _group_sum(wrong, index)
    mixed = (positives > 0) & (negatives > 0)
    positives, negatives = positives.clamp(min=1), negatives.clamp(min=1)
    attraction = _group_sum(right * scores, index) / positives
    if tau is None:
        return mixed * (attraction - _group_sum(wrong * scores, index) / negatives)
    peak = _group_peak(scores / tau, labels, index)
    mass = _group_sum(wrong * torch.exp(torch.where(labels < 0, scores / tau - peak[index], 0.0)), index)
    repulsion = tau * (peak + torch.log(mass.where(mixed, 1.0) / negatives))
    return torch.where(mixed, attraction - repulsion, 0.0)


def sampling_divergence(
    log_ratio: Float[Tensor, "batch time"], estimator: Literal["k1", "k3"]
) -> Float[Tensor, "batch time"]:
    """
    Per-token estimate of KL(π_old ‖ π) at tokens drawn from π_old, with d = logπ − logπ_old.

    `"k1"` is −d, `"k3"` is exp(d) − d − 1.

    Args:
        log_ratio (`torch.Tensor` of shape `(batch, time)`):
            d in nats, with gradient.
        estimator (`str`):
            Which estimate.
    """
    return -log_ratio if estimator == "k1" else capped_ratio(log_ratio) - log_ratio - 1


def constraint_weight(divergence: Float[Tensor, ""], delta: float, beta: float) -> Float[Tensor, ""]:
    """
    β·max(D − δ, 0), without gradient: times ∇D, the gradient of the squared hinge (β/2)·max(D − δ, 0)².

    The paper writes β·max(D − δ, 0)²; this is the released code's scale of β.
    """
    return beta * torch.clamp(divergence.detach() - delta, min=0.0)


def _index(group_ids: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    return torch.unique(group_ids, return_inverse=True)[1]


def _group_sum(values: Float[Tensor, " rows"], index: Int[Tensor, " rows"]) -> Float[Tensor, " groups"]:
    return values.new_zeros(int(index.max()) + 1).index_add(0, index, values)


def _group_peak(
    exponents: Float[Tensor, " rows"], labels: Float[Tensor, " rows"], index: Int[Tensor, " rows"]
) -> Float[Tensor, " groups"]:
    """Largest exponent among the wrong answers of each group, held fixed; 0 where there are none."""
    candidates = exponents.detach().masked_fill(labels >= 0, -torch.inf)
    peak = candidates.new_full((int(index.max()) + 1,), -torch.inf).scatter_reduce(0, index, candidates, "amax")
    return peak.masked_fill(peak == -torch.inf, 0.0)
