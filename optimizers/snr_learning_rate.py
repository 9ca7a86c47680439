"""A learning rate that shrinks where the gradient is noise, for the slot *schedule*."""

import re
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..core.configuration import ComponentConfig, method_config, method_field
from ..core.declaration import declared
from ..core.slots import Component
from ..losses.policy.oblr_po import gradient_noise, snr_multiplier
from ..models.observation import backbone, causal_lm, decoder_layers

logger = get_logger(__name__)


@method_config
class SnrLearningRateConfig(ComponentConfig):
    """
    Configuration of [`SnrLearningRate`].

    The rule needs several micro-batches an update: `gradient_accumulation_steps` times processes must be at least 2,
    and 8 or more is better. `learning_rate` stands for the 1/L of the derivation.
    """

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
        "the last decoder layer and the head.",
    )


class SnrLearningRate(Component):
    r"""
    Learning rate by the signal-to-noise ratio of the gradient: smaller steps in noise.

    For an objective with Lipschitz gradient, the step that promises most progress is (arXiv:2511.23310)

    $$
    \eta = \eta_0 \cdot \frac{\mathrm{SNR}}{1 + \mathrm{SNR}}, \qquad \mathrm{SNR} = \frac{|\nabla J|^2}{V},
    $$

    V being the variance of the gradient, estimated from how its micro-batches scatter, on every rank, and smoothed
    over updates. The multiplier never exceeds 1. It acts on the learning rate, not on the gradient, which Adam would
    undo; with Adam the derivation is a heuristic. The rate is the schedule's again once the step is made.

    So that micro-batches are alike, the policy family computes rows without effect too.

    It rides on every family. A bare TRL trainer takes it through `callbacks=[SnrLearningRate().callback()]`; see
    [`callback`].

    Relations:
        One half of OBLR-PO, which carries it; the other is a baseline. Schedules of transformers know the step only,
        and combine: they set what is multiplied.

    Paper: [OBLR-PO: A Theoretical Framework for Stable Reinforcement
    Learning](https://huggingface.co/papers/2511.23310).

    Example:

    ```python
    >>> from papertrl import SnrLearningRate, compose
    >>> trainer_class = compose("sft", SnrLearningRate)
    >>> args = trainer_class.config_class("out", snr_min_multiplier=0.2, gradient_accumulation_steps=8, bf16=False)
    >>> trainer = trainer_class("Qwen/Qwen3-0.6B", args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("snr_learning_rate")
    config_class = SnrLearningRateConfig

    def __init__(self, config: Any = None, **settings: Any):
        super().__init__(config, **settings)
        self._tracked: list[torch.nn.Parameter] = []
        self._handles: list[Any] = []
        # Rates of the parameter groups before they were multiplied
        self._scheduled: list[float] = []
        self._ranks = 1
        self._start(torch.device("cpu"))

    def _start(self, device: torch.device) -> None:
        # Σ |g_m|², of the micro-batch whose backward pass runs and of all before it in this update
        self._pending, self._squares = torch.zeros((), device=device), torch.zeros((), device=device)
        self._micro_batches = 0
        # |G|² of this update, and running means of |G|² and V
        self._square, self._moments = torch.zeros((), device=device), torch.zeros(2, device=device)

    # --- In a trainer of this library ---------------------------------------------------------------------------

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise ValueError(
                "`snr_lr` compares whole gradients of parameters, which DeepSpeed and FSDP shard. Set `snr_lr=False`."
            )
        self._ranks = trainer.accelerator.num_processes
        self._start(trainer.accelerator.device)
        if not _several_micro_batches(trainer.args.gradient_accumulation_steps * self._ranks):
            return
        reason = trainer.coupled_micro_batches()
        if reason is not None:
            logger.warning(
                "`snr_lr`: the gradients of micro-batches are not independent, so that the estimated noise is biased: "
                f"{reason}."
            )
        self._track(trainer.model)

    def callbacks(self) -> list[TrainerCallback]:
        return [_ScheduledRate(self)]

    def computes_all_rows(self) -> bool:
        return bool(self._tracked)

    def after_backward(self) -> None:
        self._count_micro_batch()
        if self._tracked and self.trainer.accelerator.sync_gradients:
            # Averaged over ranks and not yet clipped
            self._square = _square(parameter.grad for parameter in self._tracked)

    def before_update(self, grad_norm: torch.Tensor) -> None:
        for name, value in self._multiply(self.trainer.optimizer).items():
            self.log_metric(name, value)

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self._moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moments = state["moments"].to(self._moments)

    # --- In a bare trainer of TRL -------------------------------------------------------------------------------

    def callback(self) -> "SnrLearningRateCallback":
        """
        The component for the argument `callbacks` of a bare trainer of TRL or transformers.

        It supports one process without sharding; training with several is refused, since hooks see the gradient of
        their own rank only. Metrics join the entries of `trainer.state.log_history`. Running means are saved with
        checkpoints and restored. [`~trl.GRPOTrainer`] cuts micro-batches from shuffled rows, so that completions of
        one prompt lie in several and the noise is underestimated; the trainers of this library do not.
        """
        return SnrLearningRateCallback(**{f.name: getattr(self.config, f.name) for f in fields(self.config_class)})

    # --- Gradients ----------------------------------------------------------------------------------------------

    def _track(self, model: torch.nn.Module, whole: dict[int, torch.Tensor] | None = None) -> None:
        """
        See the gradients of every micro-batch from now on.

        Args:
            model (`torch.nn.Module`):
                Without wrappers.
            whole (`dict`, *optional*):
                Takes the squared norm of each parameter's gradient, all micro-batches so far added up.
        """
        self._tracked = self._parameters(model)
        for parameter in self._tracked:
            self._hook(parameter, whole)

    def _hook(self, parameter: torch.nn.Parameter, whole: dict[int, torch.Tensor] | None) -> None:
        seen: list[torch.Tensor] = []

        def see(gradient: torch.Tensor) -> None:
            # One micro-batch's own: not yet averaged over ranks, nor added to that of the others
            seen[:] = [_square([gradient])]

        def take(parameter: torch.Tensor) -> None:
            # Only what is accumulated is part of an update; others may ask for gradients in between
            self._pending += seen.pop()
            if whole is not None:
                whole[id(parameter)] = _square([parameter.grad])

        self._handles += [parameter.register_hook(see), parameter.register_post_accumulate_grad_hook(take)]

    def _parameters(self, model: torch.nn.Module) -> list[torch.nn.Parameter]:
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self.config.snr_params is not None:
            tracked = [p for name, p in named.items() if re.search(self.config.snr_params, name)]
        else:
            heads = [module for module in causal_lm(model).children() if module is not backbone(model)]
            wanted = {id(p) for module in (decoder_layers(model)[-1], *heads) for p in module.parameters()}
            tracked = [p for p in named.values() if id(p) in wanted]
        if not tracked:
            raise ValueError(
                f"`snr_params` must match the name of a parameter that is trained, got {self.config.snr_params!r}. "
                f"Names are, among others, {list(named)[-3:]}."
            )
        return tracked

    def _count_micro_batch(self) -> None:
        self._squares += self._pending
        self._pending.zero_()
        self._micro_batches += 1

    # --- Learning rate ------------------------------------------------------------------------------------------

    def _multiply(self, optimizer: Any) -> dict[str, Any]:
        """Multiply the learning rates by what the update's gradient says, and return metrics."""
        if not self._tracked:
            return {}
        # The last update of an epoch may have a single micro-batch, which says nothing about noise
        metrics = self._observe() if self._micro_batches * self._ranks > 1 else {}
        self._squares.zero_()
        self._micro_batches = 0
        multiplier = snr_multiplier(*self._moments, self.config.snr_min_multiplier).item()
        self._scheduled = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] *= multiplier
        return metrics | {"oblr_po/lr_multiplier": multiplier}

    def _observe(self) -> dict[str, torch.Tensor]:
        squares = self._squares
        if self.trainer is not None:
            squares = self.trainer.accelerator.reduce(squares, reduction="sum")
        noise = gradient_noise(self._square, squares, self._micro_batches * self._ranks, self._ranks)
        smoothed = torch.lerp(torch.stack([self._square, noise]), self._moments, self.config.snr_ema)
        self._moments = torch.where(smoothed.isfinite().all(), smoothed, self._moments)
        signal = (self._square - noise).clamp(min=0.0)
        return {
            "oblr_po/gradient_signal": signal,
            "oblr_po/gradient_noise": noise,
            "oblr_po/snr": signal / noise.clamp(min=1e-30),
        }

    def _restore_rates(self, optimizer: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._scheduled, strict=False):
            group["lr"] = rate
        self._scheduled = []


