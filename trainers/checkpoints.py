"""Checkpoints of method trainers: which is the last, whether one can be resumed, and by which run."""

import json
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.errors import JobError

logger = get_logger(__name__)

# Checkpoints of the run in an output directory, in the order in which it trained from one to the next
BRANCH_FILE = "checkpoints.json"
STATE_FILE = "trainer_state.json"
WEIGHTS = ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp*", "global_step*")
# Factors of the rows of an optimizer step
SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps", "processes")
# What decides the order of the data, and nothing else
ORDER = ("rows of `train_dataset`", "seed", "data_seed")


# --- The last one ----------------------------------------------------------------------------------------------------


def last_complete_checkpoint(output_dir: str) -> Path:
    """
    The newest checkpoint of the run in `output_dir` that can be read.

    A run that went back to an earlier checkpoint goes on from there: those that it left behind do not count. One that
    is damaged is passed over, and said so.

    Raises:
        `ValueError`: if there is none.
    """
    listed, found = read_branch(output_dir), _checkpoints(output_dir)
    for folder in reversed(found if listed is None else listed):
        if not (folder / STATE_FILE).exists():
            continue
        try:
            read_checkpoint(folder)
        except ValueError as error:
            logger.warning(f"{error} The checkpoint before it is taken.")
            continue
        return folder
    left = [folder.name for folder in found if (folder / STATE_FILE).exists()]
    hint = f" Those of an earlier run can be named: {', '.join(left)}." if listed is not None and left else ""
    raise ValueError(f"`resume_from_checkpoint`: no complete checkpoint below '{output_dir}'.{hint}")


