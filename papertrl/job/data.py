"""Training data of a job: a task's problems or a dataset, with the columns that the trainer's family needs."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset, IterableDataset

from ..core.errors import JobError
from ..core.family import Family
from ..data.converters import as_messages, to_format
from ..data.rows import CHECKS
from ..rewards.calling import GIVEN_TO_REWARDS, NOT_GIVEN
from ..tasks import Task, load_task
from .arguments import Job, JobArguments
from .heldout import PAIRS_MEASURE
from .splits import chosen_splits


@dataclass
class JobData:
    """
    What a job trains and is judged on.

    Args:
        train (`Dataset` or `IterableDataset`):
            Training rows, as the trainer takes them.
        eval (`Dataset`, *optional*):
            Held-out rows in the same format.
        problems (`Dataset`, *optional*):
            Held-out prompts with what the judges read; `None` where nothing can be judged.
        judges (`list` of `Callable`):
            Reward functions that judge completions of `problems`.
        measure (`str`):
            What the judges' mean, or what else is measured of held-out rows, is called.
    """

    train: Dataset | IterableDataset
    eval: Dataset | None
    problems: Dataset | None
    judges: list[Callable]
    measure: str
    max_new_tokens: int | None = None


def task_of(arguments: JobArguments) -> Task | None:
    """The job's task, or `None` if it trains on a dataset."""
    if arguments.dataset_name is None:
        if arguments.held_out_share:
            raise JobError(
                "`held_out_share` is for datasets, and a task draws its own held-out problems: leave it out, and "
                "set their number with `--held_out_prompts`."
            )
        return load_task(arguments.task or "addition", **arguments.task_kwargs)
    if arguments.task is not None:
        raise JobError(
            f"Both `task` '{arguments.task}' and `dataset_name` '{arguments.dataset_name}' are set; drop one."
        )
    return None


def task_data(
    task: Task, family: Family, arguments: JobArguments, seed: int, chat: bool, online: bool = False
) -> JobData:
    """
    Draw a task's problems, in the view of `family`.

    Args:
        chat (`bool`):
            Whether the model has a chat template, for which prompts and answers become messages.
        online (`bool`, *optional*, defaults to `False`):
            Whether preference pairs are made in training, of the prompts.
    """
    train, test = task.splits(arguments.task_size, arguments.held_out_prompts, seed)
    data = JobData(
        family.rows(task, train, online),
        family.rows(task, test) if len(test) else None,
        test if len(test) and family.generates else None,
        [task.reward],
        task.measure if family.generates else PAIRS_MEASURE,
        task.max_new_tokens,
    )
    if chat:
        data.train, data.eval, data.problems = (d and as_messages(d) for d in (data.train, data.eval, data.problems))
    return data


def dataset_data(
    family: Family,
    arguments: JobArguments,
    judges: list[Callable],
    formats: tuple[str, ...] = (),
    eval_formats: tuple[str, ...] = (),
) -> JobData:
    """
    Load the job's dataset and check it.

    Args:
        formats (`tuple[str, ...]`, *optional*):
            What preference methods take, the best first: the dataset is converted to one of these. See [`FORMATS`].
        eval_formats (`tuple[str, ...]`, *optional*):
            What they are evaluated on. None for no evaluation.

    Raises:
        [`JobError`]: if it cannot be loaded, is empty, or lacks a split or column, or if rows of preference data are
            malformed; the message names what is there.
    """
    splits = chosen_splits(arguments)
    name = arguments.dataset_name
    train, test = splits["train"], splits.get("test")
    for which, rows in (("training", train), ("held-out", test)):
        if isinstance(rows, Dataset) and len(rows) == 0:
            raise JobError(f"Dataset '{name}' is empty: its {which} split has no rows. Check the file or the split.")
    problems = None
    if judges and isinstance(test, Dataset) and arguments.held_out_prompts:
        problems = test.select(range(min(len(test), arguments.held_out_prompts)))
    if family.columns:
        train = checked_rows(name, arguments.dataset_train_split, train, family)
        test = test and checked_rows(name, arguments.dataset_test_split, test, family)
    else:
        train = preference_rows(name, arguments.dataset_train_split, train, formats)
        evaluated = test is not None and eval_formats
        test = preference_rows(name, arguments.dataset_test_split, test, eval_formats) if evaluated else None
        problems = problems and preference_rows(name, arguments.dataset_test_split, problems, ("prompts",))
    return JobData(train, test, problems, judges, "reward" if family.generates else PAIRS_MEASURE)


def answer_length(job: Job, data: JobData) -> int:
    """Longest answer to a held-out prompt, in tokens."""
    family = job.trainer_class.family
    sampled = family.completion_length(job.training)
    return sampled if family.judged is True else data.max_new_tokens or sampled


def preference_rows(
    name: str, split: str, dataset: Dataset | IterableDataset, formats: tuple[str, ...]
) -> Dataset | IterableDataset:
    """
    The rows in one of `formats`, checked.

    Raises:
        [`JobError`]: if there is no way from their format to these, a row is malformed, or none is left.
    """
    try:
        dataset = to_format(dataset, formats)
    except ValueError as error:
        raise JobError(f"Dataset '{name}', split '{split}': {error}") from error
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise JobError(
            f"Dataset '{name}', split '{split}': no row is left of which {' or '.join(formats)} can be made."
        )
    return dataset


def checked_rows(
    name: str, split: str, dataset: Dataset | IterableDataset, family: Family
) -> Dataset | IterableDataset:
    """
    The rows, of which each is one that trainers of `family` can train on.

    Raises:
        [`JobError`]: naming the split, the row, the column and what is wrong; or a column that is missing.
    """
    check_columns(name, dataset, family)
    try:
        return CHECKS[family.row_check](dataset)
    except ValueError as error:
        raise JobError(f"Dataset '{name}', split '{split}': {error}") from error


def check_columns(name: str, dataset: Dataset | IterableDataset, family: Family) -> None:
    """
    Check that a dataset has the columns that trainers of `family` read.

    Raises:
        [`JobError`]: naming the missing column and those present.
    """
    present = dataset.column_names
    if present is None:
        present = list(next(iter(dataset)))
    wanted = family.columns
    if any(set(columns) <= set(present) for columns in wanted):
        return
    texts = [" and ".join(f"`{column}`" for column in columns) for columns in wanted]
    raise JobError(
        f"Dataset '{name}' lacks the column {', or '.join(texts)}, which {family} methods need; its columns are "
        f"{sorted(present)}. Rename the column that holds it."
    )


def check_reward_columns(judges: list[Callable], train: Dataset | IterableDataset, name: str) -> None:
    """
    Check that the dataset has the columns that reward functions read, going by their required parameters.

    Raises:
        [`JobError`]: naming the reward, the missing column and those present.
    """
    present = set(train.column_names or next(iter(train)))
    for judge in judges:
        try:
            parameters = inspect.signature(judge).parameters.values()
        except ValueError:
            # Callables of C have none
            continue
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        ]
        for column in required:
            if column in NOT_GIVEN and column not in GIVEN_TO_REWARDS:
                raise JobError(
                    f"Reward '{judge.__name__}' asks for `{column}`, which none is given: as in TRL, `prompts` and "
                    "`completions` hold all of them. Rename the parameter."
                )
            if column not in present | {*GIVEN_TO_REWARDS}:
                raise JobError(
                    f"Reward '{judge.__name__}' reads the dataset column `{column}`, which '{name}' lacks; its "
                    f"columns are {sorted(present)}. Rename the column that has it, or choose other `--reward_funcs`."
                )
