"""Several processes for one job: `papertrl train --num_processes 2`."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import UsageError

# Set for what is started here, which must not start processes of its own
LAUNCHED = "PAPERTRL_LAUNCHED"
# How long the others have to end by themselves when one process has failed
GRACE_SECONDS = 20.0
# Processes that may share a CPU of fewer cores
MOST_SHARING = 8


def is_launched() -> bool:
    """Whether this is a process of several, or one that [`launch`] started."""
    return LAUNCHED in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch(command: Sequence[str], processes: int, use_cpu: bool = False) -> int:
    """
    Run a command as several processes of one job on this machine, and wait for them.

    Each gets what `torchrun` would give it. `accelerate launch --cpu --num_processes N` starts one process where MPI
    is missing, and processes on the CPU only find each other if they are told that it is the CPU that they use.

    Args:
        command (`Sequence[str]`):
            Program and arguments.
        processes (`int`):
            How many.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Whether they use the CPU although there is an accelerator.

    Returns:
        `int`: exit code of the first process that failed, else 0.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if there are fewer accelerators than processes, or far fewer cores.
    """
    import torch

    if not use_cpu and torch.accelerator.is_available() and torch.accelerator.device_count() < processes:
        raise UsageError(
            f"`--num_processes` must be at most {torch.accelerator.device_count()}, the number of accelerators here, "
            f"got {processes}. With `--use_cpu`, processes share the CPU."
        )
    cores = os.cpu_count() or 1
    if processes > max(MOST_SHARING, cores):
        raise UsageError(
            f"`--num_processes` must be at most {max(MOST_SHARING, cores)} on a machine of {cores} cores, got "
            f"{processes}: each holds the model."
        )
    shared = {
        **os.environ,
        LAUNCHED: "1",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if use_cpu or not torch.accelerator.is_available():
        shared["ACCELERATE_USE_CPU"] = "true"
        shared.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    running = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def forward(signum, frame):
        for process in running:
            process.send_signal(signum)

    before = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(running)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for process in running:
            if process.poll() is None:
                process.kill()


def _wait(running: list[subprocess.Popen]) -> int:
    failed, deadline = 0, float("inf")
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        codes = [process.returncode for process in running if process.returncode]
        if codes and not failed:
            failed = codes[0]
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(0.1)
    failed = failed or next((process.returncode for process in running if process.returncode), 0)
    # As a shell tells that a signal ended it
    return 128 - failed if failed < 0 else failed


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def accelerate_command(config: str, processes: int | None) -> list[str]:
    """
    Command that runs Python under a configuration of Accelerate; a module and its arguments are to follow.

    Args:
        config (`str`):
            File, or name of one that TRL brings along, such as `zero3`.
        processes (`int`, *optional*):
            How many, where it is not as the configuration says.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if there is no such configuration.
    """
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    try:
        found = resolve_accelerate_config_argument(["--accelerate_config", config])
    except ValueError as error:
        raise UsageError(f"`--accelerate_config`: {error}") from error
    count = [] if processes is None else ["--num_processes", str(processes)]
    return [sys.executable, "-m", "accelerate.commands.launch", *found, *count, "-m"]


def start(argv: Sequence[str], processes: int | None, config: str | None, use_cpu: bool) -> int:
    """
    Run `papertrl` with these arguments as several processes.

    Args:
        argv (`Sequence[str]`):
            Arguments of `papertrl`.
        processes (`int`, *optional*), config (`str`, *optional*), use_cpu (`bool`):
            As the flags `--num_processes`, `--accelerate_config` and `--use_cpu` say.

    Returns:
        `int`: exit code.
    """
    if config is None:
        return launch([sys.executable, "-m", "papertrl", *argv], processes or 1, use_cpu)
    # Modules of the working directory stay where they are found
    environment = os.environ | {LAUNCHED: "1"}
    command = [*accelerate_command(config, processes), "papertrl", *argv]
    return subprocess.run(command, env=environment, cwd=Path.cwd()).returncode
