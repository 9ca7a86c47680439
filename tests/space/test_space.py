"""The Space without a browser: what is rendered, what is loaded, what handlers answer."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import RepoCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from papertrl.cli import main
from papertrl.hub.space import render_space
from papertrl.models.tiny import tiny_model

from .conftest import NASTY, PROMPT, run_description

SETTINGS = (12, 0.0, 1.0, 0, False)


def last(handler, *inputs):
    states = list(handler(*inputs))
    return states[-1], len(states)


@pytest.fixture(scope="module")
def page(app, run_folder):
    return app.open_page(str(run_folder))


def texts(app, page) -> str:
    """Everything that the built page holds, as one text."""
    blocks = app.build(page).blocks.values()
    return " ".join(str(getattr(block, "value", "")) for block in blocks)


# --- Rendering ------------------------------------------------------------------------------------------------------


def test_card_is_valid(tmp_path):
    folder = render_space("someone/tiny-run", tmp_path / "space", run_description())
    card = RepoCard.load(folder / "README.md", repo_type="space")
    assert (card.data.sdk, card.data.app_file, card.data.models) == ("gradio", "app.py", ["someone/tiny-run"])
    assert card.data.tags == ["trl", "papertrl", "tiny"]
    assert len(card.data.short_description) <= 60
    assert str(card.data.sdk_version).startswith("6.")
    settings = json.loads((folder / "space.json").read_text())
    assert settings["model"] == "someone/tiny-run" and settings["run"]["steps"] == 40
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert "transformers" in [line.partition("==")[0] for line in lines]
    assert all(line.partition("==")[2] and "+" not in line for line in lines)


def test_rendered_space_stands_alone(app, tmp_path, run_folder):
    """It builds with its model where this library is not installed."""
    assert main(["space", str(run_folder), "--output_dir", str(tmp_path / "space")]) == 0
    code = (
        "import sys; sys.modules['papertrl'] = None; sys.path.insert(0, sys.argv[1]); import app; "
        "settings = app.settings_of_space(); page = app.open_page(settings['model']); app.build(page); "
        "print(page.problem or page.engine.base.name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "space")], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "start model"
    assert not list((tmp_path / "space").rglob("*.bin"))


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ([], 2, "required: model"),
        (["./nowhere"], 1, "no folder './nowhere'"),
        (["someone/tiny", "--output_dir", "{occupied}"], 1, "already holds something"),
        (["{occupied}", "--output_dir", "{new}"], 1, "holds no model"),
    ],
)
def test_command_line_refuses(tmp_path, capsys, arguments, code, message):
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("precious")
    places = {"occupied": tmp_path / "occupied", "new": tmp_path / "new"}
    assert main(["space", *(argument.format(**places) for argument in arguments)]) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


# --- Loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [None, "/nowhere/at/all", "someone/that-does-not-exist"])
def test_missing_model_is_a_page(app, model):
    page = app.open_page(model, run=run_description())
    assert page.engine is None and page.problem
    shown = texts(app, page)
    assert "There is no model to try yet" in shown and app.plain(page.problem) in shown
    assert "On saying something else" in shown


def test_base_is_the_start_model(page, run_folder):
    assert page.engine.base.name == "start model"
    assert page.engine.trained.name == run_folder.name


def test_model_without_base(app, tiny_path):
    page = app.open_page(tiny_path)
    state, _ = last(app.compare_with(page.engine), PROMPT, *SETTINGS)
    assert page.engine.base is None and len(state) == 3
    assert "--base_model" in texts(app, page)


def test_adapter_shares_the_network(app, run_folder, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(run_folder / "start_model")
    config = LoraConfig(target_modules=["q_proj", "up_proj"], lora_alpha=64, init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(tmp_path)
    page = app.open_page(str(tmp_path), str(run_folder / "start_model"))
    assert page.engine.base.voice.model is page.engine.trained.voice.model
    adapted, _ = last(app.compare_with(page.engine), PROMPT, *SETTINGS)
    full, _ = last(app.compare_with(app.open_page(str(run_folder)).engine), PROMPT, *SETTINGS)
    assert adapted[1] == full[1] != adapted[3]


def test_foreign_vocabulary_is_not_mixed(app, run_folder, tmp_path, tokenizer):
    other = type(tokenizer).from_pretrained(run_folder)
    other.add_tokens(["zyx"])
    tiny_model(other).save_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    page = app.open_page(str(run_folder), str(tmp_path))
    assert "different vocabularies" in texts(app, page)


@pytest.mark.parametrize("content", ["[1]", "{", '{"methods": 3, "examples": [1, {"prompt": null}], "scores": []}'])
def test_malformed_run_is_left_out(app, run_folder, tmp_path, content):
    for path in run_folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "metrics.jsonl").write_text('{"step": "x", "loss": 1}\n{"step": 1, "loss": NaN}\nno json\n')
    page = app.open_page(str(tmp_path))
    assert page.engine is not None
    assert "without the files of its run" in texts(app, page)


# --- Answering ------------------------------------------------------------------------------------------------------


def test_compare_streams_both(app, page):
    state, frames = last(app.compare_with(page.engine), PROMPT, *SETTINGS)
    warning, base, base_stats, trained, trained_stats = state
    assert base == "xyxyxyxyxyxy" and trained == "<b><b><b><b>"
    assert warning == "" and frames >= 2
    assert "12 tokens" in base_stats and "tokens/s" in trained_stats


@pytest.mark.parametrize("scale, side", [(0.0, 1), (1.0, 3)])
def test_guidance_ends_are_the_two_models(app, page, scale, side):
    state, _ = last(app.guide_with(page.engine), PROMPT, scale, *SETTINGS)
    assert state[1] == last(app.compare_with(page.engine), PROMPT, *SETTINGS)[0][side]


def test_bars_show_where_they_part(app, page):
    bars = app.bars_with(page.engine)
    half, far = (bars(PROMPT, scale, False) for scale in (0.5, 3.0))
    assert half != far and "<code>&lt;</code>" in far and "w = 3" in far


@pytest.mark.parametrize("prompt", ["", "   \n", None])
def test_empty_prompt(app, page, prompt):
    for handler, inputs in ((app.compare_with(page.engine), ()), (app.guide_with(page.engine), (1.6,))):
        state, _ = last(handler, prompt, *inputs, *SETTINGS)
        assert "Write a prompt first" in state[0] and not any(state[1:])
    assert "Write a prompt first" in app.bars_with(page.engine)(prompt, 1.6, False)


def test_memory_is_bounded_whatever_is_sent(app, page):
    huge = "a" * 50_000_000
    for handler, inputs in ((app.compare_with(page.engine), ()), (app.guide_with(page.engine), (1.6,))):
        state, frames = last(handler, huge, *inputs, *SETTINGS)
        assert "longer than 250,000 characters" in state[0] and not any(state[1:]) and frames == 1
    assert "longer than" in app.bars_with(page.engine)(huge, 1.6, False)
    # What is kept of a prompt is its tokens, as many as the model reads
    engine = sys.modules["engine"]
    kept = engine._parting.cache_info().currsize
    for start in "bc":
        engine.parting(page.engine, start * 200_000 + "a" * 40_000, False)
    assert engine._parting.cache_info().currsize == kept + 1


def test_no_file_is_taken(app, monkeypatch, run_folder):
    launched = {}
    monkeypatch.setattr("gradio.Blocks.launch", lambda self, **kwargs: launched.update(kwargs))
    app.main(["--model", str(run_folder)])
    assert launched["max_file_size"] == "1mb"


def test_example_chips_are_told_apart(app):
    report = sys.modules["report"]
    shared = "Answer the question below step by step and put the result in a box: "
    for prompts in (
        ["1+2=", "3+4="],
        [f"{shared}{i}+2=" for i in range(4)],
        [f"{shared}{'word ' * 20}{i}" for i in range(3)],
        [f"{'x' * 100}{i}" for i in range(3)],
    ):
        labels = report.chip_labels(prompts)
        assert len(set(labels)) == len(prompts) and all(len(label) <= report.CHIP_LENGTH + 3 for label in labels)
    assert report.chip_labels([f"{shared}1+2=", f"{shared}3+4="]) == ["…1+2=", "…3+4="]


@pytest.mark.parametrize("length", [2500, 200_000])
def test_long_prompt_loses_its_beginning_visibly(app, page, length):
    side = page.engine.trained
    ids, cut = side.encode("a" * length + PROMPT, False, 12)
    assert len(ids) == side.limit - 12 and cut > 0
    assert side.tokenizer.decode(ids).endswith(PROMPT)
    state, _ = last(app.compare_with(page.engine), "a" * length + PROMPT, *SETTINGS)
    assert "too long" in state[0] and state[3]


def test_chat_template_survives_a_long_prompt(app, page):
    side = page.engine.trained
    template = (
        "{% for m in messages %}<user>{{ m.content }}</user>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    side.tokenizer.chat_template = template
    try:
        ids, cut = side.encode("a" * 3000 + "end", True, 12)
        short, uncut = side.encode("end", True, 12)
    finally:
        side.tokenizer.chat_template = None
    text = side.tokenizer.decode(ids)
    assert text.startswith("<user>aaa") and text.endswith("end</user>:") and len(ids) <= side.limit - 12 and cut
    assert side.tokenizer.decode(short) == "<user>end</user>:" and not uncut


def test_two_streams_at_once_are_each_alone(app, page):
    handler = app.compare_with(page.engine)
    first, second = handler(PROMPT, *SETTINGS), handler("go", *SETTINGS)
    states = [None, None]
    for i, state in ((i, s) for pair in zip(first, second, strict=False) for i, s in enumerate(pair)):
        states[i] = state
    states = [list(rest)[-1:] or [state] for rest, state in zip((first, second), states, strict=True)]
    assert states[0][0][3] == last(handler, PROMPT, *SETTINGS)[0][3]
    assert states[1][0][3] == last(handler, "go", *SETTINGS)[0][3]


def test_markup_is_text_everywhere(app, page):
    shown = [str(block.value) for block in app.build(page).blocks.values() if type(block).__name__ == "HTML"]
    assert any(app.plain(NASTY) in text for text in shown)
    for text in shown:
        assert "<img" not in text and "{{" not in text and "${" not in text
