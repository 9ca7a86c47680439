"""OBLR-PO on GRPO."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.logging import get_logger

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.head import sum_of_squares
from ...losses.policy.groups import group_mean
from ...losses.policy.oblr_po import gradient_noise, logit_energy, optimal_baseline, snr_multiplier
from ...models.observation import causal_lm, decoder_layers, lm_head
from .base import PolicyConfig, PolicyTrainer
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch

logger = get_logger(__name__)

# These lower the learning rate from what it was, and would take the multiplied one for it
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


@method_config
class OblrPoGRPOConfig(PolicyConfig):
    """
    Configuration of [`OblrPoGRPOTrainer`].

    The rule of the learning rate needs several micro-batches an update: `gradient_accumulation_steps` times processes
    must be at least 2, and 8 or more is better. `learning_rate` stands for the 1/L of the derivation.
    """

    oblr_weight: str = method_field(
        "logit_energy",
        "What a completion weighs in its group's baseline: the squared norm of its gradient at the logits, its "
        "length, the same for all (RLOO), or the squared norm of its whole gradient, which takes a backward pass per "
        "completion. `none` leaves the baseline to others.",
        choices=("logit_energy", "length", "uniform", "exact", "none"),
    )
    oblr_leave_one_out: bool = method_field(
        True, "Whether a completion's baseline leaves out its own reward, so that the gradient is unbiased."
    )
    scale_rewards: str = method_field(
        "none", "Standard deviation that divides the centered rewards; the derivation has none. See TRL's."
    )
    snr_lr: bool = method_field(
        True, "Whether the learning rate is multiplied by SNR / (1 + SNR), SNR being that of the gradient."
    )
    snr_ema: float = method_field(
        0.9, "Share that the running means of signal and noise keep at each update. The value is ours.", ge=0, lt=1
    )
    snr_min_multiplier: float = method_field(
        0.1, "Smallest multiplier of the learning rate. The value is ours.", ge=0, le=1
    )
    snr_params: str | None = method_field(
        None,
        "Regular expression, searched for in the names of the parameters whose gradients are compared. `None` takes "
        "the last decoder layer and the LM head.",
    )

    def validate(self):
        super().validate()
        if self.oblr_weight != "none" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "OBLR-PO centers the summed reward: `multi_objective_aggregation` must be 'sum_then_normalize', got "
                f"{self.multi_objective_aggregation!r}. Change it, or set `oblr_weight='none'`."
            )
        if self.snr_lr and self.lr_scheduler_type in _STATEFUL_SCHEDULES:
            raise ValueError(
                f"`lr_scheduler_type` must not be one of {_STATEFUL_SCHEDULES} with `snr_lr`, since it would go on "
                f"from the multiplied rate, got {str(self.lr_scheduler_type.value)!r}. Change it, or set "
                "`snr_lr=False`."
            )


class OblrPoGRPOTrainer(PolicyTrainer):
    r"""
    Optimal baseline and learning rate: GRPO with the baseline of least gradient variance, and smaller steps in noise.

    Of all baselines that keep the policy gradient unbiased, the one of least variance is a mean of the group's
    rewards weighted by W, the squared norm of each completion's gradient (arXiv:2511.23310):

    $$
    b_k = \frac{\sum_{j \ne k} W_j R_j}{\sum_{j \ne k} W_j}, \qquad A_k = R_k - b_k .
    $$

    For an objective with Lipschitz gradient, the step that promises most progress is

    $$
    \eta = \eta_0 \cdot \frac{\mathrm{SNR}}{1 + \mathrm{SNR}}, \qquad \mathrm{SNR} = \frac{|\nabla J|^2}{V},
    $$

    V being the variance of the gradient, estimated from how its micro-batches scatter, on every rank, and smoothed
    over updates. The multiplier never exceeds 1. It acts on the learning rate, not on the gradient, which Adam would
    undo; with Adam the derivation is a heuristic.

    The equations are derived from the paper's abstract and the theory it names: its body and code were not available
    to us, and it may estimate norms and SNR in other ways. `logit_energy` is our default since it costs no backward
    pass.

    So that micro-batches are alike, rows without effect are computed too while `snr_lr` is on.

    Relations:
        RLOO is `oblr_weight="uniform"` with `snr_lr=False`; GRPO's group mean weighs uniformly and includes the row
        itself. Lite PPO and DLER change what divides the centered rewards and combine with it.

    Paper: [OBLR-PO: A Theoretical Framework for Stable Reinforcement
    Learning](https://huggingface.co/papers/2511.23310).

    Example:

    ```python
    >>> from papertrl import OblrPoGRPOConfig, OblrPoGRPOTrainer
    >>> args = OblrPoGRPOConfig(gradient_accumulation_steps=8)  # doctest: +SKIP
    >>> trainer = OblrPoGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("oblr_po")
    extends = {"contribute": {}, "statistics": {}, "after_backward": {}, "before_update": {}}
    replaces = {"baseline": {"oblr_weight": "none"}}
    config_class = OblrPoGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.args.oblr_weight == "exact" and (sharded or self._is_vlm):
            raise ValueError(
                "`oblr_weight='exact'` needs whole gradients of a text model: it supports neither sharded parameters "
                "(DeepSpeed, FSDP) nor vision-language models. Set `oblr_weight='logit_energy'`."
            )
        if self.args.snr_lr and sharded:
            raise ValueError(
                "`snr_lr` compares whole gradients of parameters, which DeepSpeed and FSDP shard. Set `snr_lr=False`."
            )
        self._set_up_snr()

    # --- Baseline -----------------------------------------------------------------------------------------------

    def old_pass_needs(self):
        needs = {"logit_energy": {"logps", "hidden_states"}, "exact": {"logps"}}
        return super().old_pass_needs() | needs.get(self.args.oblr_weight, set())

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        if self.args.oblr_weight == "logit_energy":
            scored.statistics["oblr_po/weights"] = self.accelerator.gather(self._logit_energy(record, old_pass))
        elif self.args.oblr_weight == "exact":
            scored.statistics["oblr_po/weights"] = self.accelerator.gather(self._gradient_squares(record))

    def baseline(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        if self.args.oblr_weight == "none":
            return super().baseline(scored, rewards)
        if self.args.oblr_weight == "uniform":
            weights = torch.ones_like(rewards)
        elif self.args.oblr_weight == "length":
            weights = scored.lengths.to(rewards)
        else:
            weights = scored.statistics["oblr_po/weights"].to(rewards)
        baseline = optimal_baseline(rewards, weights, scored.group_ids, self.args.oblr_leave_one_out)
        shift = (baseline - group_mean(rewards, scored.group_ids)).abs().nanmean()
        self.log_metric("oblr_po/baseline_shift", shift)
        self.log_metric("oblr_po/weight_cv", weights.std(correction=0) / weights.mean().clamp(min=1e-8))
        return baseline

    def _logit_energy(self, record: RolloutRecord, old_pass: OldPass) -> torch.Tensor:
        mask = record.loss_mask.bool()
        squares = torch.zeros_like(old_pass.logps)
        with lm_head(self.model) as (weight, bias, logit_scale, softcap):
            found = sum_of_squares(
                old_pass.hidden_states[mask], weight, bias, self.temperature, logit_scale=logit_scale, softcap=softcap
            )
        squares[mask] = found.to(squares)
        return logit_energy(old_pass.logps, squares, mask)

    def _gradient_squares(self, record: RolloutRecord) -> torch.Tensor:
        """|∇ logπ|² of each row, over all parameters that are trained: one backward pass per row."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        squares = []
        layout = (record.prompt_ids, record.prompt_mask, record.completion_ids, record.completion_mask)
        for *row, tokens in zip(*(part.split(1) for part in layout), record.loss_mask, strict=True):
            logps = self.score_rows(*row, gradient=True)
            gradient = torch.autograd.grad((logps[0] * tokens).sum(), parameters, allow_unused=True)
            squares.append(_square(gradient))
        # No part of an update
        self._snr_pending.zero_()
        return torch.stack(squares)

    # --- Learning rate ------------------------------------------------------------------------------------------

    def _set_up_snr(self) -> None:
        device = self.accelerator.device
        # Σ |g_m|², of the micro-batch whose backward pass runs and of all before it in this update
        self._snr_pending, self._snr_squares = torch.zeros((), device=device), torch.zeros((), device=device)
        self._snr_micro_batches = 0
        # |G|² of this update, and running means of |G|² and V
        self._snr_square, self._snr_moments = torch.zeros((), device=device), torch.zeros(2, device=device)
        self._snr_tracked: list[torch.nn.Parameter] = []
        if not self.args.snr_lr:
            return
        micro_batches = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        if micro_batches == 1:
            logger.warning(
                "`snr_lr` has no effect: the noise of a gradient shows in how its micro-batches differ, and there is "
                "one per update. Raise `gradient_accumulation_steps`."
            )
            return
        if self.batching is None or self.args.per_device_train_batch_size % self.num_generations:
            logger.warning(
                "`snr_lr`: completions of one prompt lie in several micro-batches, whose gradients are then not "
                "independent, so that the estimated noise is biased. Make `per_device_train_batch_size` a multiple "
                "of `num_generations`, and leave `group_batches` on."
            )
        self._snr_tracked = self._snr_parameters()
        for parameter in self._snr_tracked:
            parameter.register_hook(self._see_gradient)

    def _snr_parameters(self) -> list[torch.nn.Parameter]:
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.args.snr_params is not None:
            tracked = [p for name, p in named.items() if re.search(self.args.snr_params, name)]
        else:
            head = causal_lm(self.model).get_output_embeddings()
            wanted = {id(p) for module in (decoder_layers(self.model)[-1], head) for p in module.parameters()}
            tracked = [p for p in named.values() if id(p) in wanted]
        if not tracked:
            raise ValueError(
                f"`snr_params` must match the name of a parameter that is trained, got {self.args.snr_params!r}. "
                f"Names are, among others, {list(named)[-3:]}."
            )
        return tracked

    def _see_gradient(self, gradient: torch.Tensor) -> None:
        # One micro-batch's own: not yet averaged over ranks, nor added to that of the others
        self._snr_pending += _square([gradient])

    def contributing_rows(self, record: RolloutRecord) -> torch.Tensor:
        rows = super().contributing_rows(record)
        return torch.ones_like(rows) if self._snr_tracked else rows

    def after_backward(self) -> None:
        super().after_backward()
        self._snr_squares += self._snr_pending
        self._snr_pending.zero_()
        self._snr_micro_batches += 1
        if self._snr_tracked and self.accelerator.sync_gradients:
            # Not yet clipped
            self._snr_square = _square(p.grad for p in self._snr_tracked)

    def before_update(self, grad_norm: torch.Tensor) -> None:
        super().before_update(grad_norm)
        if not self._snr_tracked:
            return
        # The last update of an epoch may have a single micro-batch, which says nothing about noise
        if self._snr_micro_batches * self.accelerator.num_processes > 1:
            self._observe_gradient()
        self._snr_squares.zero_()
        self._snr_micro_batches = 0
        multiplier = snr_multiplier(*self._snr_moments, self.args.snr_min_multiplier).item()
        for group in self.optimizer.param_groups:
            group["lr"] *= multiplier
        self.log_metric("oblr_po/lr_multiplier", multiplier)

    def _observe_gradient(self) -> None:
        square, ranks = self._snr_square, self.accelerator.num_processes
        squares = self.accelerator.reduce(self._snr_squares, reduction="sum")
        noise = gradient_noise(square, squares, self._snr_micro_batches * ranks, ranks)
        smoothed = torch.lerp(torch.stack([square, noise]), self._snr_moments, self.args.snr_ema)
        self._snr_moments = torch.where(smoothed.isfinite().all(), smoothed, self._snr_moments)
        signal = (square - noise).clamp(min=0.0)
        self.log_metric("oblr_po/gradient_signal", signal)
        self.log_metric("oblr_po/gradient_noise", noise)
        self.log_metric("oblr_po/snr", signal / noise.clamp(min=1e-30))

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"oblr_po": {"moments": self._snr_moments}}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._snr_moments = state["oblr_po"]["moments"].to(self._snr_moments)


def _square(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Squared norm of gradients, some of which may be `None`."""
    return torch.stack([g.detach().float().square().sum() for g in gradients if g is not None]).sum()
