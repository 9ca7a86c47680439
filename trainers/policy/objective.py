"""What the stages of the loss read and change: statistics of the gradient-carrying pass."""

from dataclasses import dataclass
from typing import Any

import torch
from trl import GRPOTrainer

from .record import RolloutRecord

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


@dataclass
class PolicyStatistics:
    """
    What the gradient-carrying pass gave for a micro-batch.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            logπ of the completion tokens at the sampling temperature, in nats, with gradient; 0 on padding.
        entropies (`torch.Tensor` of shape `(batch, time)`):
            Entropy of the next-token distribution, in nats, with gradient.
        log_ratio (`torch.Tensor` of shape `(batch, time)`):
            logπ − logπ_old, with gradient.
        ratio (`torch.Tensor` of shape `(batch, time)` or `(batch, 1)`):
            Importance weights at the configured level, with gradient.
        epsilon_low, epsilon_high, delta (`float`, or `torch.Tensor` that broadcasts against `ratio`):
            Range within which the ratio is trusted: the configured one, until a method changes it for some tokens.
        old_logps (`torch.Tensor` of shape `(batch, time)`):
            logπ_old, without gradient.
        entropy_mask (`torch.Tensor` of shape `(batch, time)`, *optional*):
            Tokens kept by `top_entropy_quantile`.
        aux_loss (`torch.Tensor`, *optional*):
            Load-balancing loss of a mixture of experts.
        reshaped (`torch.Tensor` of the shape of `ratio`, bool, *optional*):
            Where a method put something else in the place of importance weights; `None` for nowhere.
    """

    logps: torch.Tensor
    entropies: torch.Tensor
    log_ratio: torch.Tensor
    ratio: torch.Tensor
    epsilon_low: float | torch.Tensor
    epsilon_high: float | torch.Tensor
    delta: float | torch.Tensor | None
    old_logps: torch.Tensor
    entropy_mask: torch.Tensor | None
    aux_loss: torch.Tensor | None
    reshaped: torch.Tensor | None = None

    def reshape(self, where: torch.Tensor, ratio: torch.Tensor) -> None:
        """Put `ratio` in the place of importance weights at the positions of `where`, bool as in [`unclip`]."""
        self.ratio = torch.where(where, ratio, self.ratio)
        where = where.expand_as(self.ratio)
        self.reshaped = where if self.reshaped is None else self.reshaped | where

    def unclip(self, where: torch.Tensor) -> None:
        """Trust every ratio at the positions of the bool mask `where`, `(batch, time)` or `(batch, 1)`."""
        self.epsilon_low = torch.where(where, torch.inf, self.epsilon_low)
        self.epsilon_high = torch.where(where, torch.inf, self.epsilon_high)
        if self.delta is not None:
            self.delta = torch.where(where, torch.inf, self.delta)


def vespo_weights(args: Any, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
    """TRL's weights of sequences for `loss_type="vespo"`, `(batch, 1)`, without gradient."""
    return GRPOTrainer.get_gamma_weights(
        advantages=column(record.advantages),
        log_ratio_per_token=stats.log_ratio,
        mask=record.loss_mask,
        importance_sampling_ratio=record.importance_sampling_ratio,
        k_pos=args.vespo_k_pos,
        lambda_pos=args.vespo_lambda_pos,
        k_neg=args.vespo_k_neg,
        lambda_neg=args.vespo_lambda_neg,
    )


def column(values: torch.Tensor) -> torch.Tensor:
    """`(batch,)` as `(batch, 1)`; anything else as it is."""
    return values.unsqueeze(1) if values.dim() == 1 else values
