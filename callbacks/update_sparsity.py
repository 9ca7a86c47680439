"""How many weights training leaves as they were, for the slot *observer*."""

from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback

from ..core.configuration import ComponentConfig, method_config, method_field
from ..core.declaration import declared
from ..core.slots import Component

logger = get_logger(__name__)


@method_config
class UpdateSparsityConfig(ComponentConfig):
    """Configuration of [`UpdateSparsity`]."""

    update_sparsity_every: int | None = method_field(50, "Optimizer steps between looks. `None` never looks.", ge=1)
    update_sparsity_tolerance: float = method_field(
        1e-5, "Largest difference from the start at which a weight counts as unchanged.", ge=0
    )


class UpdateSparsity(Component):
    """
    Logs the share of weights that differ from where training began, over all of them.

    The paper (arXiv:2505.11711) finds 5 to 30 % of the weights changed by reinforcement learning, at a tolerance of
    1e-5, against nearly all by supervised fine-tuning. It compares checkpoints; here the weights at the start are
    kept on the CPU, which costs as much memory as the trained weights. With sharded parameters it is refused.

    In a bare TRL trainer: `callbacks=UpdateSparsity().callbacks()`.

    Relations:
        The divergence from the start model (`kl`) measures what it says, this what it is made of.

    Paper: [Reinforcement Learning Finetunes Small Subnetworks in Large Language
    Models](https://huggingface.co/papers/2505.11711).

    Raises:
        `ValueError`: under FSDP or DeepSpeed ZeRO-3.

    Example:

    ```python
    >>> from papertrl import SupervisedTrainer, UpdateSparsity, compose
    >>> trainer_class = compose(SupervisedTrainer, UpdateSparsity)
    >>> trainer_class.config_class("out", update_sparsity_every=10, bf16=False).update_sparsity_tolerance
    1e-05

    ```
    """

    method = declared("update_sparsity")
    config_class = UpdateSparsityConfig

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "`update_sparsity_every` compares whole parameters, which DeepSpeed and FSDP shard. Set it to None."
            )
        # Before a checkpoint is loaded, so that a resumed run compares with the same start
        self._start = _copy(trainer.model)

    def callbacks(self) -> list[TrainerCallback]:
        return [_Look(self)]

    def look(self, model: torch.nn.Module) -> dict[str, float]:
        """Share of the trained weights of `model` that have changed: `changed_share`."""
        changed = total = 0
        for name, parameter in model.named_parameters():
            if name in self._start:
                difference = (parameter.detach().float().cpu() - self._start[name].float()).abs()
                changed += int((difference > self.config.update_sparsity_tolerance).sum())
                total += difference.numel()
        return {"update_sparsity/changed_share": changed / max(1, total)}


class _Look(TrainerCallback):
    """Looks every so many steps."""

    def __init__(self, component: UpdateSparsity):
        self.component = component
        self.seen: dict[str, float] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        every = self.component.config.update_sparsity_every
        if every > state.max_steps:
            logger.warning(
                f"'update_sparsity' does nothing: `update_sparsity_every` is {every}, which the {state.max_steps} "
                "steps of training do not reach. Lower it."
            )
        if self.component.trainer is None:
            self.component._start = _copy(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.component.config.update_sparsity_every == 0:
            self.seen = self.component.look(model)
            for name, value in self.seen.items():
                self.component.log_metric(name, value)

    def on_log(self, args, state, control, logs=None, **kwargs):
        # A bare TRL trainer writes its history before it calls this
        if self.component.trainer is None and logs is not None and self.seen:
            logs.update(self.seen)
            state.log_history[-1].update(self.seen)


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: parameter.detach().cpu().clone() for name, parameter in named if parameter.requires_grad}
