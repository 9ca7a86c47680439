"""The loss of the policy family: TRL's `GRPOTrainer._compute_loss`, with stages in the places of its parts."""

from operator import attrgetter
from typing import Any

import torch
from trl.trainer.utils import nanmax, nanmin

from .objective import CLIPPED, PolicyStatistics, column, vespo_weights
from .record import RolloutRecord


def policy_loss(trainer: Any, model: torch.nn.Module, record: RolloutRecord) -> torch.Tensor:
    """
    Loss of a micro-batch; logs its parts.

    Args:
        trainer ([`PolicyTrainer`]):
            Whose stages are called.
        model (`torch.nn.Module`):
            The policy, wrapped for training.
        record ([`RolloutRecord`]):
            The micro-batch.
    """
    stats = trainer.policy_statistics(model, record)
    trainer.change_ratios(stats, record)
    trainer.trust_region(stats, record)
    per_token_loss = trainer.objective(stats, record)
    if trainer.off_policy_mask_threshold is not None:
        per_token_loss = per_token_loss * _off_policy_mask(trainer, stats, record)
    if stats.entropy_mask is not None:
        per_token_loss = per_token_loss * stats.entropy_mask
    if record.importance_sampling_ratio is not None and trainer.loss_type != "vespo":
        per_token_loss = per_token_loss * record.importance_sampling_ratio
    if trainer.beta != 0.0:
        divergence = trainer.divergence(stats, record)
        if trainer.args.use_bias_correction_kl:
            divergence = divergence * stats.ratio
        per_token_loss = per_token_loss + trainer.beta * divergence
        trainer.log_mean("kl", (divergence * record.loss_mask).sum(), record.loss_mask.sum())
    loss, logged_loss = trainer.aggregate(per_token_loss, record)
    # Added up in one order, whatever that of the methods
    for term in sorted(trainer.extra_terms(stats, record), key=attrgetter("name")):
        if term.per is None:
            value, _ = trainer.aggregate(term.values if term.mask is None else term.values * term.mask, record)
        else:
            value = term.sum() * trainer.micro_batches_per_generation() / (term.per * trainer.steps_per_update())
        loss = loss + term.coef * value
        trainer.log_mean(f"loss/{term.name}", term.sum(), term.count())
    if trainer._entropy_bonus_enabled:
        loss = loss + _entropy_bonus(trainer, logged_loss, stats, record)
    if trainer.aux_loss_enabled:
        loss = loss + trainer.router_aux_loss_coef * stats.aux_loss / trainer.steps_per_update()
        trainer.log_metric("aux_loss", trainer.accelerator.gather_for_metrics(stats.aux_loss).mean())
    _log_metrics(trainer, stats, record)
    return loss


def _off_policy_mask(trainer: Any, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
    sampled = record.sampling_per_token_logps
    return trainer.get_off_policy_mask(
        advantages=column(record.advantages),
        per_token_logps=stats.logps,
        sampling_per_token_logps=stats.old_logps if sampled is None else sampled,
        mask=record.loss_mask,
        off_policy_threshold=trainer.off_policy_mask_threshold,
    )


def _entropy_bonus(trainer: Any, logged_loss, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
    """TRL's entropy bonus as a loss, which TRL averages over the micro-batch."""
    mask = record.loss_mask if stats.entropy_mask is None else record.loss_mask * stats.entropy_mask
    total, count = (stats.entropies * mask).sum(), mask.sum()
    below_target = not trainer.use_adaptive_entropy or trainer._last_world_entropy <= trainer.args.entropy_target
    coefficient = trainer.entropy_coef if below_target else 0.0
    trainer.log_metric("policy_loss", trainer.accelerator.gather(logged_loss).nanmean())
    if trainer.use_adaptive_entropy and trainer.model.training:
        _control_entropy(trainer, torch.stack([total, count]).detach())
    if trainer.model.training and trainer.accelerator.sync_gradients:
        trainer.log_metric("entropy_coef", trainer.entropy_coef)
    return -coefficient * (total / count.clamp(min=1.0) / trainer.steps_per_update())


def _control_entropy(trainer: Any, totals: torch.Tensor) -> None:
    """Gather (sum, count) over the accumulation window, then move the coefficient towards the target entropy."""
    window = trainer._entropy_window_stats
    trainer._entropy_window_stats = totals if window is None else window + totals
    if not trainer.accelerator.sync_gradients:
        return
    args = trainer.args
    total, count = trainer.accelerator.reduce(trainer._entropy_window_stats, reduction="sum")
    entropy = (total / count.clamp(min=1.0)).item()
    step = args.entropy_coef_delta * (1 if entropy <= args.entropy_target else -1)
    trainer.entropy_coef = min(max(trainer.entropy_coef + step, args.entropy_coef_min), args.entropy_coef_max)
    trainer._last_world_entropy = entropy
    trainer._entropy_window_stats = None


def _log_metrics(trainer: Any, stats: PolicyStatistics, record: RolloutRecord) -> None:
    """The metrics of TRL's own loss, under its names."""
    mask, advantages = record.loss_mask, column(record.advantages)

    def log_token_mean(name: str, values: torch.Tensor) -> None:
        if values.shape[1] == 1:
            trainer.log_mean(name, values.sum(), values.new_tensor(values.shape[0]))
        else:
            trainer.log_mean(name, (values * mask).sum(), mask.sum())

    def extreme(reduce, values: torch.Tensor) -> torch.Tensor:
        means = values.squeeze(1) if values.shape[1] == 1 else (values * mask).sum(-1) / mask.sum(-1)
        # Ranks may hold different numbers of rows, and none with a token of the loss
        return reduce(trainer.accelerator.gather(reduce(means))).nan_to_num()

    log_token_mean("entropy", stats.entropies)
    if trainer.loss_type in CLIPPED:
        ratio = stats.ratio if stats.delta is None else torch.clamp(stats.ratio, max=stats.delta)
        low = ((ratio < 1 - stats.epsilon_low) & (advantages < 0)).float()
        high = ((ratio > 1 + stats.epsilon_high) & (advantages > 0)).float()
        for name, clipped in (("low", low), ("high", high), ("region", torch.maximum(low, high))):
            log_token_mean(f"clip_ratio/{name}_mean", clipped)
        trainer.log_metric("clip_ratio/low_min", extreme(nanmin, low))
        trainer.log_metric("clip_ratio/high_max", extreme(nanmax, high))
    elif trainer.loss_type == "cispo":
        log_token_mean("cispo_clip_ratio", ((stats.ratio > stats.epsilon_high) & (advantages > 0)).float())
    elif trainer.loss_type == "vespo":
        log_token_mean("vespo/phi_seq_mean", vespo_weights(trainer.args, stats, record))
