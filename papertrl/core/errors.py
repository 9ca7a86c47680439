"""Errors for the person at the command line: what is wrong and what to do, in one paragraph."""

import os
import sys

from .secrets import redact


class JobError(Exception):
    """Something about the input, the machine or the run that its user can put right."""

    exit_code = 1


class UsageError(JobError):
    """The command line or the config file asks for something that does not exist or does not fit together."""

    exit_code = 2


class NotFiniteError(JobError, FloatingPointError):
    """Loss, gradient or weights of a training are NaN or infinite."""


class Interrupted(JobError):
    """The run was stopped by a signal; the exit code is the shell's usual 128 plus the signal's number."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signum


def paragraph(error: BaseException) -> str:
    """
    An error as one paragraph.

    A `ValueError` or `TypeError` speaks for itself, as do the errors of this module; others are introduced by their
    type, because their text alone rarely names the cause.
    """
    text = " ".join(str(error).split())
    if isinstance(error, (JobError, ValueError, TypeError)) and text:
        return text
    return f"{type(error).__name__}: {text or 'no message'} (run again with `--debug` for the traceback)"


def tell(message: str) -> None:
    """Print one line or paragraph for the person at the command line, from one process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"papertrl: {redact(message)}", file=sys.stderr)


def tell_failure(error: BaseException, message: str) -> None:
    """
    Print why this process failed, once for all processes of the run: the first that fails speaks.

    Others fail because of it. Before they have found each other, what is wrong with a command line is told by one.
    """
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if ranks != "1" and not _is_first_to_fail(error, rank):
        return
    where = "" if rank == "0" else f"[process {rank} of {ranks}] "
    print(f"papertrl: {where}{redact(message)}", file=sys.stderr, flush=True)


def _is_first_to_fail(error: BaseException, rank: str) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return rank == "0" or not isinstance(error, (JobError, ValueError, TypeError))
    try:
        return distributed.distributed_c10d._get_default_store().add("papertrl_failed", 1) == 1
    except RuntimeError:
        # The process that holds the store is gone
        return True
