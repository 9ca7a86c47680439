"""What `papertrl evaluate` asks models, and who judges: by default what the run itself measures on held-out data."""

import argparse
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerState

from ..core.errors import JobError, UsageError
from ..evaluation.sampling import answer_options
from ..hub.files import RUN_FILE
from ..hub.runfile import read_json
from ..hub.scrubbing import scrub
from ..rewards import checked, load_reward
from ..rewards.checked import reward_name
from ..tasks import load_task
from .arguments import JobArguments
from .data import check_reward_columns, preference_rows
from .splits import chosen_splits, load_splits

# Prompts where no run says how many
NUM_PROMPTS = 256
# Longest answer where neither run nor task says it
MAX_NEW_TOKENS = 256


@dataclass
class Evaluated:
    """
    What models are evaluated on.

    Args:
        problems (`Dataset`):
            Column `prompt`, text or messages, and what the judges read.
        judges (`dict[str, Callable]`):
            Reward functions by the name of what they measure.
        source (`dict[str, Any]`):
            What the result says of the data.
        own (`bool`):
            Whether these are the prompts that the run itself measures.
        options (`dict[str, Any]`):
            Options of generation with which the run samples, see [`~papertrl.evaluation.sampling.answer_options`].
        template (`dict[str, Any]`):
            What the run says to the chat template.
        state ([`~transformers.TrainerState`]):
            How far the run has trained, for rewards that ask.
    """

    problems: Dataset
    judges: dict[str, Callable]
    source: dict[str, Any]
    own: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    template: dict[str, Any] = field(default_factory=dict)
    state: TrainerState = field(default_factory=TrainerState)


def run_of(models: list[str]) -> dict[str, Any]:
    """What the first of the models that is a run tells of itself; nothing where none is."""
    return next((run for name in models if (run := read_json(Path(name) / RUN_FILE))), {})


def make_evaluated(args: argparse.Namespace) -> Evaluated:
    """
    Problems and judges: those that the command line names, else those of the first run among the models.

    Settles `args.max_new_tokens`.

    Raises:
        [`~papertrl.core.errors.JobError`]: if there are none, or a run does not say what it was trained on; the
            message names what to give.
    """
    if args.dataset_name is not None and args.task is not None:
        raise UsageError(f"Both `--task` '{args.task}' and `--dataset_name` '{args.dataset_name}' are set; drop one.")
    run = run_of(args.models)
    if run and not (args.task or args.dataset_name or run.get("task") or run.get("dataset")):
        raise JobError(
            f"'{args.models[0]}' does not say what it was trained on, since it was trained from Python. Give "
            "`--dataset_name` and `--reward_funcs`, or `--task`."
        )
    on_dataset = args.dataset_name or (run.get("dataset") and args.task is None)
    evaluated = _of_dataset(args, run) if on_dataset else _of_task(args, run)
    config = run.get("config", {})
    evaluated.options, evaluated.template = answer_options(config), config.get("chat_template_kwargs") or {}
    evaluated.state = TrainerState(global_step=run.get("steps", 0), max_steps=run.get("steps", 0))
    return evaluated


def _of_task(args: argparse.Namespace, run: dict[str, Any]) -> Evaluated:
    trained_on, data = run.get("task") or {}, run.get("data", {})
    name = args.task or trained_on.get("name") or "addition"
    kwargs = args.task_kwargs or (trained_on.get("kwargs", {}) if name == trained_on.get("name") else {})
    task = load_task(name, **kwargs)
    its_own = trained_on == {"name": name, "kwargs": kwargs}
    args.max_new_tokens = args.max_new_tokens or (its_own and data.get("max_new_tokens")) or task.max_new_tokens
    own = its_own and bool(data.get("held_out_prompts")) and args.num_prompts is None and args.data_seed is None
    if own:
        seed = run["seed"]
        # Copies among them count as often as they did
        _, problems = task.splits(data["task_size"], data["held_out_prompts"], seed)
    else:
        seed = args.data_seed or 0
        problems = _distinct(task.generate(args.num_prompts or NUM_PROMPTS, seed, "test"))
    judges = named_rewards(args.reward_funcs, args.max_new_tokens) or {task.measure: checked(task.reward)}
    return Evaluated(problems, judges, {"name": name, "kwargs": kwargs, "seed": seed}, own)


