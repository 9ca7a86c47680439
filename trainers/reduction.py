"""How named terms of pairs become one loss."""

import torch
from accelerate import Accelerator

from ..losses.terms import LossTerm


def mean_of_terms(terms: list[LossTerm], accelerator: Accelerator) -> torch.Tensor:
    """
    Sum of the terms' weighted means.

    A term without mask is averaged over this rank's units; a masked one over the units that count on all ranks,
    scaled so that the average of all ranks' losses, and of their gradients, is the global mean. The trainer then
    averages over the micro-batches of a step.

    Args:
        terms (`list[LossTerm]`):
            The same names on every rank.
        accelerator (`~accelerate.Accelerator`):
            Knows the other ranks.
    """
    loss = sum(term.values.mean() * term.coef for term in terms if term.mask is None)
    masked = [term for term in terms if term.mask is not None]
    if masked:
        counts = accelerator.reduce(torch.stack([term.count().float() for term in masked]), reduction="sum")
        counts = counts.clamp(min=1.0) / accelerator.num_processes
        loss = loss + sum(term.sum() / count * term.coef for term, count in zip(masked, counts, strict=True))
    return loss
