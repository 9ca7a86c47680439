"""Claiming and settling the output directory of a job."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..core.errors import JobError
from ..core.lock import owned
from ..hub.files import (
    COMPLETIONS_FILE,
    CURVES_FILE,
    EVALUATION_COMPLETIONS,
    EVALUATION_FILE,
    EVALUATION_PLOT,
    EVALUATION_REPORT,
    METRICS_FILE,
    RECIPE_FILE,
    ROUNDS,
    RUN_FILE,
    SAMPLES_FILE,
    START_MODEL,
)
from ..trainers.checkpoints import BRANCH_FILE
from .arguments import Job

# What tells that a folder holds a run, and goes where it is replaced
RUN_FILES = (
    METRICS_FILE,
    CURVES_FILE,
    SAMPLES_FILE,
    START_MODEL,
    RUN_FILE,
    RECIPE_FILE,
    BRANCH_FILE,
    COMPLETIONS_FILE,
    EVALUATION_FILE,
    EVALUATION_REPORT,
    EVALUATION_PLOT,
    EVALUATION_COMPLETIONS,
    ROUNDS,
    "model.safetensors",
    "adapter_model.safetensors",
)


def claim_output_dir(job: Job, state: PartialState, held: ExitStack) -> Path:
    """
    Settle, create and own the output directory; on the main process, for all.

    Without `output_dir`, a new folder `runs/<methods>-<data>-<number>` is taken.

    Args:
        job ([`~papertrl.job.arguments.Job`]):
            The job.
        state (`PartialState`):
            Of the processes of the job.
        held (`ExitStack`):
            Gives the folder up when it is closed.

    Raises:
        [`JobError`]: if it is a file, cannot be written, belongs to a run that lives, or holds another run.
    """
    job.training.output_dir = decided_by_main(state, lambda: _claim(job, held))
    return Path(job.training.output_dir)


def decided_by_main(state: PartialState, decide: Callable[[], Any]) -> Any:
    """
    What `decide` returns on the main process, on all of them.

    Raises:
        [`JobError`]: on all of them, if it does there.
    """
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome[0] = decide()
        except JobError as error:
            outcome[0] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], JobError):
        raise outcome[0]
    return outcome[0]


def numbered_folders(job: Job, methods: list[str]) -> Iterator[Path]:
    """Where a job goes that names no folder: `runs/<methods>-<data>-<number>`, whether it exists or not."""
    subject = job.arguments.dataset_name or job.arguments.task or "addition"
    stem = "_".join(methods) + "-" + Path(subject).stem.replace(":", "-")
    return (Path("runs", f"{stem}-{number}") for number in count(1))


def free_folder(job: Job, methods: list[str]) -> Path:
    """The first of [`numbered_folders`] that did not exist, made."""
    for folder in numbered_folders(job, methods):
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise _not_writable(folder, error) from error
    return folder


def own(path: Path, held: ExitStack) -> None:
    """
    Make the folder `path` and own it until `held` is closed.

    Raises:
        [`JobError`]: if it is a file, cannot be written, or belongs to a run that lives.
    """
    if path.exists() and not path.is_dir():
        raise JobError(f"`output_dir`: '{path}' is a file. Choose a folder.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".papertrl_probe"
        probe.write_bytes(bytes(4096))
        probe.unlink()
        held.enter_context(owned(path))
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> JobError:
    return JobError(
        f"`output_dir`: '{path}' cannot be written ({error.strerror}). Choose a folder that you may write to, on a "
        "disk with free space."
    )


def _claim(job: Job, held: ExitStack) -> str:
    path = Path(job.training.output_dir) if job.output_dir_given else free_folder(job, job.methods)
    own(path, held)
    found = [name for name in RUN_FILES if (path / name).exists()] + [p.name for p in path.glob("checkpoint-*")]
    if found and not job.training.resume_from_checkpoint:
        if not job.arguments.overwrite_output_dir:
            raise JobError(
                f"`output_dir`: '{path}' already holds a run ({', '.join(sorted(found)[:3])}, ...). Go on with it by "
                "`--resume_from_checkpoint True`, replace it by `--overwrite_output_dir`, or choose another folder."
            )
        for name in found:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    return str(path)


def resumed_from(job: Job) -> str | bool | None:
    """Checkpoint to go on from: a folder, `True` for the newest one, or `None`."""
    value = job.training.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(value).lower(), value)
