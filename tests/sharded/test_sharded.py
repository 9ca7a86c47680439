"""Two processes over which a model is sharded do what TRL does in one with a whole model: FSDP2, ZeRO-2 and ZeRO-3."""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from papertrl.core.catalogue import DECLARATIONS

from ..harness.sharded import LAUNCHES, PROMPTS, RUNS, make_models, make_run

# What methods read of the pass over the rollouts
READ = ("entropies", "hidden_states", "mlp_inputs")
# How the sharded parameters look, where they are not what DeepSpeed's optimizer has in parts
FORMS = {"fsdp2": "DTensor (Shard(dim=0),)", "zero2": "DeepSpeedZeroOptimizer", "zero3": "NOT_AVAILABLE"}
DEEPSPEED = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
MARKS = {"fsdp2": [], "fsdp2_rare": [pytest.mark.slow], "zero2": DEEPSPEED, "zero3": DEEPSPEED}
EACH_LAUNCH = [pytest.param(launch, marks=MARKS[launch]) for launch in LAUNCHES]
EACH_RUN = [
    pytest.param(launch, label, marks=MARKS[launch], id=f"{launch}-{label}")
    for launch, (_, labels) in LAUNCHES.items()
    for label in labels
]
each_launch = pytest.mark.parametrize("launch", EACH_LAUNCH)
each_run = pytest.mark.parametrize(("launch", "label"), EACH_RUN)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    return folder


@pytest.fixture(scope="module")
def launched(models, tmp_path_factory):
    """Gives the folder of a launch, and how it ended; it is made when it is first asked for."""

    @cache
    def run(launch: str) -> tuple[Path, subprocess.CompletedProcess]:
        folder = tmp_path_factory.mktemp("two")
        processes = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        finished = subprocess.run(
            [*processes, "-m", "tests.harness.sharded", models, folder, launch],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=600,
        )
        return folder / launch, finished

    return run


@pytest.fixture
def sharded(launch, launched):
    """Folder of the runs of a launch."""
    folder, finished = launched(launch)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return folder


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory):
    """Gives what a run in one process leaves behind."""
    folder = tmp_path_factory.mktemp("one")

    @cache
    def run(label: str) -> dict[str, Any]:
        make_run(models, folder, label)
        return torch.load(folder / f"{label}.pt")

    return run


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Up to `tolerance`, as a share of the largest number in each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * value.abs().max(), name


@each_run
def test_the_model_is_sharded(launch, label, sharded):
    found, run = torch.load(sharded / f"{label}.pt"), RUNS[label]
    engine = LAUNCHES[launch][0]
    assert found["sharding"]["by"] == ("FSDP" if engine == "fsdp2" else "DEEPSPEED")
    assert found["sharding"]["forms"] == [FORMS[engine]]
    assert found["sharding"]["shares"] == pytest.approx([0.5, 0.5], abs=0.02)
    assert found["checkpointing"] == run.values.get("gradient_checkpointing", False)
    assert found["shares"] == run.ours.get("share_prompts", True)


@each_run
def test_updates_are_those_of_trl_in_one_process(launch, label, sharded, plain):
    found, expected = torch.load(sharded / f"{label}.pt"), plain(label)
    steps, theirs = ([entry for entry in run["history"] if "loss" in entry] for run in (found, expected))
    assert len(steps) == len(theirs) == len(found["gradients"]) == len(expected["gradients"]) == 2
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in steps] == pytest.approx([step[name] for step in theirs], rel=1e-5, abs=1e-6)
    # So that gradients are clipped
    assert max(step["grad_norm"] for step in steps) > 0.3
    for ours, trl in zip(found["gradients"], expected["gradients"], strict=True):
        assert_equal(ours, trl, tolerance=1e-5)
    assert_equal(found["weights"], expected["weights"], tolerance=1e-5)
    if RUNS[label].family == "preference":
        for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
            assert [step[name] for step in steps] == pytest.approx([step[name] for step in theirs], rel=1e-5, abs=1e-6)
    for method in RUNS[label].methods:
        name = {"gain_rl": "gain_rl/concentration"}.get(method, DECLARATIONS[method].signal)
        values, signals = ([entry[name] for entry in run["history"] if name in entry] for run in (found, expected))
        assert values == pytest.approx(signals, rel=1e-4) and any(values), name


