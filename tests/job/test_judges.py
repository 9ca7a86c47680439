"""Who judges the online loop of a job: rewards, a reward model, a pairwise model or one's own function."""

import json

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from papertrl import cli

from .conftest import flags

ONLINE = {"num_generations": None, "online_iterations": 1, "online_max_new_tokens": 4, "online_num_prompts": 16}


def train(output, *argv) -> int:
    return cli.main(["train", "--method", "dpo", *flags(**ONLINE), "--output_dir", str(output), *map(str, argv)])


def provenance(output) -> dict:
    return json.loads((output / "rounds" / "round_0" / "provenance.json").read_text())


@pytest.fixture
def reward_model(tmp_path, tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "scores")
    tokenizer.save_pretrained(tmp_path / "scores")
    return tmp_path / "scores"


def test_each_kind_of_judge(tmp_path, tiny_path, reward_model, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def longer(prompts, firsts, seconds):\n"
        "    return [(sum(map(ord, a)) > sum(map(ord, b))) * 0.8 + 0.1 for a, b in zip(firsts, seconds)]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert train(tmp_path / "model", "--reward_model", reward_model) == 0
    assert provenance(tmp_path / "model")["rewards"] == {"scores": 1.0}
    assert train(tmp_path / "both", "--reward_model", reward_model, "--reward_funcs", "exact_match") == 0
    assert provenance(tmp_path / "both")["rewards"] == {"scores": 1.0, "exact_match": 1.0}
    assert train(tmp_path / "mine", "--judge", "mine.longer") == 0
    assert provenance(tmp_path / "mine")["judge"] == "longer"
    assert train(tmp_path / "pairwise", "--judge", tiny_path) == 0
    assert provenance(tmp_path / "pairwise")["judge"] == "PairwiseModel"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--reward_model", "nowhere/model"], "`reward_model` 'nowhere/model' cannot be loaded"),
        (["--reward_funcs", "no_such"], "`--reward_funcs`: unknown reward 'no_such'"),
        (["--judge", "nowhere"], "`judge` 'nowhere' cannot be loaded"),
        (["--judge", "a.b", "--reward_funcs", "exact_match"], "`judge` and rewards are both set"),
        (["--judge", "a.b", "--online_iterations", "0"], "`judge` is for the online loop"),
        (
            ["--reward_model", "x", "--online_iterations", "0"],
            "dpo samples nothing to judge unless `--online_iterations`",
        ),
    ],
)
def test_judges_that_do_not_go(argv, message, tmp_path, capsys):
    assert train(tmp_path / "out", *argv) == 1
    errors = capsys.readouterr().err
    assert message in errors and "Traceback" not in errors
    # Found before anything is made
    assert not (tmp_path / "out").exists()
