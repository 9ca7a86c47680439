"""What a claim is: a paper's statement, and the small experiment that tests it."""

import importlib.util
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from ..core.catalogue import COMBINATIONS, METHODS, SUFFIXES, find
from ..core.errors import UsageError
from ..tasks import Task, load_task
from .verdict import Summary, final

AXES = ("steps", "sampled_tokens", "trained_tokens", "seconds")
# By family, the method of a task that turns problems into rows
VIEWS = {"policy": None, "preference": "online", "supervised": "supervised"}


@dataclass(frozen=True)
class Start:
    """
    Checkpoint that all arms of one seed start from: the tiny model, warmed up on the task's demonstrations.

    Args:
        steps (`int`):
            Optimizer steps of supervised warm-up.
        error_share (`float`):
            Share of the demonstrations with the task's typical error.
        hidden_size (`int`), num_layers (`int`):
            Size of the tiny model.
        task_kwargs (`dict`):
            Settings in which the task that is demonstrated differs from the one trained on.
    """

    steps: int = 1600
    error_share: float = 0.6
    hidden_size: int = 64
    num_layers: int = 2
    task_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """
    One of the things compared.

    Args:
        methods (`tuple[str, ...]`):
            Methods of the catalogue; none for the family's base, which trains as TRL does.
        settings (`dict`):
            Config values over those of the claim.
        grid (`dict[str, tuple]`):
            Values tried on the development seeds, in all combinations; the best for the claim's `tune_on` is
            reported on the fresh seeds.
        control (`Callable`, *optional*):
            Trainer class → trainer class, for controls that are no method.
        note (`str`):
            What the arm is, in a few words.
    """

    methods: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple] = field(default_factory=dict)
    control: Callable[[type], type] | None = None
    note: str = ""

    def choices(self) -> list[dict[str, Any]]:
        """Points of the grid, as config values."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]


@dataclass(frozen=True)
class Metric:
    """
    A number of a run.

    Args:
        name (`str`):
            Key returned by one of the claim's measures, or logged by the trainer.
        direction (`str`):
            `"higher"` or `"lower"`: which is better.
        summary (`Callable`, *optional*, defaults to [`final`]):
            Curve → number.
        axis (`str`, *optional*, defaults to `"steps"`):
            What is equal among the arms: `"steps"`, `"sampled_tokens"`, `"trained_tokens"` or `"seconds"`.
    """

    name: str
    direction: str = "higher"
    summary: Summary = final
    axis: str = "steps"

    def __post_init__(self):
        if self.direction not in ("higher", "lower"):
            raise ValueError(f"`direction` must be 'higher' or 'lower', got {self.direction!r}.")
        if self.axis not in AXES:
            raise ValueError(f"`axis` must be one of {', '.join(AXES)}, got {self.axis!r}.")

    @property
    def sign(self) -> int:
        """Factor that makes a larger number the better one."""
        return 1 if self.direction == "higher" else -1

    def __str__(self) -> str:
        return f"{self.summary.__name__.replace('_', ' ')} {self.name}"


@dataclass(frozen=True)
class Comparison:
    """
    One arm against another.

    Args:
        arm (`str`), against (`str`):
            Labels of the claim's arms.
        metric ([`Metric`]):
            What is compared.
        smallest_effect (`float`):
            Smallest difference that counts, in the metric's unit.
        guards (`dict[Metric, float]`):
            Metrics that must not be worse by more than the given margin, or the claim is not shown.
    """

    arm: str
    against: str
    metric: Metric
    smallest_effect: float
    guards: Mapping[Metric, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """
    A paper's statement and the experiment that tests it.

    Args:
        method (`str`):
            Method or combination of the catalogue.
        statement (`str`):
            What the paper claims, in our words.
        figures (`str`):
            The paper's figures.
        check (`str`):
            What is done here, and why it tests the mechanism.
        task (`str`), task_kwargs (`dict`):
            Task of [`papertrl.tasks`].
        settings (`dict`):
            Config values of all arms.
        arms (`dict[str, Arm]`):
            What is compared, by label. All have the same number of grid points.
        comparisons (`tuple[Comparison, ...]`):
            The first is the claim and gives the verdict; the others stand beside it.
        tune_on ([`Metric`]):
            What the grid is searched for.
        measures (`tuple[Callable, ...]`):
            [`Probe`] → named numbers, taken before training and at `evaluations` points of it.
        start ([`Start`]):
            Checkpoint.
        rewards (`tuple[Callable, ...]`, *optional*):
            Reward functions to train on. Defaults to the task's verifier.
        data (`Callable`, *optional*):
            (task, number of problems, seed) → training rows. Defaults to the family's view of the task's problems.
        trainer_kwargs (`dict`):
            Keyword arguments of all arms' trainers, such as `peft_config`; each run has a copy of them.
        train_problems (`int`), held_out (`int`):
            Number of problems.
        evaluations (`int`):
            Points of the curves after the start.
        logs (`tuple[str, ...]`):
            Logged metrics that are kept beside those in comparisons.
        findings (`str`):
            What was tried and learned, for the page of evidence.

    Raises:
        `ValueError`: naming the field, if arms, comparisons or grids do not fit together.
    """

    method: str
    statement: str
    figures: str
    check: str
    task: str
    settings: Mapping[str, Any]
    arms: Mapping[str, Arm]
    comparisons: tuple[Comparison, ...]
    tune_on: Metric
    measures: tuple[Callable, ...]
    task_kwargs: Mapping[str, Any] = field(default_factory=dict)
    start: Start = Start()
    rewards: tuple[Callable, ...] = ()
    data: Callable[[Task, int, int], Dataset] | None = None
    trainer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    train_problems: int = 4000
    held_out: int = 256
    evaluations: int = 10
    logs: tuple[str, ...] = ()
    findings: str = ""

    def __post_init__(self):
        sizes = {label: len(arm.choices()) for label, arm in self.arms.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"`arms` of claim '{self.method}' must have grids of one size, got {sizes}.")
        if not self.comparisons:
            raise ValueError(f"`comparisons` of claim '{self.method}' is empty; the first gives the verdict.")
        for comparison in self.comparisons:
            for label in (comparison.arm, comparison.against):
                if label not in self.arms:
                    raise ValueError(
                        f"`comparisons` of claim '{self.method}' name the arm '{label}'; arms are {sorted(self.arms)}."
                    )

    @property
    def family(self) -> str:
        """Family of the methods."""
        return METHODS[COMBINATIONS.get(self.method, (self.method,))[0]]

    @property
    def plain(self) -> str:
        """What the catalogue calls the family's trainer without a method."""
        return SUFFIXES[self.family].lower()

    def judged(self, args: Any) -> bool:
        """Whether completions are sampled and judged in training under the config `args`."""
        return self.family == "policy" or getattr(args, "online_iterations", 0) > 0

    def make_task(self, **overrides: Any) -> Task:
        """The task, with the claim's settings."""
        return load_task(self.task, **{**self.task_kwargs, **overrides})

    def metrics(self) -> list[Metric]:
        """Every metric that is compared, guarded or tuned on, once."""
        used = [self.tune_on]
        for comparison in self.comparisons:
            used += [comparison.metric, *comparison.guards]
        return list(dict.fromkeys(used))

    def training_rows(self, task: Task, seed: int) -> Dataset:
        """Rows to train on."""
        if self.data is not None:
            return self.data(task, self.train_problems, seed)
        problems = task.generate(self.train_problems, seed)
        view = VIEWS[self.family]
        return getattr(task, view)(problems) if view else problems


def load_claim(method: str) -> Claim:
    """
    Claim of a method, or of a combination.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if there is no such method, or it has no claim.
    """
    name = method.replace("-", "_")
    try:
        name = name if name in COMBINATIONS else find(method)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if name not in claimed():
        raise UsageError(f"Method '{name}' has no claim yet; claims exist for: {', '.join(claimed())}.")
    return importlib.import_module(f"papertrl.claims.{name}").CLAIM


def claimed() -> list[str]:
    """Methods and combinations of the catalogue that have a claim, in its order."""
    return [
        name for name in (*METHODS, *COMBINATIONS) if importlib.util.find_spec(f"papertrl.claims.{name}") is not None
    ]
