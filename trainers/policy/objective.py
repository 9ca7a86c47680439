"""The loss side of the policy family: TRL's `GRPOTrainer._compute_loss`, opened into stages."""

from dataclasses import dataclass

import torch
from trl import GRPOTrainer
from trl.trainer.utils import nanmax, nanmin

from ...losses.policy.surrogate import (
    cispo_surrogate,
    clipped_surrogate,
    kl_estimate,
    log_importance_weights,
    sapo_surrogate,
)
from ...losses.terms import LossTerm
from .record import RolloutRecord

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
SEQUENCE_MEAN = ("grpo", "sapo")
GLOBAL_TOKEN_MEAN = ("cispo", "dapo", "vespo")


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

    def unclip(self, where: torch.Tensor) -> None:
        """Trust every ratio at the positions of the bool mask `where`, `(batch, time)` or `(batch, 1)`."""
        self.epsilon_low = torch.where(where, torch.inf, self.epsilon_low)
        self.epsilon_high = torch.where(where, torch.inf, self.epsilon_high)
        if self.delta is not None:
            self.delta = torch.where(where, torch.inf, self.delta)


class PolicyObjective(GRPOTrainer):
    """Stages of the loss. See [`~papertrl.PolicyTrainer`] for how they fit into a step."""

    def trust_region(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        """
        Stage *trust region*: change `stats.ratio` and the range in which it is trusted, in place.

        Ranges become tensors where tokens differ, both `epsilon_low` and `epsilon_high` at a time. What was made
        infinite by another method stays so.
        """

    def objective(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """
        Stage *objective*: the policy-gradient loss of every token, before any divergence or extra term.

        Args:
            stats ([`PolicyStatistics`]):
                The gradient-carrying pass.
            record ([`RolloutRecord`]):
                The micro-batch.

        Returns:
            `torch.Tensor` of shape `(batch, time)`, or `(batch, 1)` for losses per sequence.
        """
        advantages = column(record.advantages)
        if self.loss_type in CLIPPED:
            loss = clipped_surrogate(stats.ratio, advantages, stats.epsilon_low, stats.epsilon_high, stats.delta)
        elif self.loss_type == "cispo":
            loss = cispo_surrogate(stats.ratio, advantages, stats.logps, stats.epsilon_high)
        elif self.loss_type == "sapo":
            loss = sapo_surrogate(
                stats.ratio, advantages, self.args.sapo_temperature_pos, self.args.sapo_temperature_neg
            )
        elif self.loss_type == "vespo":
            loss = -self._vespo_weights(stats, record) * advantages * stats.logps
        else:
            raise ValueError(f"`loss_type` must be one of TRL's loss types, got {self.loss_type!r}.")
        return loss

    def divergence(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """Stage *divergence*: per-token penalty `(batch, time)` towards the reference, weighted by `beta`."""
        return kl_estimate(stats.logps, record.ref_per_token_logps)

    def extra_terms(self, stats: PolicyStatistics, record: RolloutRecord) -> list[LossTerm]:
        """
        Stage *extra terms*: named terms of shape `(batch, time)`, aggregated over tokens just as the policy loss is.

        Append to `super().extra_terms(stats, record)`.
        """
        return []

    def _compute_loss(self, model, inputs):
        record = RolloutRecord.from_batch(inputs)
        stats = self._policy_statistics(model, record)
        self.trust_region(stats, record)
        per_token_loss = self.objective(stats, record)
        if self.off_policy_mask_threshold is not None:
            per_token_loss = per_token_loss * self._off_policy_mask(stats, record)
        if stats.entropy_mask is not None:
            per_token_loss = per_token_loss * stats.entropy_mask
        if record.importance_sampling_ratio is not None and self.loss_type != "vespo":
            per_token_loss = per_token_loss * record.importance_sampling_ratio
        if self.beta != 0.0:
            divergence = self.divergence(stats, record)
            if self.args.use_bias_correction_kl:
                divergence = divergence * stats.ratio
            per_token_loss = per_token_loss + self.beta * divergence
            self.log_mean("kl", (divergence * record.loss_mask).sum(), record.loss_mask.sum())
        loss, logged_loss = self._aggregate(per_token_loss, record)
        for term in self.extra_terms(stats, record):
            if term.per is None:
                value, _ = self._aggregate(term.values if term.mask is None else term.values * term.mask, record)
            else:
                value = term.sum() * self._micro_batches_per_generation() / (term.per * self._steps_per_update())
            loss = loss + term.coef * value
            self.log_mean(f"loss/{term.name}", term.sum(), term.count())
        loss = self._add_trl_terms(loss, logged_loss, stats, record)
        self._log_policy_metrics(stats, record)
        return loss

    def _policy_statistics(self, model, record: RolloutRecord) -> PolicyStatistics:
        logps, entropies, aux_loss = self._loss_scores(model, record)
        entropy_mask = None
        if self.top_entropy_quantile < 1.0:
            entropy_mask = self.get_high_entropy_mask(entropies, record.loss_mask, 1 - self.top_entropy_quantile)
        old_logps = logps.detach() if record.old_per_token_logps is None else record.old_per_token_logps
        # Tokens outside the loss may not have been scored
        log_ratio = (logps - old_logps) * record.loss_mask
        ratio = torch.exp(log_importance_weights(log_ratio, record.loss_mask, self.importance_sampling_level))
        return PolicyStatistics(
            logps=logps,
            entropies=entropies,
            log_ratio=log_ratio,
            ratio=ratio,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            old_logps=old_logps,
            entropy_mask=entropy_mask,
            aux_loss=aux_loss,
        )

    def _vespo_weights(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        return self.get_gamma_weights(
            advantages=column(record.advantages),
            log_ratio_per_token=stats.log_ratio,
            mask=record.loss_mask,
            importance_sampling_ratio=record.importance_sampling_ratio,
            k_pos=self.args.vespo_k_pos,
            lambda_pos=self.args.vespo_lambda_pos,
            k_neg=self.args.vespo_k_neg,
            lambda_neg=self.args.vespo_lambda_neg,
        )

    def _off_policy_mask(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        sampled = record.sampling_per_token_logps
        return self.get_off_policy_mask(
            advantages=column(record.advantages),
            per_token_logps=stats.logps,
            sampling_per_token_logps=stats.old_logps if sampled is None else sampled,
            mask=record.loss_mask,
            off_policy_threshold=self.off_policy_mask_threshold,
        )

    def _aggregate(self, values: torch.Tensor, record: RolloutRecord) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Reduce per-token `(batch, time)` or per-row `(batch,)` or `(batch, 1)` values as `loss_type` does.

        Returns the value scaled for accumulation and ranks, and the detached value that TRL logs.
        """
        values = column(values) * record.row_weight.unsqueeze(1)
        mask = record.loss_mask
        steps, micro_batches = self._steps_per_update(), self._micro_batches_per_generation()
        if self.loss_type in GLOBAL_TOKEN_MEAN:
            # The token count spans the generation batch: bring it to one accumulation window of one rank
            tokens = record.num_items_in_batch.clamp(min=1.0) / micro_batches
            loss = (values * mask).sum() / (tokens * steps)
            return loss, loss.detach()
        if self.loss_type == "bnpo":
            live = mask * (record.row_weight > 0).unsqueeze(1)
            loss = (values * mask).sum() / live.sum().clamp(min=1.0)
            return loss / steps, loss.detach()
        rows = (record.num_rows_in_batch / micro_batches).clamp(min=1.0 / micro_batches)
        if self.loss_type in SEQUENCE_MEAN:
            loss = ((values * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).sum() / rows
        elif self.loss_type == "dr_grpo":
            loss = (values * mask).sum() / (rows * self.max_completion_length)
        else:
            loss = (values * mask).sum() / rows
        return loss / steps, loss.detach()

    def _steps_per_update(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _micro_batches_per_generation(self) -> int:
        return self.accelerator.num_processes * (self.args.steps_per_generation if self.model.training else 1)

    def _add_trl_terms(self, loss, logged_loss, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """Add the entropy bonus and the load-balancing loss, which TRL normalizes in ways of their own."""
        steps = self._steps_per_update()
        if self._entropy_bonus_enabled:
            mask = record.loss_mask if stats.entropy_mask is None else record.loss_mask * stats.entropy_mask
            total, count = (stats.entropies * mask).sum(), mask.sum()
            loss = loss - self._entropy_coefficient() * (total / count.clamp(min=1.0) / steps)
            self.log_metric("policy_loss", self.accelerator.gather(logged_loss).nanmean())
            if self.use_adaptive_entropy and self.model.training:
                self._control_entropy(torch.stack([total, count]).detach())
            if self.model.training and self.accelerator.sync_gradients:
                self.log_metric("entropy_coef", self.entropy_coef)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * stats.aux_loss / steps
            self.log_metric("aux_loss", self.accelerator.gather_for_metrics(stats.aux_loss).mean())
        return loss

    def _entropy_coefficient(self) -> float:
        below_target = not self.use_adaptive_entropy or self._last_world_entropy <= self.args.entropy_target
        return self.entropy_coef if below_target else 0.0

    def _control_entropy(self, totals: torch.Tensor) -> None:
        """Gather (sum, count) over the accumulation window, then move the coefficient towards the target entropy."""
        window = self._entropy_window_stats
        self._entropy_window_stats = totals if window is None else window + totals
        if not self.accelerator.sync_gradients:
            return
        total, count = self.accelerator.reduce(self._entropy_window_stats, reduction="sum")
        entropy = (total / count.clamp(min=1.0)).item()
        step = self.args.entropy_coef_delta * (1 if entropy <= self.args.entropy_target else -1)
        self.entropy_coef = min(max(self.entropy_coef + step, self.args.entropy_coef_min), self.args.entropy_coef_max)
        self._last_world_entropy = entropy
        self._entropy_window_stats = None

    def _log_policy_metrics(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        """The metrics of TRL's own loss, under its names."""
        mask, advantages = record.loss_mask, column(record.advantages)

        def log_token_mean(name: str, values: torch.Tensor) -> None:
            if values.shape[1] == 1:
                self.log_mean(name, values.sum(), values.new_tensor(values.shape[0]))
            else:
                self.log_mean(name, (values * mask).sum(), mask.sum())

        def extreme(reduce, values: torch.Tensor) -> torch.Tensor:
            means = values.squeeze(1) if values.shape[1] == 1 else (values * mask).sum(-1) / mask.sum(-1)
            # Ranks may hold different numbers of rows
            return reduce(self.accelerator.gather(reduce(means)))

        log_token_mean("entropy", stats.entropies)
        if self.loss_type in CLIPPED:
            ratio = stats.ratio if stats.delta is None else torch.clamp(stats.ratio, max=stats.delta)
            low = ((ratio < 1 - stats.epsilon_low) & (advantages < 0)).float()
            high = ((ratio > 1 + stats.epsilon_high) & (advantages > 0)).float()
            for name, clipped in (("low", low), ("high", high), ("region", torch.maximum(low, high))):
                log_token_mean(f"clip_ratio/{name}_mean", clipped)
            self.log_metric("clip_ratio/low_min", extreme(nanmin, low))
            self.log_metric("clip_ratio/high_max", extreme(nanmax, high))
        elif self.loss_type == "cispo":
            log_token_mean("cispo_clip_ratio", ((stats.ratio > stats.epsilon_high) & (advantages > 0)).float())
        elif self.loss_type == "vespo":
            log_token_mean("vespo/phi_seq_mean", self._vespo_weights(stats, record))


def column(values: torch.Tensor) -> torch.Tensor:
    """`(batch,)` as `(batch, 1)`; anything else as it is."""
    return values.unsqueeze(1) if values.dim() == 1 else values
