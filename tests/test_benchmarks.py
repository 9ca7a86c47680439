"""What the benchmarks rest on: lengths that both sides share, the needed work, a GPU command that nobody watches."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from scipy.stats import lognorm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks read /proc")
SMALL = ["--device", "cpu", "--small", "--threads", "1"]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("gpu")


def test_a_small_workload(gpu, tmp_path):
    """The one of which half of the groups have no effect."""
    gpu.main([*SMALL, "--workloads", "c", "--pairs", "1", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_c.json").read_text(encoding="utf-8"))["results"]["axes"]["defaults"]
    summary, [pair] = found["summary"], found["pairs"]
    assert summary["gradient_difference"] < 1e-5
    lengths, prompts = pair["lengths"]["trl"], pair["prompt_lengths"]
    # A prompt of 40 to 48 tokens for 8 completions, of which 16 and more tokens are cut
    law = lognorm(s=0.5, scale=8)
    for length in range(1, 16):
        assert sum(one > length for one in lengths) == round(32 * law.sf(length))
    assert max(lengths) == 16
    layers, head = 2 * (4 * 32 * 32 + 3 * 32 * 64), 8192 * 32
    assert pair["flop"]["generation"] == 2 * (layers * (sum(prompts) + sum(lengths)) + head * sum(lengths))
    # Prompts alternate between those that vary and those that are settled
    trained = sum(sum(lengths[8 * group : 8 * group + 8]) for group in (0, 2))
    positions = prompts[0] + prompts[2] + trained
    assert pair["flop"]["update"] == 8 * layers * positions + 6 * head * trained
    for phase, flop in pair["flop"].items():
        assert summary["limit"][phase] == pytest.approx(flop / summary["gflops"] / 1e9)


def test_what_the_time_does_not_suffice_for_is_named(gpu, tmp_path, capsys):
    gpu.main([*SMALL, "--workloads", "a", "e", "--minutes", "0", "--output", str(tmp_path)])
    told = capsys.readouterr().out
    assert all(f"({name})" in told for name in "ae") and told.count("dropped, the time is over") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so(gpu):
    with pytest.raises(SystemExit, match=r"There is no CUDA device. `--device cpu --small`"):
        gpu.main([])


def test_a_budget_leaves_time_for_the_jobs_to_come(gpu, monkeypatch):
    """Ten minutes for two jobs whose pairs take two: five for the first, and the rest for the other."""
    harness, now = sys.modules["harness"], [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])

    def pair(number, order):
        now[0] += 120
        return {"number": number}

    budget = harness.Budget(10, 2)
    assert [one["number"] for one in harness.run_pairs(pair, 9, budget)] == [1]
    assert now[0] == 240
    assert [one["number"] for one in harness.run_pairs(pair, 9, budget)] == [1, 2]
    assert now[0] == 600
    assert harness.run_pairs(pair, 9, harness.Budget(1, 1)) == []
