"""Statistics of the next-token distribution from hidden states and LM head, in token chunks."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

_CHUNK_ELEMENTS = 2**24


@torch.no_grad()
def kept_mass(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    kappa: float,
    relative: bool = True,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """
    Filter threshold and the probability mass that survives it, at every position.

    With p the next-token distribution, a token v is kept if and only if p(v) ≥ τ, where τ = κ · max p (`relative`,
    the min-p filter) or τ = κ.

    Args:
        hidden (`torch.Tensor` of shape `(tokens, hidden)`):
            Final hidden states.
        weight (`torch.Tensor` of shape `(vocab, hidden)`), bias (`torch.Tensor` of shape `(vocab,)`, *optional*):
            LM head.
        kappa (`float`):
            κ in (0, 1].
        relative (`bool`, *optional*, defaults to `True`):
            Whether κ is relative to the largest probability.
        temperature, logit_scale (`float`, *optional*, default to `1.0`), softcap (`float`, *optional*):
            logits = softcap(logit_scale · (hidden · weightᵀ + bias)) / temperature.

    Returns:
        `log τ` and `log Σ_{kept v} p(v)`, in nats and without gradient. The second is `-inf` where nothing is kept,
        which only an absolute threshold allows.
    """
    log_threshold = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    log_kept = torch.empty_like(log_threshold)
    for part, logps in _chunks(hidden, weight, bias, temperature, logit_scale, softcap):
        threshold = math.log(kappa) + (logps.amax(-1) if relative else torch.zeros_like(logps[:, 0]))
        log_threshold[part] = threshold
        # A token at the threshold is kept: rounding in the logarithm must not decide the maximum's own fate
        kept = logps >= threshold.unsqueeze(-1) - 1e-6
        log_mass = torch.logsumexp(logps.masked_fill(~kept, -math.inf), dim=-1).clamp(max=0.0)
        # Exactly, where nothing is removed: the filtered distribution must then be the unfiltered one
        log_kept[part] = log_mass.masked_fill(kept.all(-1), 0.0)
    return log_threshold, log_kept


@torch.no_grad()
def sum_of_squares(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Float[Tensor, " tokens"]:
    """
    Σ_v p(v)² of the next-token distribution p, the chance that two draws agree, at every position.

    Arguments are those of [`kept_mass`]. Without gradient.
    """
    total = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for part, logps in _chunks(hidden, weight, bias, temperature, logit_scale, softcap):
        total[part] = torch.exp(2 * logps).sum(-1)
    return total


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> Iterator[tuple[slice, Tensor]]:
    """Log-probabilities `(chunk, vocab)` of a few positions at a time."""
    chunk = max(1, _CHUNK_ELEMENTS // weight.shape[0])
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        logits = torch.nn.functional.linear(hidden[part].to(weight.dtype), weight, bias).float() * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        yield part, torch.log_softmax(logits / temperature, dim=-1)
