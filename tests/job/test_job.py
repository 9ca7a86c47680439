import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from papertrl import cli
from papertrl.job.arguments import choose

from .conftest import SMALL, flags


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_run_leaves_everything(small_run):
    model = AutoModelForCausalLM.from_pretrained(small_run)
    start = AutoModelForCausalLM.from_pretrained(small_run / "start_model")
    tokenizer = AutoTokenizer.from_pretrained(small_run)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    assert tokenizer.decode(model.generate(**tokenizer("1+1=", return_tensors="pt"), max_new_tokens=2)[0])
    lines = [json.loads(line) for line in (small_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][:4] == [0, 1, 2, 3]
    assert "held_out/accuracy" in lines[0] and all("held_out/accuracy" in line for line in lines[1:4])
    assert "lp_reg/mean_kept_mass" in lines[1] and "reward" in lines[1]
    assert (small_run / "training_curves.png").read_bytes()[:4] == b"\x89PNG"
    card = (small_run / "README.md").read_text()
    assert "2510.03222" in card and "held-out accuracy" in card and "training_curves.png" in card
    samples = (small_run / "samples.md").read_text()
    assert samples.count("Before (score") == samples.count("After (score") == 8


@pytest.mark.parametrize("methods", [["rpo"], ["asft"], ["gain_rl", "dler"]])
def test_other_families_and_combinations(methods, tmp_path, capsys):
    changes = {"num_generations": None} if methods[0] in ("rpo", "asft") else {}
    assert cli.main(["train", "--methods", *methods, *flags(max_steps=2, **changes), "--output_dir", "out"]) == 0
    out = capsys.readouterr().out
    for name in ("model.safetensors", "README.md", "metrics.jsonl", "training_curves.png", "samples.md"):
        assert f"out/{name}" in out and (tmp_path / "out" / name).exists()
    assert "Held-out accuracy (greedy, 8 prompts)" in out


def test_a_function_of_the_user_acts_and_is_told_of(tmp_path):
    (tmp_path / "my_scale.py").write_text("def none(default):\n    return default * 0\n")
    run = [*flags(max_steps=2, start_model_steps=20), "--stage", "scale=my_scale.none", "--output_dir", "out"]
    assert cli.main(["train", "--methods", "grpo", "gain_rl", *run]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [0.0, 0.0]
    told = json.loads((tmp_path / "out" / "run.json").read_text())
    assert told["stages"] == {"scale": "my_scale.none"}
    assert [(method["name"], method["slot"]) for method in told["methods"]] == [("gain_rl", "prompts")]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`scale` by `my_scale.none`" in card and "in the slot *prompts*" in card and "arxiv:2506.02281" in card
    assert choose(["--config", "out/recipe.yaml"]).config["stage"] == {"scale": "my_scale.none"}


def test_rankings_train_a_preference_method(tmp_path, tiny_path, capsys):
    row = {"prompt": "1+1=", "completions": ["2", "3", "11"], "scores": [1.0, 0.5, 0.0]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = ["--model_name_or_path", tiny_path, "--dataset_name", "rows.jsonl", "--gradient_checkpointing", "False"]
    small = flags(num_generations=None, max_steps=1, report_to="none")
    assert cli.main(["train", "--method", "rpo", *small, *data, "--output_dir", "out"]) == 0
    assert "loss/rpo_nll" in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_default_output_dirs_are_numbered_and_lora_is_saved(tmp_path, capsys):
    for number in (1, 2):
        assert cli.main(["train", *SMALL, "--max_steps", "1", "--use_peft"]) == 0
        assert (tmp_path / "runs" / f"lp_reg-addition-{number}" / "adapter_model.safetensors").exists()


def test_resume_gives_the_same_model_and_metrics(small_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    shutil.rmtree(copy / "checkpoint-3")
    (copy / "model.safetensors").unlink()
    arguments = [*SMALL, "--output_dir", str(copy), "--resume_from_checkpoint", str(copy / "checkpoint-2")]
    assert cli.main(["train", *arguments]) == 0
    first, second = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (small_run, copy))
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [json.loads(line)["step"] for line in (copy / "metrics.jsonl").read_text().splitlines()]
    assert steps == [json.loads(line)["step"] for line in (small_run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_on_a_machine_without_utf8(tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "train.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    environment = os.environ | plain | {"MPLBACKEND": "nonsense", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [*command, *SMALL, "--max_steps", "2", "--output_dir", "out"],
        capture_output=True,
        text=True,
        timeout=170,
        env=environment,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stderr.count("Training in 2 processes on cpu") == 1
    assert len(list((tmp_path / "out" / "checkpoint-2").glob("rng_state_*.pth"))) == 2
    assert result.stdout.count("Held-out accuracy (greedy, 8 prompts)") == 1
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps[:3] == [0, 1, 2]
