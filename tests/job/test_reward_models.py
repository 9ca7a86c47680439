"""Jobs of the family that scores answers instead of writing them."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from papertrl import cli

from .conftest import flags

REWARD_JOB = {"num_generations": None, "max_steps": 3, "start_model_steps": 60, "save_steps": 3}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("reward") / "run"
    assert (
        cli.main(
            [
                "train",
                "--method",
                "reward",
                *flags(**REWARD_JOB),
                "--task",
                "addition",
                "--output_dir",
                str(output),
                "--debug",
            ]
        )
        == 0
    )
    return output


def test_a_scorer_is_trained_from_the_start_model(run):
    model = AutoModelForSequenceClassification.from_pretrained(run)
    start = AutoModelForSequenceClassification.from_pretrained(run / "start_model", num_labels=1)
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert model(**tokenizer("1+1=2", return_tensors="pt")).logits.shape == (1, 1)
    moved = (model.model.embed_tokens.weight - start.model.embed_tokens.weight).abs().max()
    assert 0 < moved < 0.1


def test_held_out_pairs_are_ranked_and_nothing_is_written(run, capsys):
    told = json.loads((run / "run.json").read_text())
    assert told["scores"]["measure"] == "pair_accuracy" and told["scores"]["how"] == "8 pairs"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
    assert measured == [told["scores"]["before"], told["scores"]["after"]]
    assert {"step": 0, "held_out/pair_accuracy": measured[0]} in lines
    for name in ("samples.md", "completions.jsonl"):
        assert not (run / name).exists()
    assert (run / "training_curves.png").exists() and (run / "recipe.yaml").exists()


def test_the_card_says_how_to_score(run):
    card = (run / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card and "library_name: transformers" in card
    assert "type: text-classification" in card and "pair_accuracy (held-out)" in card
    assert "Reward of TRL, without a method of papertrl" in card
    assert "| held-out pair accuracy (8 pairs) | before | after |" in card and 'pipeline("text-classification"' in card


def test_looking_changes_nothing(run, tmp_path):
    job = flags(**REWARD_JOB, held_out_prompts=0)
    assert cli.main(["train", "--method", "reward", *job, "--output_dir", "out"]) == 0
    blind, seen = (AutoModelForSequenceClassification.from_pretrained(path) for path in (tmp_path / "out", run))
    assert all(torch.equal(a, b) for a, b in zip(blind.parameters(), seen.parameters(), strict=True))
    assert "Nothing was measured on held-out data" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_of_a_scorer_says_how_to_load_it(tmp_path):
    job = [*flags(**REWARD_JOB | {"max_steps": 1}), "--use_peft", "--lora_target_modules", "all-linear"]
    assert cli.main(["train", "--method", "reward", *job, "--output_dir", "out"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModelForSequenceClassification.from_pretrained(f"{folder}/start_model", num_labels=1)' in card


def test_pairs_of_a_file(tmp_path, tiny_path):
    rows = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--model_name_or_path", tiny_path, "--dataset_name", "rows.jsonl", "--gradient_checkpointing", "False"]
    small = flags(num_generations=None, max_steps=1, report_to="none")
    assert cli.main(["train", "--method", "reward", *small, *data, "--output_dir", "out"]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_it_judges_the_online_loop(run, tmp_path):
    online = {"num_generations": None, "online_iterations": 1, "online_max_new_tokens": 4, "online_num_prompts": 16}
    job = [*flags(**online | {"max_steps": 1}), "--reward_model", str(run), "--output_dir", "judged"]
    assert cli.main(["train", "--method", "dpo", *job]) == 0
    provenance = json.loads((tmp_path / "judged" / "rounds" / "round_0" / "provenance.json").read_text())
    assert provenance["rewards"] == {"run": 1.0}


def test_what_makes_no_sense_is_refused(run, tmp_path, capsys):
    small = flags(**REWARD_JOB)
    assert cli.main(["train", "--method", "reward", *small, "--reward_funcs", "exact_match"]) == 1
    assert "reward samples nothing to judge" in capsys.readouterr().err
    assert cli.main(["space", str(run)]) == 1
    assert "scores answers and writes none" in capsys.readouterr().err
    assert cli.main(["evaluate", str(run)]) == 1
    assert "scores answers and writes none" in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("stages: [{method: reward}, {method: sft}]\n")
    assert cli.main(["train", "--config", "mine.yaml", "--output_dir", "out"]) == 2
    assert "Stage 1 (reward) trains a model that scores answers" in capsys.readouterr().err
