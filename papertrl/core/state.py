"""Training state as JSON for plain values and safetensors for tensors; never pickle."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_TENSOR = "__tensor__"


def save_state(stem: Path, state: dict[str, Any]) -> None:
    """
    Write a nested `state` of plain values and tensors to `stem.json` and `stem.safetensors`.

    Both files are replaced atomically, so that a crash leaves the old ones.
    """
    tensors: dict[str, torch.Tensor] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            key = str(len(tensors))
            tensors[key] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: key}
        if isinstance(value, dict):
            return {str(key): encode(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [encode(item) for item in value]
        return value

    text = json.dumps(encode(state), indent=2)
    stem.parent.mkdir(parents=True, exist_ok=True)
    temporary = stem.with_suffix(".tmp")
    save_file(tensors, temporary)
    os.replace(temporary, stem.with_suffix(".safetensors"))
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, stem.with_suffix(".json"))


def load_state(stem: Path) -> dict[str, Any]:
    """Read what [`save_state`] wrote."""
    tensors = load_file(stem.with_suffix(".safetensors"))

    def decode(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value[_TENSOR]] if _TENSOR in value else {key: decode(item) for key, item in value.items()}
        return [decode(item) for item in value] if isinstance(value, list) else value

    return decode(json.loads(stem.with_suffix(".json").read_text(encoding="utf-8")))
