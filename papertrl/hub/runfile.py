"""What a run was: `run.json`, from which cards are made and runs repeated."""

import enum
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .files import RUN_FILE
from .scrubbing import scrub

# Where a run goes, where it reports to and which machine it may use are no part of what it computes
NO_CONFIGURATION = (
    "output_dir",
    "overwrite_output_dir",
    "logging_dir",
    "run_name",
    "resume_from_checkpoint",
    "push_to_hub",
    "report_to",
    "disable_tqdm",
    "project",
    "trackio_space_id",
    "local_rank",
    "ddp_backend",
    "deepspeed",
    "accelerator_config",
    "model_init_kwargs",
    "vllm_server_host",
    "vllm_server_base_url",
    "dataset_num_proc",
    # Derived by the config from other fields
    "generation_batch_size",
    "activation_checkpointing",
    "debug",
)


def plain(value: Any) -> Any:
    """`value` as JSON has it: enums by value, tuples as lists, other objects by name."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return getattr(value, "__name__", type(value).__name__)


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, `owner/name` or an old one without owner."""
    return 1 <= len(parts := name.split("/")) <= 2 and all(parts) and not name.startswith((".", "/", "~"))


def versions(adapter: bool) -> dict[str, str]:
    """Versions of Python and of the packages that a run computes with."""
    packages = ["papertrl", "trl", "transformers", "torch", "accelerate", "datasets", *(["peft"] if adapter else [])]
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def hardware(processes: int) -> str:
    """One line about the machine; nothing that tells which one it is."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{torch.cuda.get_device_name(0)} ({memory:.0f} GiB)"
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        device = f"CPU {model or platform.machine()}, {os.cpu_count()} cores"
    return f"{processes} process{'es' if processes > 1 else ''} on {device}, {platform.system()}"


def write_run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """
    Write `run.json`, and return it whole: what an earlier call wrote and `run` does not have is kept.

    Args:
        folder (`Path`):
            Output directory of the run.
        run (`dict`):
            What [`describe`] gives, or what a job adds to it.
    """
    run = (read_run(folder) or {}) | scrub(run)
    partial = folder / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(folder / RUN_FILE)
    return run


def read_run(folder: Path) -> dict[str, Any] | None:
    """Content of `run.json`, or `None` where there is none that can be read."""
    return read_json(folder / RUN_FILE)


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping that a JSON file holds, or `None` where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None
