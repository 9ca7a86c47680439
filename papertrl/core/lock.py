"""One owner of a folder at a time, across processes and machines."""

import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from .errors import JobError

LOCK_FILE = ".papertrl_lock"
# Seconds between signs of life, and after which an owner on another machine counts as dead
BEAT, SILENCE = 10.0, 90.0


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """
    Own `folder` while the context lasts; the lock of an owner that died is taken over.

    Raises:
        [`~papertrl.core.errors.JobError`]: if a process that lives owns it, naming it and what to do.
    """
    file, guard = folder / LOCK_FILE, FileLock(folder / f"{LOCK_FILE}.guard")
    # Some network file systems have no locks; then only runs that begin in the same instant are not told apart
    with suppress(NotImplementedError):
        guard.acquire()
    try:
        refuse_if_owned(folder, "Wait for its end or stop it, or choose another folder.")
        file.write_text(json.dumps(_this_process()), encoding="utf-8")
    finally:
        guard.release()
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(file, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(file) == _this_process():
            file.unlink()


def refuse_if_owned(folder: Path, remedy: str) -> None:
    """
    Check that no living process writes to `folder`.

    Raises:
        [`~papertrl.core.errors.JobError`]: naming the process.
    """
    file = folder / LOCK_FILE
    owner = _read(file)
    if owner is None or not _lives(owner, file):
        return
    here = owner["machine"] == _machine()
    told = "" if here else f" (a run there that is dead is recognized after {SILENCE:.0f} seconds; or delete '{file}')"
    raise JobError(
        f"`output_dir`: process {owner['process']} on '{owner['host']}' is writing to '{folder}'{told}. {remedy}"
    )


def _this_process() -> dict[str, Any]:
    started = psutil.Process().create_time()
    return {"host": platform.node(), "machine": _machine(), "process": os.getpid(), "started": started}


def _machine() -> str:
    """Where process numbers mean the same."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return platform.node()


def _read(file: Path) -> dict[str, Any] | None:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Whoever was killed while writing it owns nothing any more
        return None
    return owner if isinstance(owner, dict) and owner.keys() == _this_process().keys() else None


def _lives(owner: dict[str, Any], file: Path) -> bool:
    if owner["machine"] != _machine():
        with suppress(OSError):
            return time.time() - file.stat().st_mtime < SILENCE
        return False
    try:
        process = psutil.Process(owner["process"])
        # Numbers are given again
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 2.0
    except psutil.NoSuchProcess:
        return False


def _beat(file: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)
