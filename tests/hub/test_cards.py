"""Cards, `run.json` and what must not be in them."""

import json
import re
import socket

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from papertrl import compose
from papertrl.core.catalogue import DECLARATIONS
from papertrl.core.declaration import Method
from papertrl.hub.cards import (
    authors,
    cell,
    check_card,
    code_cell,
    code_span,
    fenced,
    model_card,
    rounds_card,
    sentence,
)
from papertrl.hub.runfile import read_run
from papertrl.hub.scrubbing import names_a_secret, scrub, scrub_command, scrub_text
from papertrl.job.arguments import choose, parse
from papertrl.trainers.description import told

HOST = "gpu-node-17"


@pytest.fixture(autouse=True)
def host(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: f"{HOST}.cluster.example.org")


class TestScrubbing:
    @pytest.mark.parametrize(
        ("text", "scrubbed"),
        [
            ("hf_" + "a" * 34, "<token>"),
            ("token=hf_abcdefghij0123456789", "token=<token>"),
            ("/home/anna/models/base", "base"),
            ("see '/tmp/x y', or (/work/main/a.txt)", "see 'x y', or (a.txt)"),
            ("~/data/train.jsonl", "train.jsonl"),
            ("file:///home/anna/x.json", "x.json"),
            ("C:\\Users\\anna\\run", "run"),
            (f"http://{HOST}:8000/v1", "http://<host>:8000/v1"),
            (f"{HOST}.cluster.example.org", "<host>"),
            ("https://huggingface.co/papers/2510.03222", "https://huggingface.co/papers/2510.03222"),
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
            ("What is 6/2, or 6 /2, or a / b?", "What is 6/2, or 6 /2, or a / b?"),
            ("runs/lp_reg-addition-1", "runs/lp_reg-addition-1"),
            ("<think>x</think>", "<think>x</think>"),
        ],
    )
    def test_texts(self, text, scrubbed):
        assert scrub_text(text) == scrubbed

    def test_nested_values(self):
        value = {"hub_token": "x", "eos_token": "</s>", "a": [{"path": "/home/anna/b", "wandb_api_key": 1}, 2, None]}
        assert scrub(value) == {"eos_token": "</s>", "a": [{"path": "b"}, 2, None]}

    def test_names(self):
        assert all(map(names_a_secret, ("hub_token", "push_to_hub_token", "api_key", "client_secret", "password")))
        assert not any(map(names_a_secret, ("pad_token", "max_tokens", "mask_token", "key")))

    def test_commands(self):
        command = [
            "train",
            "--hub_token",
            "abc",
            "--output_dir=/tmp/a/b",
            "--output_dir",
            "x",
            "--dataset_name",
            "/a/b.c",
        ]
        assert scrub_command(command, ("output_dir",)) == ["train", "--dataset_name", "b.c"]

    @given(
        st.lists(st.text("abcXYZ019._-", min_size=1, max_size=8), min_size=2, max_size=5),
        st.sampled_from(["", "'", '"', "(", " ", "=", ","]),
    )
    def test_no_absolute_path_survives(self, parts, before):
        text = f"{before}/home/{'/'.join(parts)}"
        assert "/home" not in scrub_text(text)


class TestMarkdown:
    @given(st.text("`a\n|<&", max_size=30))
    def test_a_fence_is_not_left(self, text):
        lines = fenced(text).split("\n")
        fence = lines[0].removesuffix("text")
        assert lines[-1] == fence and not any(line.startswith(fence) for line in lines[1:-1])

    @given(st.text("`a\n|<&", max_size=30))
    def test_a_span_is_not_left(self, text):
        span = code_span(text)
        ticks = re.match("`+", span)[0]
        assert re.findall(r"(?<!`)`+(?!`)", span).count(ticks) == 2 and span.endswith(ticks)

    @given(st.text("`a\n|<&", max_size=30))
    def test_a_cell_is_not_left(self, text):
        for shown in (cell(text), code_cell(text)):
            assert "\n" not in shown and "|" not in shown.replace("\\|", "")


