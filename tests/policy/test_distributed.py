"""Two processes equal one on the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from papertrl.core.catalogue import DECLARATIONS

from ..harness.distributed_policy import RESUMED, RUNS, run, run_one


@pytest.fixture(scope="module")
def results(tmp_path_factory, policy_path):
    folder = tmp_path_factory.mktemp("distributed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run_one(folder / "one", policy_path, 1, RESUMED)
    finished = subprocess.run(
        [*launch, "-m", "tests.harness.distributed_policy", folder / "two", policy_path, "2", folder / "one"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    run(folder / "one", policy_path, 1, folder / "two")
    return folder


@pytest.mark.parametrize("label", RUNS)
def test_two_processes_equal_one(label, results):
    names = RUNS[label][0]
    two, one = (json.loads((results / n / f"{label}.json").read_text()) for n in ("two", "one"))
    for name in names:
        signal = DECLARATIONS[name].signal
        assert max(entry[signal] for entry in one if signal in entry) > 0, signal
    for got, expected in zip(two, one, strict=True):
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            if label.startswith("skipping") and key not in ("loss", "grad_norm", "reward"):
                # Metrics of the update cover the rows that are computed, stand-ins included
                continue
            if "dler" in names and key.startswith(("completions/", "num_tokens", "dler/")):
                # These also cover what ranks generate to fill up a refill round
                continue
            if key == "num_tokens" and {"guide_grpo", "scaf_grpo"} & set(names):
                # So does this where groups are repaired
                continue
            assert got[key] == pytest.approx(value, rel=2e-3, abs=1e-5), key
    got, expected = (load_file(results / n / f"{label}.safetensors") for n in ("two", "one"))
    for key, value in expected.items():
        assert (got[key] - value).abs().max() < 1e-5, key


@pytest.mark.parametrize("processes", ["one", "two"])
def test_another_number_of_processes_goes_on_alike(processes, results):
    """What it resumes was saved by the other number of processes."""
    got = load_file(results / processes / "resumed.safetensors")
    for key, value in load_file(results / "one" / f"{RESUMED}.safetensors").items():
        assert (got[key] - value).abs().max() < 1e-5, key
    log, whole = (json.loads((results / folder / f"{label}.json").read_text()) for folder, label in (
        (processes, "resumed"), ("one", RESUMED)))  # fmt: skip
    signal = DECLARATIONS["gain_rl"].signal
    assert [entry[signal] for entry in log if signal in entry] == pytest.approx(
        [entry[signal] for entry in whole if signal in entry]
    )