@pytest.mark.parametrize(("launch", "label"), [run for run in EACH_RUN if run.values[1].startswith("policy")])
def test_passes_over_rollouts_are_those_of_trl(launch, label, sharded, plain, models):
    found, expected = torch.load(sharded / f"{label}.pt")["rows"], plain(label)["rows"]
    assert found.keys() == expected.keys() and len(found) == 16
    run, read = RUNS[label], {}
    for key, scores in expected.items():
        assert ("ref_per_token_logps" in scores) == ("beta" in run.values)
        read[key] = {name: found[key].pop(name) for name in list(found[key]) if name in READ}
        assert_equal(found[key], scores, tolerance=1e-5)
    if "beta" not in run.values or run.peft:
        return
    model = AutoModelForCausalLM.from_pretrained(models / run.model)
    inputs = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for (prompt, completion), values in read.items():
        with torch.no_grad():
            out = model(input_ids=torch.tensor([[*prompt, *completion]]), output_hidden_states=True)
        logps = out.logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = {
            "entropies": -(logps.exp() * logps).sum(-1),
            "hidden_states": out.hidden_states[-1][0, len(prompt) - 1 : -1],
            "mlp_inputs": inputs.pop()[0],
        }
        assert_equal(values, expected, tolerance=1e-5)


@each_run
def test_a_sharded_model_answers_and_is_saved_as_a_whole(launch, label, sharded):
    found, saved = torch.load(sharded / f"{label}.pt"), sharded / f"{label}_saved"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    if RUNS[label].peft:
        assert any("lora_A" in name for name, _ in model.named_parameters())
    else:
        assert_equal(dict(model.named_parameters()), found["weights"], tolerance=0)
    answers = []
    for row in PROMPTS[::2] + PROMPTS[1::2]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        answers.append(model.generate(ids, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :].tolist())
    assert found["answers"] == answers and len(set(map(len, answers))) > 1


@each_run
def test_a_broken_weight_on_one_rank_is_found_by_all(launch, label, sharded):
    for complaint in torch.load(sharded / f"{label}.pt")["complaints"]:
        assert complaint.startswith("The weights are not finite")


@pytest.mark.parametrize("launch", [launch for launch in EACH_LAUNCH if launch.values != ("fsdp2_rare",)])
@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_broken_update_is_not_made(launch, part, sharded):
    found = torch.load(sharded / f"broken_{part}.pt")
    assert len(found["complaints"]) == 2
    for complaint in found["complaints"]:
        assert complaint.startswith(f"The {part}") and "of step 2 is not finite" in complaint
    for name, weight in found["weights"].items():
        assert weight.isfinite().all() and torch.equal(weight, found["before"][name])


@each_launch
def test_a_resumed_run_ends_as_one_that_is_not_interrupted(launch, sharded):
    found, expected = (torch.load(sharded / f"{name}.pt") for name in ("resumed", "whole"))
    assert found["state"] == expected["state"]
    last, theirs = ({**run["history"][-2]} for run in (found, expected))
    assert last["step"] == theirs["step"] == 4
    assert last == theirs
    saved = AutoModelForCausalLM.from_pretrained(sharded / "resumed_saved")
    for name, weight in expected["weights"].items():
        assert torch.equal(weight, found["weights"][name]), name
        assert torch.equal(weight, saved.get_parameter(name)), name
    if launch == "fsdp2_rare":
        assert (sharded / "whole" / "checkpoint-3" / "pytorch_model_fsdp_0").is_dir()
