import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from papertrl import cli
from papertrl.job.flags import flag_of, without_flags

from .conftest import SMALL, flags


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refusal(capsys, *argv, code=1, small=SMALL):
    """What the command line says; asserts one paragraph, no traceback and the exit code."""
    assert cli.main(["train", *without_flags(small, map(flag_of, map(str, argv))), *map(str, argv)]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "Training in 1 process" not in line]
    error = [line for line in lines if line.startswith("papertrl: ") or "Traceback" in line]
    assert len(error) == 1
    return error[0]


def test_output_directories(capsys, tmp_path, small_run):
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(capsys, "--output_dir", "file")
    before = {path: path.stat().st_mtime_ns for path in small_run.rglob("*")}
    assert "already holds a run" in refusal(capsys, "--output_dir", small_run)
    assert before == {path: path.stat().st_mtime_ns for path in small_run.rglob("*")}
    assert "cannot be written" in refusal(capsys, "--output_dir", "/proc/here")


def test_full_disk(capsys, monkeypatch):
    from pathlib import Path

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left on device" in refusal(capsys, "--output_dir", "out")


def test_models_and_data(capsys):
    message = refusal(capsys, "--model_name_or_path", "nobody/no-such-model")
    assert "'nobody/no-such-model'" in message and "smollm2" in message
    assert "--model_name_or_path" in refusal(capsys, "--dataset_name", "x", "--reward_funcs", "exact_match")
    assert "Unknown task 'adition'" in refusal(capsys, "--task", "adition")
    assert "`task_size`" in refusal(capsys, "--task_size", "0", code=2)


def test_dataset_columns_and_rows(capsys, tmp_path, tiny_path):
    model = ["--model_name_or_path", tiny_path, "--gradient_checkpointing", "False"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "1+1=", "answer": "2"}\n')
    message = refusal(capsys, *model, "--dataset_name", rows, "--reward_funcs", "exact_match")
    assert "`prompt`" in message and "['answer', 'question']" in message
    rows.write_text('{"prompt": "1+1="}\n')
    message = refusal(capsys, *model, "--dataset_name", rows, "--reward_funcs", "exact_match")
    assert "`answer`" in message and "['prompt']" in message
    assert "`--reward_funcs`" in refusal(capsys, *model, "--dataset_name", rows)
    rows.write_text("")
    assert "no rows" in refusal(capsys, *model, "--dataset_name", rows, "--reward_funcs", "exact_match")


def test_malformed_preference_rows(capsys, tmp_path, tiny_path):
    command = ["--method", "rpo", "--model_name_or_path", tiny_path, "--dataset_name", tmp_path / "rows.jsonl"]
    for rows, part in [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n',
            "Row 1 .*`rejected`: is miss",
        ),
        ('{"prompt": "a", "completions": ["b", "c"], "scores": [1.0]}\n', "Row 0 .*`scores`: must be a list of 2"),
        ('{"question": "a", "answer": "b"}\n', r"\['answer', 'question'\] are no format"),
    ]:
        (tmp_path / "rows.jsonl").write_text(rows)
        assert re.search(
            f"rows.jsonl', split 'train': .*{part}", refusal(capsys, *command, small=flags(num_generations=None))
        )


REWARDS = """
def raising(completions, **kwargs):
    raise KeyError("gold")
def short(completions, **kwargs):
    return [1.0]
def nan(completions, **kwargs):
    return [float("nan")] * len(completions)
def strings(completions, **kwargs):
    return completions
"""


@pytest.mark.parametrize(
    "name, part",
    [("raising", "KeyError: 'gold'"), ("short", "1 rewards for 16"), ("nan", "nan"), ("strings", "`str`")],
)
def test_rewards(name, part, capsys, tmp_path):
    (tmp_path / f"rewards_{name}.py").write_text(REWARDS)
    message = refusal(capsys, "--reward_funcs", f"rewards_{name}.{name}", "--output_dir", "out")
    assert f"'{name}'" in message and part in message


def test_an_unknown_task_is_refused_before_a_folder_is_made(capsys, tmp_path):
    assert "additon" in refusal(capsys, "--task", "additon", "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_checkpoints(capsys, tmp_path, small_run):
    copy = tmp_path / "copy"
    shutil.copytree(small_run, copy)
    resume = ["--output_dir", copy, "--resume_from_checkpoint", copy / "checkpoint-2"]
    message = refusal(capsys, "--method", "dler", *resume)
    assert "['lp_reg']" in message and "['dler']" in message
    weights = copy / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "damaged" in refusal(capsys, *resume)
    assert "not a folder" in refusal(capsys, "--output_dir", copy, "--resume_from_checkpoint", copy / "checkpoint-9")
    assert "no complete checkpoint" in refusal(capsys, "--output_dir", "new", "--resume_from_checkpoint", "True")


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["train", *SMALL, "--task", "adition", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_from_which_the_run_goes_on(signum, tmp_path):
    code = "import sys; from papertrl.cli import main; sys.exit(main(sys.argv[1:]))"
    flags = ["train", *SMALL, "--max_steps", "500", "--save_steps", "1000", "--output_dir", "out"]
    process = subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.time() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signum)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signum, error[-2000:]
    assert "Traceback" not in error
    checkpoints = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(checkpoints) == 1 and str(checkpoints[0].name) in error and "--resume_from_checkpoint" in error
    step = json.loads((checkpoints[0] / "trainer_state.json").read_text())["global_step"]
    assert step >= 3
    resumed = [*flags, "--max_steps", str(step + 2), "--resume_from_checkpoint", "True"]
    assert cli.main(resumed) == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps[-1] == step + 2 and {*range(step + 3)} == set(steps)