class _ScheduledRate(TrainerCallback):
    """Takes the multiplier off once the step is made: some schedulers go on from the rate that they find."""

    def __init__(self, component: SnrLearningRate):
        self.component = component

    def on_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.component._restore_rates(optimizer)


class SnrLearningRateCallback(_ScheduledRate, ExportableState):
    """
    [`SnrLearningRate`] in a bare trainer: made by [`SnrLearningRate.callback`].

    Args:
        **settings:
            Fields of [`SnrLearningRateConfig`].
    """

    def __init__(self, **settings: Any):
        super().__init__(SnrLearningRate(**settings))
        self._whole: dict[int, torch.Tensor] = {}
        self._metrics: dict[str, list[float]] = {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        component = self.component
        if args.world_size > 1 or args.deepspeed is not None or args.fsdp:
            raise ValueError(
                f"`SnrLearningRate.callback()` sees the gradients of one process, got {args.world_size} processes, "
                f"`deepspeed`={args.deepspeed!r} and `fsdp`={args.fsdp!r}. Use a trainer of papertrl that carries the "
                "component, such as `compose('sft', SnrLearningRate)`, or train on one device."
            )
        component._start(next(model.parameters()).device)
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0 and isinstance(saved, dict):
            component._moments.copy_(torch.tensor(saved["attributes"]["moments"]))
        if component.on and _several_micro_batches(args.gradient_accumulation_steps):
            component._track(model, self._whole)

    def on_substep_end(self, args, state, control, **kwargs):
        self.component._count_micro_batch()

    def on_pre_optimizer_step(self, args, state, control, optimizer, **kwargs):
        self.component._count_micro_batch()
        if self._whole:
            self.component._square = torch.stack(list(self._whole.values())).sum()
            self._whole.clear()
        for name, value in self.component._multiply(optimizer).items():
            self._metrics.setdefault(name, []).append(float(value))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            means = {name: sum(values) / len(values) for name, values in self._metrics.items()}
            logs.update(means)
            state.log_history[-1].update(means)
            self._metrics.clear()

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.component._handles:
            handle.remove()
        self.component._handles, self.component._tracked = [], []

    @property
    def moments(self) -> list[float]:
        """Running means of |G|² and V."""
        return self.component._moments.tolist()

    @moments.setter
    def moments(self, values: list[float]) -> None:
        self.component._moments = torch.tensor(values)

    def state(self) -> dict[str, Any]:
        return {"args": asdict(self.component.config), "attributes": {"moments": self.moments}}


def _several_micro_batches(count: int) -> bool:
    if count == 1:
        logger.warning(
            "`snr_lr` has no effect: the noise of a gradient shows in how its micro-batches differ, and there is one "
            "per update. Raise `gradient_accumulation_steps`."
        )
    return count > 1


def _square(gradients: Iterable[torch.Tensor | None]) -> torch.Tensor:
    """Squared norm of gradients, some of which may be `None`."""
    return torch.stack([g.detach().float().square().sum() for g in gradients if g is not None]).sum()
