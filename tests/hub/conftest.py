import json
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from papertrl.cli import main

from .server import TOKEN, LoopbackHub

TRAIN = ["train", "--method", "lp_reg", "--max_steps", "3", "--start_model_steps", "5", "--held_out_prompts", "4"]
TRAIN += ["--per_device_train_batch_size", "16", "--save_strategy", "no", "--disable_tqdm", "True"]


@pytest.fixture
def hub(monkeypatch):
    """A loopback Hub that the client of this process may talk to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with LoopbackHub() as server:
        yield server


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Output directory of a short run, with what must never be published beside it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-run"
    assert main([*TRAIN, "--output_dir", str(folder)]) == 0
    (folder / ".env").write_text("HF_TOKEN=hf_secretsecretsecret\n")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "notes.txt", "pytorch_model.bin"):
        (folder / name).write_bytes(b"not for the Hub")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "model.safetensors").write_bytes(b"checkpoint")
    return folder


def weights(value: int) -> bytes:
    """A safetensors file of 200 000 bytes."""
    return save({"weight": torch.full((199_920,), value, dtype=torch.uint8)})


@pytest.fixture
def folder(tmp_path):
    """A small output directory made by hand: a model in two shards, without `run.json`."""
    path = tmp_path / "small"
    path.mkdir()
    for i in (1, 2):
        (path / f"model-0000{i}-of-00002.safetensors").write_bytes(weights(i))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "README.md").write_text("---\ntags:\n- trl\n---\n\n# Small\n")
    return path


def client(hub, code: str, *arguments: str, **environment: str) -> subprocess.Popen:
    """A Python process whose Hub is `hub`."""
    env = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
