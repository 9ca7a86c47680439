"""One run of a claim: an arm, a point of its grid, a seed."""

import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from ..core.catalogue import load_trainer
from ..core.compose import compose
from ..models.start import REAL_MODEL_RATE, cached_start_model
from ..tasks import Task
from .claim import Arm, Claim
from .probe import Probe

KEPT_LOGS = ("reward", "loss", "entropy", "grad_norm", "completions/mean_length")
LOG_POINTS = 40
# Problems of a run that is to be as short as can be
FEW = {"train_problems": 400, "held_out": 64}
COMMON = {
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
}


def quick(settings: dict[str, Any], config_class: type) -> dict[str, Any]:
    """The settings of a run with those values of the config's fields that make it as short as can be."""
    short = {
        "max_steps": 3,
        "per_device_train_batch_size": 4 * settings.get("num_generations", 1),
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
    }
    if settings.get("online_iterations"):
        short |= {"online_iterations": 2, "online_num_prompts": 16}
    known = {field.name for field in fields(config_class)}
    return settings | {name: value for name, value in short.items() if name in known}


def train(claim: Claim, label: str, choice: dict, seed: int, model: str | None = None, short: bool = False) -> dict:
    """
    Train one arm and measure it.

    Args:
        claim ([`Claim`]):
            What is tested.
        label (`str`):
            Arm.
        choice (`dict`):
            Point of the arm's grid.
        seed (`int`):
            Seed of the start model, the problems, their order and the sampling.
        model (`str`, *optional*):
            Model to start from instead of the tiny one.
        short (`bool`):
            Whether to train for three steps on few problems only, to see that it runs.

    Returns:
        `dict`: `points` (one per measurement: `step`, `sampled_tokens`, `trained_tokens`, `seconds` of training, and
            what the claim measures) and `logs` (by metric, pairs of step and value).
    """
    disable_progress_bar()
    disable_progress_bars()
    # Its matrices are so small that threads would wait for each other
    torch.set_num_threads(1 if model is None else max(1, torch.get_num_threads()))
    if short:
        problems = {name: min(getattr(claim, name), most) for name, most in FEW.items()}
        claim = replace(claim, **problems)
    arm = claim.arms[label]
    task = claim.make_task()
    start = claim.start
    size = {"base_model": model} if model else {"hidden_size": start.hidden_size, "num_layers": start.num_layers}
    start_path = cached_start_model(
        claim.make_task(**start.task_kwargs), start.error_share, 20 if short else start.steps, seed, True, **size
    )
    trainer_class = trainer_of(claim, arm)
    settings = {**COMMON, **claim.settings, **arm.settings, **choice}
    if short:
        settings = quick(settings, trainer_class.config_class)
    if model is not None:
        settings["learning_rate"] *= REAL_MODEL_RATE
    set_seed(seed)
    with tempfile.TemporaryDirectory() as output:
        args = trainer_class.config_class(output_dir=output, seed=seed, **settings)
        trainer = trainer_class(
            model=str(start_path),
            args=args,
            train_dataset=claim.training_rows(task, seed),
            processing_class=AutoTokenizer.from_pretrained(start_path),
            **deepcopy(dict(claim.trainer_kwargs)),
            **({"reward_funcs": judges(claim, task, args, short)} if claim.family.is_judged(args) else {}),
        )
        trainer.remove_callback(PrinterCallback)
        _, problems = task.splits(claim.train_problems, claim.held_out, seed)
        length = settings.get("max_completion_length", task.max_new_tokens)
        observer = Observer(claim, trainer, start_path, task, problems, length, 1 if short else claim.evaluations)
        trainer.add_callback(observer)
        trainer.train()
    return {"points": observer.points, "logs": kept_logs(claim, trainer)}


def judges(claim: Claim, task: Task, args: Any, short: bool) -> list[Callable]:
    """Reward functions of a run."""
    if short and getattr(args, "online_iterations", 0) > 0:
        # A verifier would give all completions of a hardly trained model the same, and there would be no pair
        return [by_letters]
    return list(claim.rewards) or [task.reward]


def by_letters(completions: list[str], **kwargs) -> list[float]:
    """A reward that tells any two texts apart, mostly."""
    return [float(sum(map(ord, text)) % 97) for text in completions]


def trainer_of(claim: Claim, arm: Arm) -> type:
    """Trainer class of an arm."""
    trainer_class = compose(*map(load_trainer, arm.methods)) if arm.methods else load_trainer(claim.family.plain)
    return arm.control(trainer_class) if arm.control else trainer_class


def kept_logs(claim: Claim, trainer: Any) -> dict[str, list[tuple[float, float]]]:
    """Logged metrics that matter, each averaged over at most forty equal parts of the run."""
    compared = {metric.name for metric in claim.metrics()}
    wanted = {*KEPT_LOGS, *claim.logs, *compared, *(m.signal for m in trainer.methods)}
    kept = {}
    for name in sorted(wanted):
        values = [(log["step"], float(log[name])) for log in trainer.state.log_history if name in log]
        part = -(-len(values) // LOG_POINTS) if name not in compared else 1
        chunks = [values[i : i + part] for i in range(0, len(values), part or 1)]
        if chunks:
            kept[name] = [(chunk[-1][0], fmean(value for _, value in chunk)) for chunk in chunks]
    return kept


class Observer(TrainerCallback):
    """
    Measures before training, at evenly spread steps and at the end, and takes the time meanwhile.

    Args:
        claim ([`Claim`]):
            What to measure, and how often.
        trainer ([`~transformers.Trainer`]):
            Trainer to look at.
        start_path (`Path`):
            Folder of the start model.
        task ([`~papertrl.tasks.Task`]), problems (`Dataset`), max_new_tokens (`int`):
            As in [`Probe`].
        evaluations (`int`):
            Measurements after the first.
    """

    def __init__(
        self, claim: Claim, trainer: Any, start_path: Path, task, problems, max_new_tokens: int, evaluations: int
    ):
        self.claim = claim
        self.trainer = trainer
        self.task = task
        self.problems = problems
        self.max_new_tokens = max_new_tokens
        self.evaluations = evaluations
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        # Loaded anew: trainers patch the forward of their model, which a copy would share
        self.start_model = AutoModelForCausalLM.from_pretrained(start_path).eval().to(trainer.model.device)

    def on_train_begin(self, args, state, control, **kwargs):
        self._measure(0)
        self._resumed = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        every = max(1, state.max_steps // self.evaluations)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.seconds += time.perf_counter() - self._resumed
            self._measure(state.global_step)
            self._resumed = time.perf_counter()

    def _measure(self, step: int) -> None:
        model = self.trainer.model
        was_training = model.training
        model.eval()
        probe = Probe(
            model,
            self.start_model,
            self.trainer.processing_class,
            self.task,
            self.problems,
            self.max_new_tokens,
        )
        point = {
            "step": step,
            "sampled_tokens": self.trainer.sampled_tokens,
            "trained_tokens": self.trainer.trained_tokens,
            "seconds": self.seconds,
        }
        for measure in self.claim.measures:
            point |= measure(probe)
        model.train(was_training)
        self.points.append(point)
