"""Jobs in stages, and jobs without a method."""

import json
import shutil
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM

from papertrl import cli
from papertrl.core.errors import Interrupted
from papertrl.job.arguments import choose
from papertrl.job.interrupt import StopOnSignal
from papertrl.job.staged import STAGES_FILE, TABLE_FILE, run_stages

from .conftest import flags

SHARED = """\
task_kwargs: {digits: 1, workings_share: 0.5}
warmup_steps: 0
learning_rate: 3.0e-3
stages:
  - method: sft
    max_steps: 4
  - methods: [two_stage_math, d3s]
    max_steps: 3
    num_generations: 4
    max_completion_length: 6
"""
COMMAND = flags(
    start_model_steps=30, max_steps=None, num_generations=None, learning_rate=None, warmup_steps=None, task_kwargs=None
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "staged.yaml"
    path.write_text(SHARED)
    return str(path)


@pytest.fixture(scope="session")
def staged_run(tmp_path_factory, config):
    """Output directory of two finished stages."""
    output = tmp_path_factory.mktemp("staged") / "run"
    assert cli.main(["train", "--config", config, *COMMAND, "--output_dir", str(output)]) == 0
    return output


def parameters(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(one, other):
    one, other = parameters(one), parameters(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def scores(folder):
    return json.loads((folder / "run.json").read_text())["scores"]


def test_each_stage_starts_where_the_one_before_ended(staged_run):
    first, second = staged_run / "stage1_sft", staged_run / "stage2_grpo"
    assert not same(first / "start_model", first) and not same(first, second)
    assert not (second / "start_model").exists()
    rows = json.loads((staged_run / STAGES_FILE).read_text())["rows"]
    assert [(row["stage"], row["methods"]) for row in rows] == [
        ("start", []),
        ("stage1_sft", ["sft"]),
        ("stage2_grpo", ["two_stage_math", "d3s"]),
    ]
    assert [row["score"] for row in rows] == [scores(first)["before"], scores(first)["after"], scores(second)["after"]]
    # The same prompts, model and greedy answers
    assert scores(second)["before"] == scores(first)["after"]
    samples = [json.loads(line) for line in (second / "completions.jsonl").read_text().splitlines()]
    characters = [sum(len(sample[when]) for sample in samples) / len(samples) for when in ("before", "after")]
    # A token per character, and the end
    assert [row["length"] for row in rows[1:]] == [length + 1 for length in characters]
    table = (staged_run / TABLE_FILE).read_text()
    assert f"| stage1_sft | sft | {rows[1]['score']:.3f} | {rows[1]['length']:.1f} |" in table
    config = json.loads((second / "run.json").read_text())["config"]
    assert config["two_stage_cosine_weight"] == 1.0 and config["max_steps"] == 3 and config["learning_rate"] == 3e-3
    assert "SFT of TRL, without a method" in (first / "README.md").read_text()


def stop_in(monkeypatch, stage, step):
    """Make a signal arrive in this step of this stage, counted from 1."""
    begun = []
    begin, end = StopOnSignal.on_train_begin, StopOnSignal.on_step_end

    def on_train_begin(self, args, *rest, **kwargs):
        begun.append(args.output_dir)
        begin(self, args, *rest, **kwargs)

    def on_step_end(self, args, state, *rest, **kwargs):
        if len(begun) == stage and state.global_step == step:
            self._pending = signal.SIGTERM
        end(self, args, state, *rest, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_train_begin", on_train_begin)
    monkeypatch.setattr(StopOnSignal, "on_step_end", on_step_end)


@pytest.mark.parametrize(("stage", "step"), [(1, 3), (2, 1)])
def test_a_stopped_job_goes_on_in_its_stage(stage, step, staged_run, config, tmp_path, monkeypatch):
    arguments = ["--config", config, *COMMAND, "--output_dir", "out"]
    with monkeypatch.context() as patched:
        stop_in(patched, stage, step)
        with pytest.raises(Interrupted, match=f"stage {stage} of 2.*--output_dir out --resume_from_checkpoint True"):
            run_stages(choose(arguments), ["train", *arguments])
    finished = tmp_path / "out" / "stage1_sft" / "model.safetensors"
    assert finished.exists() == (stage == 2)
    before = finished.stat().st_mtime_ns if stage == 2 else None
    assert cli.main(["train", *arguments, "--resume_from_checkpoint", "True"]) == 0
    assert before is None or finished.stat().st_mtime_ns == before
    for name in ("stage1_sft", "stage2_grpo"):
        assert same(tmp_path / "out" / name, staged_run / name)
    assert (tmp_path / "out" / TABLE_FILE).read_text() == (staged_run / TABLE_FILE).read_text()


def test_killed_before_the_first_checkpoint_a_stage_begins_anew(staged_run, config, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(staged_run, out)
    for left in ("checkpoint-2", "checkpoint-3"):
        shutil.rmtree(out / "stage2_grpo" / left)
    (out / "stage2_grpo" / "model.safetensors").unlink()
    rows = json.loads((out / STAGES_FILE).read_text())["rows"]
    (out / STAGES_FILE).write_text(json.dumps({"rows": rows[:2]}))
    arguments = ["train", "--config", config, *COMMAND, "--output_dir", str(out), "--resume_from_checkpoint", "True"]
    assert cli.main(arguments) == 0
    assert same(out / "stage2_grpo", staged_run / "stage2_grpo")
    # Finished as it is now, there is nothing left to do
    trained = (out / "stage2_grpo" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert (out / "stage2_grpo" / "model.safetensors").stat().st_mtime_ns == trained


def refused(arguments, capsys):
    code = cli.main(["train", *arguments])
    error = capsys.readouterr().err
    assert code in (1, 2) and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_a_folder_with_stages_is_not_overwritten(staged_run, config, tmp_path, capsys):
    arguments = ["--config", config, *COMMAND, "--output_dir"]
    assert "already holds a run in stages" in refused([*arguments, str(staged_run)], capsys)
    resumed = [*arguments, str(tmp_path / "nothing"), "--resume_from_checkpoint"]
    assert "holds no stage of an earlier run" in refused([*resumed, "True"], capsys)
    assert "must be True for a job in stages, got 'checkpoint-2'" in refused([*resumed, "checkpoint-2"], capsys)


@pytest.mark.parametrize(
    ("text", "flags", "part"),
    [
        ("stages: {method: sft}\n", [], "must be a list"),
        ("stages: [sft]\n", [], "must be a list"),
        ("method: d3s\nstages: [{method: sft}]\n", [], "names its own `method`"),
        ("stages: [{method: sft}]\n", ["--method", "d3s"], "names its own `method`"),
        ("stages: [{max_steps: 2}]\n", [], "Stage 1 of the config file names no `method`"),
        ("stages: [{method: sft}, {method: d4s}]\n", [], "Unknown method 'd4s'"),
        ("stages: [{method: sft}, {method: d3s, d3s_ratio: 1}]\n", [], "d3s_ratio"),
        ("stages: [{method: sft, use_peft: true}, {method: d3s}]\n", [], "`use_peft` in stage 1"),
        ("stages: [{method: sft}, {method: d3s, model_name_or_path: x}]\n", [], "`model_name_or_path` in stage 2"),
    ],
)
def test_mistakes_are_found_before_the_first_stage_trains(text, flags, part, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text(text)
    assert part in refused(["--config", "mine.yaml", "--output_dir", "out", *flags], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "changes"), [("sft", {"num_generations": None}), ("GRPO", {})])
def test_a_job_without_method(name, changes, tmp_path, capsys):
    assert cli.main(["train", "--method", name, *flags(start_model_steps=30, max_steps=1, **changes)]) == 0
    assert "Held-out accuracy (greedy, 8 prompts)" in capsys.readouterr().out
    folder = tmp_path / "runs" / f"{name.lower()}-addition-1"
    assert f"{name.upper()} of TRL, without a method of papertrl" in (folder / "README.md").read_text()
    assert choose(["--config", str(folder / "recipe.yaml")]).methods == [name.lower()]


def test_plain_trainers_are_no_part_of_a_combination(capsys):
    assert "['PolicyTrainer'] have no method" in refused(["--methods", "grpo", "d3s"], capsys)


def test_help_of_stages(capsys):
    assert cli.main(["train", "--config", "two_stage_math", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.index("sft: as TRL trains") < text.index("arXiv:2507.08267") < text.index("--two_stage_cosine_weight")
