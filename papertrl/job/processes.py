"""The processes of a job: that those which were started together train together."""

import os

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from ..core.errors import JobError, tell

HOW = (
    "Start several processes by `torchrun --nproc_per_node N scripts/train.py ...`, and one without a launcher and "
    "without `WORLD_SIZE` in the environment"
)


def join_processes() -> None:
    """
    Let the processes of a launcher find each other on CPUs too; before a config is made, which starts them.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the environment speaks of others, but no launcher started this one.
    """
    started = started_processes()
    if started > 1 and not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        raise JobError(f"`WORLD_SIZE` is {started}, but no launcher has numbered this process (`RANK`). {HOW}.")
    if started > 1 and not torch.accelerator.is_available():
        # Without it, accelerate takes each of them for the only one
        os.environ["ACCELERATE_USE_CPU"] = "true"


def check_processes(state: PartialState) -> None:
    """
    Check that those train together that were started together.

    Raises:
        [`~papertrl.core.errors.JobError`]: if they are not as many as were started, since each would train a copy.
    """
    started = started_processes()
    if started not in (1, state.num_processes):
        raise JobError(
            f"{started} processes were started (`WORLD_SIZE`), but {state.num_processes} would train in one job: each "
            f"would write a copy to the same folder. {HOW}."
        )


class SayProcesses(TrainerCallback):
    """Says how many processes train, when they begin."""

    def on_train_begin(self, args, state, control, **kwargs):
        count = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
        tell(f"Training in {count} on {args.device.type}.")


def started_processes() -> int:
    """How many processes a launcher says that it started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
