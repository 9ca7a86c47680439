"""Checkpoints of method trainers: which is the last, and whether one can be resumed."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(output_dir: str) -> Path:
    """
    The newest checkpoint below `output_dir` that was written to its end.

    Raises:
        `ValueError`: if there is none.
    """
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / "trainer_state.json").exists()]
    if not folders:
        raise ValueError(f"`resume_from_checkpoint`: no complete checkpoint below '{output_dir}'.")
    return max(folders, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def check_checkpoint(folder: str | Path, methods: list[str]) -> None:
    """
    Check that a checkpoint can be resumed by `methods`, without loading its tensors.

    Raises:
        `ValueError`: naming the folder and what is missing, damaged or different.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint`: '{folder}' is not a folder.")
    try:
        json.loads((folder / "trainer_state.json").read_text())
        written_by = json.loads((folder / "papertrl.json").read_text())["methods"]
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            if (folder / name).exists():
                torch.load(folder / name, weights_only=True, map_location="meta")
    except Exception as error:
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' is damaged or no papertrl checkpoint ({error}). Resume from "
            f"another '{PREFIX_CHECKPOINT_DIR}-*' folder, or start anew without `resume_from_checkpoint`."
        ) from error
    if sorted(written_by) != sorted(methods):
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' was written by methods {written_by}, but this trainer runs "
            f"{methods}. Resume with the same methods."
        )
