"""What the run left to look at: its description, curves and samples, read with care and shown as plain text."""

import contextlib
import html
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

# Metric and title; the first ones that a run logged are shown at first
TITLES = {
    "held_out/accuracy": "Held-out accuracy",
    "held_out/score": "Held-out score",
    "held_out/reward": "Held-out reward",
    "reward": "Training reward",
    "entropy": "Entropy, nats per token",
    "completions/mean_length": "Completion length, tokens",
    "rewards/margins": "Implicit reward margin",
    "rewards/accuracies": "Pairs ranked right",
    "mean_token_accuracy": "Token accuracy",
    "loss": "Loss",
    "grad_norm": "Gradient norm",
}
NO_CURVES = ("step", "epoch", "learning_rate", "total_flos", "train_runtime", "train_loss")
SHOWN_CURVES = 4
MOST_POINTS = 400
SHOWN_SAMPLES = 8
CHIP_LENGTH = 40


@dataclass
class Method:
    """A paper's method: name, one-sentence summary, the metric that shows it at work, and the paper."""

    name: str
    summary: str
    signal: str
    paper_title: str
    paper_id: str
    citation: str


@dataclass
class Report:
    """What is known of a run; every part may be missing."""

    methods: list[Method] = field(default_factory=list)
    base_model: str = ""
    data: str = ""
    scores: tuple[str, float, float, int] | None = None
    examples: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    configuration: dict[str, str] = field(default_factory=dict)
    command: str = ""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Names of the methods."""
        return " + ".join(method.name for method in self.methods)

    @property
    def prompts(self) -> list[str]:
        """Example prompts, each once."""
        return list(dict.fromkeys(prompt_text(row["prompt"]) for row in self.examples))


def read_report(folder: Path | None, run: dict[str, Any] | None = None) -> Report:
    """
    Read `run.json` and `metrics.jsonl`, as far as they are there and well-formed.

    Args:
        folder (`Path`, *optional*):
            Folder of the model.
        run (`dict`, *optional*):
            Content of `run.json`, where the folder has none.
    """
    if folder is not None and (folder / "run.json").is_file():
        with contextlib.suppress(ValueError):
            run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run = run if isinstance(run, dict) else {}
    report = Report(
        methods=_methods(run),
        base_model=_text(run.get("base_model")),
        data=_data(run),
        scores=_scores(run.get("scores")),
        examples=[row for row in _rows(run.get("examples")) if prompt_text(row.get("prompt")).strip()],
        facts=_facts(run),
        configuration={str(key): _text(value) for key, value in _mapping(run.get("config")).items()},
        command=_text(run.get("command")),
    )
    if folder is not None and (folder / "metrics.jsonl").is_file():
        report.curves = _curves(folder / "metrics.jsonl")
    return report


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _methods(run: dict[str, Any]) -> list[Method]:
    methods = []
    for row in _rows(run.get("methods")):
        paper = _mapping(row.get("paper"))
        methods.append(
            Method(
                _text(row.get("title") or row.get("name")),
                _text(row.get("summary")),
                _text(row.get("signal")),
                *(_text(paper.get(key)) for key in ("title", "id", "citation")),
            )
        )
    return methods


def _data(run: dict[str, Any]) -> str:
    dataset, task = _mapping(run.get("dataset")), _mapping(run.get("task"))
    return _text(dataset.get("id")) or (f"task {_text(task.get('name'))}" if task.get("name") else "")


def _scores(value: Any) -> tuple[str, float, float, int] | None:
    scores = _mapping(value)
    before, after = scores.get("before"), scores.get("after")
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in (before, after)):
        return None
    return _text(scores.get("measure")) or "score", before, after, scores.get("prompts") or 0


def _facts(run: dict[str, Any]) -> dict[str, str]:
    seconds = run.get("seconds")
    packages = _mapping(run.get("versions"))
    known = {
        "Trainer": _text(run.get("trainer")),
        "Base model": _text(run.get("base_model")),
        "Data": _data(run),
        "Rewards": ", ".join(map(_text, run["rewards"])) if isinstance(run.get("rewards"), list) else "",
        "Steps": _text(run.get("steps")),
        "Time": duration(seconds) if isinstance(seconds, (int, float)) else "",
        "Seed": _text(run.get("seed")),
        "Hardware": _text(run.get("hardware")),
        "Versions": ", ".join(f"{name} {_text(number)}" for name, number in packages.items()),
    }
    return {key: value for key, value in known.items() if value}


def duration(seconds: float) -> str:
    """Seconds in words: `2 min 5 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for text in path.read_text(errors="replace", encoding="utf-8").splitlines():
        try:
            line = _mapping(json.loads(text))
        except ValueError:
            continue
        step = line.get("step")
        for key, value in line.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if number and isinstance(step, (int, float)) and key not in NO_CURVES:
                curves.setdefault(key, []).append((step, value))
    return {key: points for key, points in curves.items() if len(points) > 1}


def first_curves(report: Report) -> list[str]:
    """Metrics to show at first: what was held out, what the method acts on, then the usual ones."""
    signals = [method.signal for method in report.methods]
    wanted = [key for key in TITLES if key.startswith("held_out/")] + signals + list(TITLES)
    return list(dict.fromkeys(key for key in wanted if key in report.curves))[:SHOWN_CURVES]


def curve_title(name: str) -> str:
    """Readable name of a metric."""
    return TITLES.get(name, name.replace("_", " ").replace("/", " · "))


def curve_table(points: list[tuple[float, float]], smoothing: float) -> pd.DataFrame:
    """A curve as the plot takes it: raw values, and their moving average where there are enough of them."""
    points = points[:: -(-len(points) // MOST_POINTS)]
    curve = pd.DataFrame({"step": [p[0] for p in points], "value": [p[1] for p in points], "series": "curve"})
    if smoothing == 0 or len(points) < 15:
        return curve
    # `adjust` keeps the start free of bias towards zero
    smooth = curve.assign(value=curve["value"].ewm(alpha=1 - smoothing, adjust=True).mean())
    return pd.concat([curve.assign(series="logged"), smooth], ignore_index=True)


# --- Plain text in HTML ---------------------------------------------------------------------------------------------

_ENTITIES = str.maketrans({c: f"&#{ord(c)};" for c in "{}$`"})


