"""What a run leaves to look at: progress bar, metrics file, curves, samples."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from transformers import ProgressCallback, TrainerCallback

from ..core.errors import tell
from ..hub.cards import code_span, fenced
from ..hub.scrubbing import scrub_text
from .heldout import Answers

SMOOTHING = 0.8
SHOWN_SAMPLES = 20
# Metric, title, label of the vertical axis; those that a run did not log are left out
PANELS = (
    ("held_out/accuracy", "Held-out accuracy (greedy)", "share of prompts"),
    ("held_out/score", "Held-out score (greedy)", "mean score"),
    ("held_out/reward", "Held-out reward (greedy)", "mean reward"),
    ("reward", "Training reward", "mean reward"),
    ("entropy", "Entropy of the policy", "nats per token"),
    ("completions/mean_length", "Completion length", "tokens"),
    ("rewards/margins", "Implicit reward margin", "chosen minus rejected"),
    ("rewards/accuracies", "Pairs ranked right", "share of pairs"),
    ("eval_accuracy", "Held-out pairs ranked right", "share of pairs"),
    ("accuracy", "Pairs ranked right", "share of pairs"),
    ("margin", "Reward margin", "chosen minus rejected"),
    ("mean_token_accuracy", "Token accuracy", "share of tokens"),
    ("loss", "Loss", "loss"),
    ("grad_norm", "Gradient norm", "norm"),
)
MAX_PANELS = 6


class MetricsFile(TrainerCallback):
    """
    Appends each log as one JSON line to `metrics.jsonl`; on resume, lines later than the checkpoint are dropped.

    Args:
        path (`Path`):
            File to write.
    """

    def __init__(self, path: Path):
        self.path = path
        self._written: set[str] = set()
        self._failed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            lines = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= state.global_step]
            # What follows training may be repeated
            self._written = set(lines)
            if "".join(lines) != self.path.read_text(encoding="utf-8"):
                partial = self.path.with_suffix(".tmp")
                partial.write_text("".join(lines), encoding="utf-8")
                partial.replace(self.path)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero:
            self.write({"step": state.global_step, **logs})

    def write(self, line: dict[str, Any]) -> None:
        """Append one line, if it is new. Where the disk does not take it, that is said once."""
        text = json.dumps(line) + "\n"
        if text in self._written:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            if not self._failed:
                tell(f"'{self.path}' cannot be written ({error.strerror}); training goes on without its lines.")
            self._failed = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, in order; a last line that was cut off is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class ProgressBar(ProgressCallback):
    """A progress bar with remaining time that shows the newest values in place of a line for every log."""

    SHOWN = ("reward", "loss", "held_out/accuracy", "held_out/score", "held_out/reward", "rewards/accuracies")

    def __init__(self):
        super().__init__()
        self._newest: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            self.training_bar.set_description("Training")
            self.training_bar.update(state.global_step)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            self._newest |= {key.split("/")[-1]: f"{logs[key]:.3g}" for key in self.SHOWN if key in logs}
            self.training_bar.set_postfix(self._newest)


def draw_curves(metrics: list[dict[str, Any]], signals: dict[str, str], title: str, path: Path) -> None:
    """
    Draw a run's curves: raw values thin, their exponential moving average thick.

    Args:
        metrics (`list[dict]`):
            Lines of the metrics file.
        signals (`dict[str, str]`):
            Metric that shows each method's mechanism at work, by method name.
        title (`str`):
            Title of the figure.
        path (`Path`):
            PNG file to write.
    """
    mechanism = [(key, f"{name}: {key.split('/')[-1].replace('_', ' ')}", key) for name, key in signals.items() if key]
    logged = {key for line in metrics for key in line}
    panels = [panel for panel in PANELS if panel[0] in logged][: max(1, MAX_PANELS - len(mechanism))]
    panels += [panel for panel in mechanism if panel[0] in logged]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * rows + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    for index, (key, name, label) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        points = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), (int, float))]
        steps, values = zip(*points, strict=True)
        sparse = len(points) < 15
        look = {"marker": "o", "ms": 4} if sparse else {"alpha": 0.3}
        axes.plot(steps, values, color="tab:blue", label="raw", **look)
        if not sparse:
            axes.plot(steps, smooth(values), color="tab:blue", linewidth=2, label="smoothed")
        axes.set_title(name, fontsize=11)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        if label.startswith("share"):
            axes.set_ylim(-0.02, 1.02)
    lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    if len(lines) > 1:
        figure.legend(lines.values(), lines.keys(), loc="outside lower right", ncols=len(lines), fontsize=9)
    figure.savefig(path, dpi=110)


def smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average that starts without bias towards zero."""
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smoothed.append(total / weight)
    return smoothed


def write_samples(problems: Any, before: Answers, after: Answers, path: Path) -> None:
    """Write held-out prompts with the completions of the start model and of the trained one, as Markdown."""
    parts = ["# Held-out prompts and greedy completions\n"]
    rows = problems.select(range(min(SHOWN_SAMPLES, len(problems))))
    for i, row in enumerate(rows):
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        parts.append(f"## {i + 1}\n\nPrompt:\n\n{fenced(prompt)}\n")
        if "answer" in row:
            parts.append(f"Answer: {code_span(str(row['answer']))}\n")
        for name, answers in (("Before", before), ("After", after)):
            score = "no score" if answers.scores[i] is None else f"score {answers.scores[i]:g}"
            parts.append(f"{name} ({score}):\n\n{fenced(answers.texts[i])}\n")
    path.write_text(scrub_text("\n".join(parts)), encoding="utf-8")
