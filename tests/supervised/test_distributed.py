import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ..harness.distributed_supervised import RUNS, run
from ..harness.sums import assert_close

SIGNALS = {name: trainer_class.method.signal for name, (trainer_class, _) in RUNS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = ["-m", "tests.harness.distributed_supervised", str(folder / "two"), "2"]
    finished = subprocess.run(
        [*launch, *program],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    run(folder / "one", batch_size=4)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, folder):
    found, expected = (json.loads((folder / ranks / name / "history.json").read_text()) for ranks in ("two", "one"))
    assert expected[2][SIGNALS[name]] > 1e-3
    assert len(found) == len(expected)
    for entry in (*found, *expected):
        # Counts padding, of which two small batches have less than a large one
        entry.pop("total_flos", None)
    for entry, other in zip(found, expected, strict=True):
        assert entry == pytest.approx(other, rel=1e-3, abs=1e-5)
    weights = (load_file(folder / ranks / name / "weights.safetensors") for ranks in ("two", "one"))
    assert_close(*weights, rtol=1e-3, atol=1e-5)
