"""Training stops where numbers are no longer finite, before they reach the weights."""

import math
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..core.errors import NotFiniteError

# A gradient scaler halves its scale, at first 2¹⁶, for each update that it skips: it has then gone down to 2⁻¹⁶
_MOST_SKIPPED = 32


class StopsWhereNotFinite:
    """
    Mixin of [`~papertrl.trainers.method.MethodTrainer`]: no update by a loss or gradient that is NaN or infinite, and
    no such weights in a file.

    transformers hides such a loss from the log (`logging_nan_inf_filter`), and makes the update. Losses are looked at
    on their device, and asked for once per update, on all ranks together. With fp16, the gradient scaler leaves out
    updates whose gradient overflows; only many in a row stop the training.
    """

    _loss_is_broken: torch.Tensor | None = None
    _skipped_in_a_row = 0

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        broken = ~loss.detach().isfinite()
        self._loss_is_broken = broken if self._loss_is_broken is None else self._loss_is_broken | broken
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        norm = math.nan if grad_norm is None else float(grad_norm)
        overflows = grad_norm is not None and not math.isfinite(norm)
        found = torch.stack([self._loss_is_broken, self._loss_is_broken.new_tensor(overflows)]).float()
        loss_is_broken, overflows = self.accelerator.reduce(found, reduction="sum").tolist()
        self._loss_is_broken = None
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if overflows else 0
        most = _MOST_SKIPPED if self.accelerator.mixed_precision == "fp16" else 1
        if loss_is_broken or self._skipped_in_a_row >= most:
            raise NotFiniteError(self._what_broke(bool(loss_is_broken), norm))
        return grad_norm

    def _what_broke(self, loss: bool, norm: float) -> str:
        step = self.state.global_step + 1
        broken = "loss" if loss else f"gradient (norm {norm})"
        left = f"training stops before the update, and the weights are those of step {step - 1}"
        if self.is_deepspeed_enabled:
            # It updates within its backward
            left = "training stops, and nothing is saved. DeepSpeed made no update if the gradient was not finite"
        return (
            f"The {broken} of step {step} is not finite: {left}. Likely causes: a learning rate that is too high "
            f"(`learning_rate` is {self.args.learning_rate}), numbers that overflow (in `fp16`; `bf16` has a wider "
            "range), or a reward, a stage or a row of the data that brings NaN or infinite values."
        )

    def check_weights(self) -> None:
        """
        Check that all weights are finite.

        Raises:
            [`~papertrl.core.errors.NotFiniteError`]: naming one that is not.
        """
        flags = {name: _is_finite(p) for name, p in self.model.named_parameters() if _knows_nan(p)}
        if not flags:
            return
        finite = torch.stack([flag.to(self.accelerator.device) for flag in flags.values()])
        whole = finite.all().float()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # Each rank has seen its own part
            whole = self.accelerator.reduce(whole, reduction="mean")
        if whole.item() < 1:
            names = [name for name, good in zip(flags, finite.tolist(), strict=True) if not good]
            raise NotFiniteError(
                f"The weights are not finite{f', among them `{names[0]}`' if names else ''}: they are neither trained "
                "nor saved. Begin with another model or an earlier checkpoint, and with a lower `learning_rate` if a "
                "training made them so."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Train; see [`~papertrl.trainers.resuming.Resumes.train`]. Weights that are not finite are refused."""
        self.check_weights()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        self.check_weights()
        super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> Any:
        """Save the model; see [`~transformers.Trainer.save_model`]. Weights that are not finite are refused."""
        self.check_weights()
        return super().save_model(output_dir, _internal_call)


def _knows_nan(parameter: torch.Tensor) -> bool:
    """Whether the type has NaN at all, and is not a quantized one."""
    return parameter.is_floating_point() and parameter.element_size() > 1


def _is_finite(parameter: torch.Tensor) -> torch.Tensor:
    """Whether what this rank has of a parameter is finite."""
    local = parameter.detach()
    if isinstance(parameter, DTensor):
        local = local.to_local()
    elif hasattr(parameter, "ds_tensor"):
        # With ZeRO-3 the parameter itself is empty, and the last part is padded with whatever was in memory
        local = parameter.ds_tensor
        before = torch.distributed.get_rank(parameter.ds_process_group) * local.numel()
        local = local[: max(0, parameter.ds_numel - before)]
    return local.isfinite().all()
