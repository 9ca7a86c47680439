import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .distributed_run import run
from .helpers import assert_close


def test_two_processes_equal_one(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "supervised.distributed_run", str(tmp_path / "two"), "4"]
    finished = subprocess.run(
        [*launch, *program],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    run(tmp_path / "one", batch_size=8)

    found, expected = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("two", "one"))
    assert expected[2]["asft/kl_to_ref"] > 1e-3
    assert len(found) == len(expected)
    for entry in (*found, *expected):
        # Counts padding, of which two small batches have less than a large one
        entry.pop("total_flos", None)
    for entry, other in zip(found, expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-3, abs=1e-5)
    weights = (load_file(tmp_path / name / "weights.safetensors") for name in ("two", "one"))
    assert_close(*weights, rtol=1e-3, atol=1e-5)
