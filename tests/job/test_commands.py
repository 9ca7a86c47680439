"""The commands around training: what is there, what would be done, what came out of it."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from papertrl import ConstrainedRlhfGRPOTrainer, PolicyConfig, PolicyTrainer, cli, compose
from papertrl.commands.chat import Talk
from papertrl.commands.settings import _Computed, _written, loaded_settings
from papertrl.core.catalogue import DECLARATIONS, load
from papertrl.core.errors import UsageError
from papertrl.evaluation.models import load_model
from papertrl.job.arguments import choose, parse
from papertrl.job.dry_run import dry_run
from papertrl.job.launching import launch

from ..harness.table import settings
from .conftest import flags


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_path):
    """Folder of a LoRA adapter that changes what the tiny model answers."""
    path = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["trian"], ["'trian'", "Did you mean `papertrl train`?"]),
        (["Evaluat"], ["Did you mean `papertrl evaluate`?"]),
        (["frobnicate"], ["'frobnicate'", "Commands are: train, methods"]),
        (["--method", "lp_reg"], ["`papertrl train --method ...`"]),
        (["methods", "lpreg"], ["Unknown method 'lpreg'", "'lp_reg'"]),
        (["methods", "--jsn"], ["--jsn"]),
        (["train", "--num_processes", "0"], ["`--num_processes`", "[1, 1024]"]),
        (["train", "--accelerate_config", "zero9"], ["`--accelerate_config`", "zero9"]),
        (["train", "--method", "nowhere.Mine"], ["no class 'nowhere.Mine'"]),
        (["train", "--method", "trl.GRPOTrainer"], ["subclass of a trainer of papertrl"]),
        (["merge", "."], ["holds no adapter"]),
        (["chat", "./nothing"], ["no such folder"]),
        (["chat", "x", "--max_new_tokens", "0"], ["`--max_new_tokens` must be at least 1"]),
        (["chat", "x", "--temperature", "nan"], ["`--temperature`", "nan"]),
    ],
)
def test_wrong_commands(argv, parts, capsys):
    assert cli.main(argv) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("papertrl: ") and error.count("\n") == 1
    for part in parts:
        assert part in error


def test_a_flag_given_twice_is_told(capsys):
    job = parse(choose(["--max_steps", "3", "--output_dir", "x", "--max-steps=4"]))
    assert job.training.max_steps == 4
    assert capsys.readouterr().err == "papertrl: `--max_steps` is given 2 times; the last one counts.\n"


def test_version_and_environment(capsys):
    from papertrl import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for part in ("torch:", "trl:", "transformers:", "devices:", "cores:"):
        assert part in text
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {command} " in told for command in cli.COMMANDS)


def test_one_method(capsys):
    assert cli.main(["methods", "dler"]) == 0
    text = capsys.readouterr().out
    method = DECLARATIONS["dler"]
    for part in (method.summary, method.paper.authors[0], method.paper.citation, "--dler_truncation_length"):
        assert part in text
    assert "lite_ppo: stage 'scale', unless" in text and "  filter_groups" in text
    assert cli.main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in found] == list(DECLARATIONS)
    assert cli.main(["methods", "lion", "grpo", "--json"]) == 0
    lion, base = json.loads(capsys.readouterr().out)
    assert lion["slot"] == "optimizer" and base["class"] == "PolicyTrainer" and "scale" in base["stages"]


@pytest.mark.parametrize("name", DECLARATIONS)
def test_settings_that_are_read_from_the_source_are_those_of_the_class(name):
    try:
        written = _written(name)
    except _Computed:
        return
    assert written == loaded_settings(load(name).config_class)


def test_most_settings_need_no_import():
    def reads(name):
        try:
            return bool(_written(name)) or True
        except _Computed:
            return False

    assert sum(map(reads, DECLARATIONS)) > 0.7 * len(DECLARATIONS)


CLASSES = """
from papertrl import DlerGRPOTrainer, LpRegGRPOTrainer

class Mine(LpRegGRPOTrainer, DlerGRPOTrainer):
    "Two methods of ours."

    def scale(self, scored, rewards, centered):
        return super().scale(scored, rewards, centered)
