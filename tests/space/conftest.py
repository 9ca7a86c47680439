import importlib
import json
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from papertrl.models.start import make_start_model

DEMO = Path(__file__).parents[2] / "spaces" / "demo"
# Text that would be markup, script or template anywhere else
NASTY = "<img src=x onerror=window.hacked=1> **b** {{7*7}} ${window.hacked=2} `c`"
ANSWERS = {"base": "xy" * 25, "trained": "<b>" * 16}
PROMPT = "go:"


@pytest.fixture(scope="session")
def app():
    """The Space's `app` module, imported as Python does when it runs the file."""
    pytest.importorskip("gradio", reason="the Space needs gradio: pip install gradio")
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module("app")
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Output directory of a run whose base model says one thing, and whose trained model another, without an end."""
    folder = tmp_path_factory.mktemp("runs") / "tiny-run"
    for name, path in (("base", folder / "start_model"), ("trained", folder)):
        examples = Dataset.from_list([{"prompt": PROMPT, "completion": ANSWERS[name]}])
        model, tokenizer = make_start_model(examples, steps=30, seed=0, disable_tqdm=True)
        # An end token that the model never chooses
        model.generation_config.eos_token_id = None
        # Room for answers that take a while
        model.config.max_position_embeddings = 2048
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    (folder / "run.json").write_text(json.dumps(run_description()))
    lines = [{"step": i, "reward": i / 40, "entropy": 2 - i / 40, "tiny/signal": i % 5} for i in range(40)]
    lines.insert(0, {"step": 0, "held_out/accuracy": 0.25})
    lines.append({"step": 40, "held_out/accuracy": 0.75, "train_runtime": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "rew')
    return folder


def run_description() -> dict:
    citation = "@article{tiny2025,\n    title = {{Tiny}}\n}"
    return {
        "methods": [
            {
                "name": "tiny",
                "title": "Tiny",
                "summary": "Says something else",
                "signal": "tiny/signal",
                "paper": {"title": "On saying something else", "id": "2501.00001", "citation": citation},
            }
        ],
        "base_model": None,
        "task": {"name": "saying", "kwargs": {}},
        "config": {"learning_rate": 0.001, "note": NASTY},
        "scores": {"measure": "accuracy", "prompts": 16, "before": 0.25, "after": 0.75},
        "examples": [
            {
                "prompt": PROMPT,
                "answer": "z",
                "before": "xyxy",
                "after": "<b><b>",
                "before_score": 0,
                "after_score": 1,
            },
            {"prompt": NASTY, "answer": NASTY, "before": NASTY, "after": NASTY, "before_score": 0, "after_score": 0},
        ],
        "steps": 40,
        "seconds": 61.0,
        "versions": {"python": "3.11"},
        "command": "papertrl train --method tiny",
    }