def plain(value: Any) -> str:
    """Text that stays text: neither HTML nor the page's template language sees anything in it."""
    return html.escape(str(value), quote=True).translate(_ENTITIES)


def prompt_text(prompt: Any) -> str:
    """A prompt as people type it: the last message of a conversation, or the text itself."""
    if isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        prompt = prompt[-1].get("content")
    return prompt if isinstance(prompt, str) else ""


def chip_labels(prompts: list[str]) -> list[str]:
    """Labels of example prompts that tell them apart: what they share at their beginning is left out."""
    texts = [" ".join(prompt.split()) for prompt in prompts]
    characters = enumerate(zip(*texts, strict=False))
    shared = next((i for i, column in characters if len(set(column)) > 1), min(map(len, texts)))
    start = texts[0].rfind(" ", 0, shared) + 1 if shared > CHIP_LENGTH // 2 else 0
    labels = [("…" if start else "") + text[start:] for text in texts]
    short = [label if len(label) <= CHIP_LENGTH else f"{label[: CHIP_LENGTH - 1].rstrip()}…" for label in labels]
    return short if len(set(short)) == len(short) else [f"{i}. {label}" for i, label in enumerate(short, start=1)]


def rows_html(rows: dict[str, str], label: str) -> str:
    """Names and values, as a list."""
    cells = "".join(f"<div><dt>{plain(key)}</dt><dd>{plain(value)}</dd></div>" for key, value in rows.items())
    return f'<dl class="facts" aria-label="{plain(label)}">{cells}</dl>'


def samples_html(report: Report) -> str:
    """Held-out prompts with the answers before and after training."""
    cards = []
    for row in report.examples[:SHOWN_SAMPLES]:
        sides = "".join(
            f'<div class="side {key}"><span class="who">{key}{_score(row.get(f"{key}_score"))}</span>'
            f"<pre>{plain(_text(row.get(key))) or '&nbsp;'}</pre></div>"
            for key in ("before", "after")
        )
        right = row.get("answer")
        expected = f'<span class="expected">expected {plain(_text(right))}</span>' if right is not None else ""
        cards.append(
            f'<article class="sample"><pre class="asked">{plain(prompt_text(row["prompt"]))}</pre>{expected}'
            f'<div class="sides">{sides}</div></article>'
        )
    return f'<div class="samples">{"".join(cards)}</div>'


def _score(value: Any) -> str:
    return f" · score {value:g}" if isinstance(value, (int, float)) else ""