"""


def test_a_class_of_the_user(tmp_path, capsys):
    (tmp_path / "my_commands_module.py").write_text(CLASSES)
    job = parse(choose(["--method", "my_commands_module.Mine", "--dler_truncation_length", "4", "--output_dir", "x"]))
    assert job.trainer_class.__name__ == "Mine" and job.training.dler_truncation_length == 4
    job = parse(choose(["--methods", "my_commands_module.Mine", "lion", "--output_dir", "x"]))
    assert [component.__name__ for component in job.trainer_class.components] == ["Lion"]
    assert cli.main(["train", "--method", "my_commands_module.Mine", "--help"]) == 0
    assert "Two methods of ours." in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, parts",
    [
        (
            [],
            [
                "lp_reg",
                "4 prompts × 4 completions",
                "up to 5 tokens",
                "judged by:  exact_match",
                "steps:      3 of 16",
            ],
        ),
        (["--method", "dpo"], ["PreferenceTrainer", "chosen 2 to", "rejected"]),
        (["--method", "reward"], ["RewardModelTrainer", "chosen"]),
        (["--method", "sft", "--use_peft"], ["SupervisedTrainer", "completion"]),
    ],
)
def test_a_dry_run_tells_what_would_be_done_and_writes_nothing(argv, parts, tmp_path, monkeypatch):
    monkeypatch.setattr("papertrl.job.models.DEMONSTRATIONS", 64)
    grpo = {} if not argv else {"num_generations": None}
    text = dry_run(parse(choose([*flags(start_model_steps=1, **grpo), *argv])))
    for part in (*parts, "64 rows of addition", "first step:", "would go to 'runs/", "Row 1\n  prompt: '"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_job_would(tmp_path, tiny_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert cli.main(["train", "--dry_run", *flags(), "--output_dir", str(tmp_path)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    deep = ["--model_name_or_path", tiny_path, "--gradient_checkpointing", "False", "--dry_run"]
    changed = ["--model_init_kwargs", '{"num_hidden_layers": 10000000}']
    assert cli.main(["train", *flags(), *deep, *changed]) == 1
    assert "`num_hidden_layers` must be in [0, 10000], got 10000000" in capsys.readouterr().err


def test_merge(adapter, tmp_path, capsys):
    assert cli.main(["merge", str(adapter), "--output_dir", "whole"]) == 0
    assert capsys.readouterr().out == "whole\n"
    talks = [Talk(load_model(str(path))) for path in (adapter, tmp_path / "whole")]
    answers = {talk.answer("12+3=", 8, 0.0) for talk in talks}
    assert len(answers) == 1 and (tmp_path / "whole" / "model.safetensors").exists()
    assert cli.main(["merge", str(adapter), "--output_dir", "whole"]) == 1
    assert "no empty folder" in capsys.readouterr().err


def test_chat_answers_every_line_of_a_pipe(adapter, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+3=\n\n4+4="))
    assert cli.main(["chat", str(adapter), "--with_base", "--max_new_tokens", "3"]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == ["base", "trained"] * 2


def test_a_chat_is_kept_until_it_is_restarted(tiny_path):
    loaded = load_model(tiny_path)
    loaded.tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}"
    talk = Talk(loaded, "be brief")
    talk.answer("2+2", 2, 0.0)
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant"]
    talk.restart()
    assert [message["role"] for message in talk.messages] == ["system"]


def test_processes_are_told_of_each_other(tmp_path):
    (tmp_path / "one.py").write_text(
        "import os, pathlib, sys\n"
        "rank, names = os.environ['RANK'], ('LOCAL_RANK', 'WORLD_SIZE', 'ACCELERATE_USE_CPU', 'PAPERTRL_LAUNCHED')\n"
        "pathlib.Path('rank' + rank).write_text(' '.join(os.environ.get(name, '') for name in names))\n"
        "sys.exit(int(sys.argv[1]) * int(rank))\n"
    )
    assert launch([sys.executable, "one.py", "0"], 3, use_cpu=True) == 0
    assert [(tmp_path / f"rank{i}").read_text() for i in range(3)] == [f"{i} 3 true 1" for i in range(3)]
    assert launch([sys.executable, "one.py", "5"], 2, use_cpu=True) == 5
    with pytest.raises(UsageError, match=r"`--num_processes` must be at most .* cores, got 9999"):
        launch([sys.executable, "one.py", "0"], 9999, use_cpu=True)


def test_the_package_runs_as_a_module(monkeypatch):
    finished = subprocess.run(
        [sys.executable, "-m", "papertrl", "--version"], capture_output=True, text=True, env=os.environ
    )
    assert finished.returncode == 0 and finished.stdout.strip()


def test_settings_without_effect_are_told(tmp_path, tiny_path, caplog):
    def rewards(completions, **kwargs):
        return [0.0] * len(completions)

    data = [{"prompt": "1+1="}] * 8
    given = settings("policy", tmp_path)
    with caplog.at_level(logging.WARNING):
        args = ConstrainedRlhfGRPOTrainer.config_class(**given | {"fp16": True, "bf16": False})
        ConstrainedRlhfGRPOTrainer.make_config(args, tiny_path)
        compose("grpo", "gain_rl").make_config(
            compose("grpo", "gain_rl").config_class(**given, gain_sigma=None), tiny_path
        )
        PolicyTrainer(
            tiny_path,
            rewards,
            PolicyConfig(**given | {"max_completion_length": 10**6}),
            train_dataset=Dataset.from_list(data),
        )
        load("dynamic_reward_weighting")(
            tiny_path,
            rewards,
            load("dynamic_reward_weighting").config_class(**given),
            train_dataset=Dataset.from_list(data),
        )
    told = caplog.text
    assert "'constrained_rlhf' does nothing: it is off with constraint_thresholds=None" in told
    assert "'gain_rl' does nothing: it is off with gain_sigma=None" in told
    assert "`fp16` must be False on the CPU" in told and "`max_completion_length` should be below" in told
    assert "needs two reward functions" in told
