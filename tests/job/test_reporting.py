"""What people look at: curves, samples, plots of an evaluation."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from matplotlib.figure import Figure

from papertrl.evaluation.report import draw, markdown
from papertrl.hub.scrubbing import shortened
from papertrl.job.heldout import Answers
from papertrl.job.reporting import draw_curves, write_samples


@pytest.fixture
def figures(monkeypatch):
    """Figures in the order in which they were saved; nothing is written."""
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: saved.append(figure))
    return saved


@pytest.mark.parametrize(("steps", "legend"), [(40, ["raw", "smoothed"]), (5, None)])
def test_curves_say_what_is_raw_and_what_is_smoothed(figures, steps, legend):
    metrics = [{"step": i, "reward": i % 3, "loss": 1 / (i + 1)} for i in range(steps)]
    draw_curves(metrics, {}, "dpo on pairs.jsonl", Path("x.png"))
    (figure,) = figures
    assert figure.get_suptitle() == "dpo on pairs.jsonl"
    shown = [[text.get_text() for text in each.get_texts()] for each in figure.legends]
    assert shown == ([legend] if legend else [])


@pytest.mark.parametrize("models", [["runs/a"], ["a", "b"], ["run$s_{a$", "a|<b>"]])
def test_an_evaluation_has_a_title(figures, models):
    value = {"value": 0.123456, "low": 0.1, "high": 0.2}
    result = {
        "models": {name: {"accuracy": value, "kl_to_base": value} for name in models},
        "dataset": {"id": "some-owner/some-very-long-name-of-a-dataset", "prompts": 64},
        "settings": {"temperature": 0, "num_samples": 1, "seeds": [0]},
    }
    draw(result, Path("x.png"))
    title = figures[0].get_suptitle()
    figures[0].draw_without_rendering()
    assert title.startswith("Evaluation") and "64 prompts of some-owner/some-very-long-name-of-a-dataset" in title
    assert ("runs/a" in title) == (len(models) == 1)
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        assert len([tick for tick in axes.get_xticks() if low <= tick <= high]) <= 5


def test_names_stay_text_in_a_report():
    value = {"value": 0.5, "low": 0.1, "high": 0.9}
    result = {
        "models": {"a|<b>": {"accuracy": value}, "c": {"accuracy": value}},
        "differences": {"c": {"accuracy": value}},
        "dataset": {"id": "d", "prompts": 2},
        "settings": {"temperature": 1.0, "num_samples": 2, "seeds": [0]},
    }
    text = markdown(result)
    assert "| metric | a\\|&lt;b> | c |" in text and "Paired differences to a\\|&lt;b>:" in text


def test_samples_stay_within_their_blocks(tmp_path):
    texts = ["```\n# Not a heading\n<script>", "````", "ghp_" + "a1B2" * 9 + " in /home/anna/x/y.txt"]
    problems = Dataset.from_dict({"prompt": texts, "answer": ["`a`", "``", "a|b"]})
    answers = Answers(texts, [0.0, 1.0, 0.5], [1, 1, 1])
    write_samples(problems, answers, answers, tmp_path / "samples.md")
    text = (tmp_path / "samples.md").read_text()
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "heading" not in outside and "<script>" not in outside and "heading" in text
    assert outside.count("\n## ") == 3 and outside.count("Before (score") == 3
    assert "Answer: `` `a` ``\n" in text and "Answer: ``` `` ```\n" in text and "Answer: `a|b`\n" in text
    assert "ghp_" not in text and "anna" not in text


def test_local_sources_are_shortened(tmp_path, monkeypatch):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "pairs.jsonl").write_text("")
    monkeypatch.chdir(tmp_path / "anna")
    for name in ("pairs.jsonl", "../anna/pairs.jsonl", str(tmp_path / "anna" / "pairs.jsonl")):
        assert shortened(name) == "pairs.jsonl"
    assert shortened("trl-lib/DeepMath-103K") == "trl-lib/DeepMath-103K"
