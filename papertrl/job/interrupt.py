"""Stopping a run without losing it: on SIGINT or SIGTERM, finish the step and save a checkpoint."""

import signal
from types import FrameType

import torch
from transformers import TrainerCallback

from ..core.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """
    Turns a signal into a checkpoint and an orderly end; a context manager that installs and removes the handlers.

    Outside the training loop, and on a second signal, [`~papertrl.core.errors.Interrupted`] is raised at once.

    Attributes:
        received (`int`, *optional*):
            Number of the signal that stopped training, the same on every rank.
    """

    def __init__(self):
        self.received: int | None = None
        self._training = False
        self._pending = 0
        self._previous = {}
        self.trainer = None

    def __enter__(self) -> "StopOnSignal":
        self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *exception):
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._training and not self._pending:
            self._pending = signum
            return
        name = signal.Signals(signum).name
        when = "before the checkpoint was complete" if self._training else "outside the training loop"
        raise Interrupted(signum, f"Stopped by {name} {when}; the newest complete checkpoint, if any, is intact.")

    def on_train_begin(self, args, state, control, **kwargs):
        self._training = True

    def on_train_end(self, args, state, control, **kwargs):
        self._training = False

    def on_step_end(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        signum = self._pending
        if accelerator.num_processes > 1:
            # A signal reaches the ranks at different steps; all have to stop after the same one
            pending = torch.tensor([signum], device=accelerator.device)
            signum = int(accelerator.gather(pending).max())
        if signum and state.global_step < state.max_steps:
            self.received = signum
            args.save_only_model = False
            control.should_save = True
            control.should_training_stop = True