def _distinct(problems: Dataset) -> Dataset:
    # The bootstrap takes prompts as independent, which copies are not
    first = {prompt: i for i, prompt in reversed(list(enumerate(problems["prompt"])))}
    return problems.select(sorted(first.values()))


def _of_dataset(args: argparse.Namespace, run: dict[str, Any]) -> Evaluated:
    data = run.get("data", {}) if run.get("dataset") else {}
    args.max_new_tokens = args.max_new_tokens or data.get("max_new_tokens") or MAX_NEW_TOKENS
    name = args.dataset_name or _dataset_of_run(args.models, run)
    arguments = JobArguments(**{f: data[f] for f in _fields(("dataset_", "held_out_")) if f in data})
    arguments.dataset_name, arguments.dataset_streaming = name, False
    arguments.dataset_config = args.dataset_config or arguments.dataset_config
    held_out = arguments.held_out_share and args.dataset_split is None
    splits = chosen_splits(arguments) if held_out else load_splits(arguments)
    split = args.dataset_split or (arguments.dataset_test_split if data else _default_split(splits))
    if split not in splits:
        held_out_nothing = " from which the run held nothing out" if data and args.dataset_split is None else ""
        raise UsageError(
            f"Dataset '{name}'{held_out_nothing} has no split '{split}'; it has {sorted(splits)}. Give "
            "`--dataset_split`, or another `--dataset_name`."
        )
    rows = splits[split]
    if len(rows) == 0:
        raise JobError(f"Dataset '{name}' is empty: its split '{split}' has no rows.")
    rows = rows.select(range(min(len(rows), args.num_prompts or data.get("held_out_prompts") or NUM_PROMPTS)))
    if "prompt" not in rows.column_names and run.get("family") == "preference":
        rows = preference_rows(name, split, rows, ("prompts",))
    if "prompt" not in rows.column_names:
        raise JobError(
            f"Dataset '{name}' lacks the column `prompt`; its columns are {sorted(rows.column_names)}. Rename the "
            "column that holds it."
        )
    trained_by = run.get("rewards") if data else None
    named = named_rewards(args.reward_funcs or trained_by, args.max_new_tokens)
    if not named:
        if "answer" not in rows.column_names:
            raise JobError(
                f"Dataset '{name}' has no column `answer` to compare with; its columns are "
                f"{sorted(rows.column_names)}. Rename the column that has it, or set `--reward_funcs`."
            )
        named = {"exact_match": checked(load_reward("exact_match", args.max_new_tokens))}
    check_reward_columns(list(named.values()), rows, name)
    own = bool(data) and not (args.num_prompts or args.dataset_name or args.dataset_split or args.reward_funcs)
    return Evaluated(rows, named, {"id": scrub(name), "split": split}, own)


def _default_split(splits: Any) -> str:
    return "test" if "test" in splits else next(iter(splits))


def _dataset_of_run(models: list[str], run: dict[str, Any]) -> str:
    """
    Name of the dataset that a run was trained on.

    Raises:
        [`~papertrl.core.errors.JobError`]: if it is a local one that is not found from here.
    """
    told = run["dataset"]
    if told.get("local") and (told.get("shortened") or not Path(told["id"]).exists()):
        where = "whose folder is not kept" if told.get("shortened") else "which is not in this folder"
        raise JobError(
            f"'{models[0]}' was trained on the local dataset '{told['id']}', {where}. Give it as `--dataset_name`, or "
            "another one; `--reward_funcs` are those of the run unless you set them."
        )
    return told["id"]


def _fields(prefixes: tuple[str, ...]) -> list[str]:
    return [f.name for f in dataclasses.fields(JobArguments) if f.name.startswith(prefixes)]


def data_of(arguments: JobArguments, max_new_tokens: int) -> dict[str, Any]:
    """What `run.json` keeps of a job's data, from which [`make_evaluated`] finds its held-out rows again."""
    names = _fields(("dataset_", "held_out_", "task"))
    return {name: getattr(arguments, name) for name in names} | {"max_new_tokens": max_new_tokens}


def named_rewards(names: list[str] | None, max_new_tokens: int) -> dict[str, Callable]:
    """Reward functions by name: their own, or, where two are called alike, that by which they are given."""
    named: dict[str, Callable] = {}
    for name in names or []:
        function = checked(load_reward(name, max_new_tokens))
        named[name if reward_name(function) in named else reward_name(function)] = function
    return named