ROUND = {
    "name": "round_0",
    "tables": ["pairs"],
    "step": 0,
    "prompts": 1,
    "candidates": 2,
    "pairs": 1,
    "rewards": {},
    "judge": None,
    "reference": "initial",
    "sampling": {"temperature": 1.0},
    "seed": 0,
    "papertrl": "0",
}


class TestCard:
    @pytest.mark.parametrize("summary", ["Does something", "Does something.", "Does what?", "Does (so!)", "Goes on…"])
    def test_sentences_end_once(self, summary):
        assert sentence(sentence(summary)) == sentence(summary)
        assert not re.search(r"[.?!…]\)?\.", sentence(summary)) and re.search(r"[.?!…]\)?$", sentence(summary))

    @pytest.mark.parametrize(
        ("names", "shown"),
        [(["A"], "A"), (["A", "B"], "A and B"), ([*"ABCD"], "A, B, C and D"), ([*"ABCDE"], "A, B, C and 2 others")],
    )
    def test_authors(self, names, shown):
        assert authors(names) == shown

    def test_no_card_of_a_method_doubles_punctuation_or_tags(self, trained):
        for name, method in DECLARATIONS.items():
            card = model_card(read_run(trained) | {"methods": [told(method)], "tags": [*method.tags, name]}, trained)
            text = re.sub(r"```.*?```", "", card, flags=re.DOTALL)
            assert not re.search(r"(?<!\.)\.\.(?!\.)|[?!]\.(?!\w)|,,|[.?!],", text), name
            kept = yaml.safe_load(card.split("---\n")[1])["tags"]
            tags = [tag.lower().replace("_", "-") for tag in kept]
            assert len(set(tags)) == len(tags) and name in kept
            assert method.paper is None or f", by {method.paper.authors[0]}" in card

    def test_an_evaluation_is_shown_and_explained(self, trained, tmp_path):
        measured = {"models": {"x": {"accuracy": {"value": 1.0}}}, "dataset": {"name": "org/test"}}
        (tmp_path / "evaluation.json").write_text(json.dumps(measured))
        assert "![Evaluation]" not in model_card(read_run(trained), tmp_path)
        (tmp_path / "evaluation.png").write_bytes(b"x")
        card = model_card(read_run(trained), tmp_path)
        assert "![Evaluation](evaluation.png)" in card and "asked the saved model again" in card
        assert "![Evaluation]" not in model_card(read_run(trained), tmp_path, evaluated=False)

    def test_folders_above_a_local_dataset_stay_private(self, trained):
        run = read_run(trained) | {"task": None, "dataset": {"id": "../anna/private/pairs.jsonl", "local": True}}
        card = model_card(run, trained)
        assert "on `pairs.jsonl`." in card and "anna" not in card

    def test_content(self, trained):
        card = (trained / "README.md").read_text()
        data = ModelCard(card).data
        assert {"trl", "papertrl", "lp_reg", "arxiv:2510.03222"} <= set(data.tags)
        assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
        (result,) = data.eval_results
        assert result.metric_type == "accuracy" and 0 <= result.metric_value <= 1
        for text in ("arxiv.org/abs/2510.03222", "@article", "training_curves.png", "Intended use and limits"):
            assert text in card
        for text in ("papertrl train --method lp_reg", "`lp_reg_beta`", "| torch |", "optimizer steps", "CPU"):
            assert text in card

    def test_nothing_of_this_machine(self, trained, monkeypatch):
        monkeypatch.undo()
        for name in ("README.md", "run.json", "recipe.yaml"):
            text = (trained / name).read_text()
            assert str(trained.parent) not in text and socket.gethostname() not in text and "hf_" not in text

    def test_the_recipe_repeats_the_run(self, trained):
        job = parse(choose(["--config", str(trained / "recipe.yaml"), "--output_dir", "x"]))
        run = read_run(trained)
        assert job.methods == ["lp_reg"] and job.arguments.start_model_steps == 5
        assert job.training.warmup_steps == 20 and job.training.logging_steps == 5
        for name, value in run["config"].items():
            got = getattr(job.training, name)
            assert (getattr(got, "value", got)) == value, name

    def test_every_method_of_a_composed_trainer_is_cited(self, trained):
        declared = compose("lp_reg", "dler", "gain_rl").methods
        assert [method.name for method in declared] == ["lp_reg", "dler", "gain_rl"]
        card = model_card(read_run(trained) | {"methods": list(map(told, declared))}, trained)
        for method in declared:
            assert method.paper.citation in card and f"arxiv:{method.paper.id}" in card
            assert f"[{method.paper.title}](https://arxiv.org/abs/{method.paper.id})" in card
        assert "**GAIN-RL** (`gain_rl`, in the slot *prompts*): Chooses" in card and "**DLER** (`dler`): Hard" in card

    def test_a_method_without_a_paper(self, trained):
        method = Method("mine", family="policy", title="Mine", summary="Does something")
        run = read_run(trained) | {"methods": [told(method), told(compose("dler").method)]}
        card = model_card(run, trained)
        assert "* **Mine** (`mine`): Does something.\n* **DLER**" in card
        assert card.count("arxiv:") == 1 and "Mine:\n\n```bibtex" not in card
        rounds = rounds_card(run, [ROUND], "me/model")
        assert "by Mine, [DLER](https://arxiv.org/abs/2510.15110)" in rounds

    def test_functions_of_the_user(self, trained):
        run = read_run(trained)
        assert run["stages"] == {} and "own functions" not in model_card(run, trained)
        card = model_card(run | {"stages": {"scale": "my.fn", "score": "my.other"}}, trained)
        assert "The user's own functions act in its stages: `scale` by `my.fn`, `score` by `my.other`." in card

    def test_what_an_earlier_version_wrote_still_makes_a_card(self, trained):
        run = read_run(trained)
        for later in ("stages", "pipeline_tag", "model_class"):
            del run[later]
        del run["scores"]["how"]
        for method in run["methods"]:
            del method["slot"], method["kind"]
        card = model_card(run, trained)
        assert "pipeline_tag: text-generation" in card and "(greedy, 4 prompts)" in card

    def test_an_evaluation_becomes_metadata(self, trained, tmp_path):
        run = read_run(trained) | {"base_model": "org/base", "dataset": {"id": "org/data", "split": "train"}}
        measured = {"pass@4": {"value": 0.75, "low": 0.5, "high": 1.0}, "bleu": {"value": 3.0}}
        models = {str(tmp_path): measured, "/home/anna/other|<b>": {"bleu": {"value": 1.0, "low": None, "high": None}}}
        (tmp_path / "evaluation.json").write_text(json.dumps({"models": models, "dataset": {"name": "org/test"}}))
        card = model_card(run, tmp_path, "me/model")
        data = ModelCard(card).data
        assert {r.metric_type: r.metric_value for r in data.eval_results} == {
            "accuracy": run["scores"]["after"],
            "pass@4": 0.75,
            "bleu": 3.0,
        }
        assert data.base_model == "org/base" and data.datasets == ["org/data"]
        assert "| pass@4 | 0.750 [0.500, 1.000] |  |" in card and "/home" not in card and "other\\|&lt;b>" in card

    @pytest.mark.parametrize("text", ["# none", "---\na: [\n---\n", "---\n- a\n---\n", "---\nmodel-index: 3\n---\n"])
    def test_broken_metadata(self, text):
        with pytest.raises(ValueError, match="metadata block"):
            check_card(text)

    def test_metadata_is_yaml(self, trained):
        check_card((trained / "README.md").read_text())
        assert yaml.safe_load((trained / "recipe.yaml").read_text())["methods"] == ["lp_reg"]