def _checkpoints(output_dir: str | Path) -> list[Path]:
    named = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
    folders = [
        p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if named.fullmatch(p.name) and p.is_dir()
    ]
    return sorted(folders, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def read_branch(output_dir: str | Path) -> list[Path] | None:
    """Checkpoints of the run in `output_dir`, the newest last, or `None` where nothing tells."""
    try:
        names = json.loads((Path(output_dir) / BRANCH_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return [Path(output_dir) / name for name in names]


def begin_branch(output_dir: str | Path, checkpoint: str | Path | None) -> None:
    """Note that a run goes on from `checkpoint`, or begins anew; what an earlier one left half done is removed."""
    for folder in _checkpoints(output_dir):
        # Ours are begun with what the methods keep, and ended with this file
        if not (folder / STATE_FILE).exists() and any(folder.glob("papertrl*")):
            shutil.rmtree(folder)
    for file in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/*.tmp"):
        file.unlink()
    if checkpoint is None:
        if _checkpoints(output_dir):
            _write_branch(output_dir, [])
        return
    listed = read_branch(output_dir)
    names = [folder.resolve() for folder in (_checkpoints(output_dir) if listed is None else listed)]
    start = Path(checkpoint).resolve()
    known = names[: names.index(start)] if start in names else []
    _write_branch(output_dir, [*known, start])


def add_to_branch(output_dir: str | Path, checkpoint: Path) -> None:
    """Note that a run has completed `checkpoint`; those that were removed are forgotten."""
    earlier = [folder for folder in read_branch(output_dir) or [] if folder.exists()]
    _write_branch(output_dir, [*earlier, checkpoint])


def _write_branch(output_dir: str | Path, folders: Iterable[Path]) -> None:
    root = Path(output_dir).resolve()
    paths = dict.fromkeys(folder.resolve() for folder in folders)
    if list(paths) == [folder.resolve() for folder in read_branch(root) or []] and (root / BRANCH_FILE).exists():
        return
    names = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in paths]
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f"{BRANCH_FILE}.tmp"
    partial.write_text(json.dumps(names) + "\n", encoding="utf-8")
    partial.replace(root / BRANCH_FILE)


# --- One of them -----------------------------------------------------------------------------------------------------


def read_checkpoint(folder: str | Path) -> dict[str, Any]:
    """
    What a checkpoint says of the run that wrote it, `methods` and `layout`; its tensors are not loaded.

    Raises:
        `ValueError`: naming the folder and what is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint`: '{folder}' is not a folder.")
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
        written = json.loads((folder / "papertrl.json").read_text(encoding="utf-8"))
        written = {name: written[name] for name in ("methods", "layout", "ranks")}
        needed = [folder / "papertrl.safetensors"]
        for rank in range(written["ranks"]):
            json.loads((folder / f"papertrl_rank{rank}.json").read_text(encoding="utf-8"))
            needed.append(folder / f"papertrl_rank{rank}.safetensors")
        for index in folder.glob("*.index.json"):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            needed += [folder / name for name in set(shards)]
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            needed.append(folder / "model.safetensors")
        for file in {*needed, *folder.rglob("*.safetensors")}:
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            if (folder / name).exists():
                torch.load(folder / name, weights_only=True, map_location="meta")
        for file in folder.glob("*.pth"):
            if not zipfile.is_zipfile(file):
                raise ValueError(f"{file.name} is cut off")
    except Exception as error:
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' is damaged or no papertrl checkpoint ({error}). Resume from "
            f"another '{PREFIX_CHECKPOINT_DIR}-*' folder, or start anew without `resume_from_checkpoint`."
        ) from error
    return written


def check_checkpoint(folder: str | Path, methods: list[str], layout: dict[str, Any], skips_data: bool) -> None:
    """
    Check that a checkpoint can be resumed by `methods` under `layout`, without loading its tensors.

    Args:
        folder (`str` or `Path`):
            The checkpoint.
        methods (`list[str]`):
            Names of the methods that are to go on.
        layout (`dict`):
            Of [`~papertrl.trainers.method.MethodTrainer.layout`]. Rows may be split otherwise between devices and
            micro-batches, as long as an optimizer step has as many.
        skips_data (`bool`):
            Whether the run goes on at the same place of the data.

    Raises:
        `ValueError`: naming the folder and what is missing, damaged or different.
    """
    written = read_checkpoint(folder)
    if sorted(written["methods"]) != sorted(methods):
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' was written by methods {written['methods']}, but this trainer runs "
            f"{methods}. Resume with the same methods."
        )
    theirs = written["layout"]
    if rows_per_step(theirs) != rows_per_step(layout):
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' was written with {split(theirs)}, but this run has "
            f"{split(layout)}: steps, data and what methods count would mean something else. Choose a split with the "
            "same product."
        )
    for name in layout:
        if name in SPLIT or (name in ORDER and not skips_data):
            continue
        if theirs.get(name) != layout[name]:
            what = name if "`" in name else f"`{name}`"
            raise ValueError(
                f"`resume_from_checkpoint`: '{folder}' was written with {what} = {theirs.get(name)}, but this run has "
                f"{layout[name]}: it would go on at another place of other data. Resume with {theirs.get(name)}, or "
                f"start a new run from the weights (`model_name_or_path`: '{folder}')."
            )


def could_not_save(folder: Path, output_dir: str, error: Exception) -> JobError:
    """The error for a checkpoint that was not completed, with the one to go on from."""
    cause = f"checkpoint '{folder}' could not be saved ({' '.join(str(error).split())[:300]})."
    try:
        last = last_complete_checkpoint(output_dir)
    except ValueError:
        return JobError(f"`output_dir`: {cause} Free space or choose another folder; there is no earlier one.")
    return JobError(
        f"`output_dir`: {cause} Free space, then go on from the one before: `--resume_from_checkpoint {last}`."
    )


def rows_per_step(layout: dict[str, Any]) -> int:
    """Rows of an optimizer step, over all processes."""
    rows = 1
    for name in SPLIT:
        rows *= layout[name]
    return rows


def split(layout: dict[str, Any]) -> str:
    """How a layout splits the rows of an optimizer step, in words."""
    factors = " x ".join(f"{layout[name]} ({name})" for name in SPLIT)
    return f"{factors} = {rows_per_step(layout)} rows per optimizer step"


def tell_what_is_missing(folder: Path, generator_file: str) -> None:
    """Warn of files without which a checkpoint can be resumed, but not to the same numbers."""
    missing = [name for name in ("optimizer.pt", "scheduler.pt") if not (folder / name).exists()]
    if missing:
        logger.warning(
            f"'{folder}' has no {' and no '.join(missing)}: neither optimizer nor learning rate schedule is restored, "
            "so that moments and schedule start anew, warmup included."
        )
    if not (folder / generator_file).exists():
        logger.warning(
            f"'{folder}' has no {generator_file}: the random numbers of this process start anew, so that what is "
            "sampled and dropped out differs from a run that was not stopped."
        )
