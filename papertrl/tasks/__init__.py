"""Procedurally generated tasks with exact verifiers."""

import difflib

from .addition import AdditionTask
from .automaton import AutomatonTask
from .base import ProceduralTask, Task, VerifiedTask
from .countdown import CountdownTask
from .marker import MarkerTask
from .mixture import MixtureTask
from .reasoning_gym import ReasoningGymTask
from .rewrite import RewriteTask
from .sorting import SortingTask
from .tool_call import ToolCallTask

__all__ = [
    "AdditionTask",
    "AutomatonTask",
    "CountdownTask",
    "MarkerTask",
    "MixtureTask",
    "ProceduralTask",
    "ReasoningGymTask",
    "RewriteTask",
    "SortingTask",
    "Task",
    "ToolCallTask",
    "VerifiedTask",
    "load_task",
]

_TASKS = {
    task.name: task
    for task in (
        AdditionTask,
        AutomatonTask,
        CountdownTask,
        MarkerTask,
        MixtureTask,
        RewriteTask,
        SortingTask,
        ToolCallTask,
    )
}


def load_task(name: str, **kwargs) -> Task:
    """
    Task of the given name.

    Args:
        name (`str`):
            `addition`, `automaton`, `countdown`, `marker`, `mixture`, `rewrite`, `sorting`, `tool_call`, or
            `reasoning_gym:<generator>`.
        **kwargs:
            The task's settings, such as `digits` for `addition`.

    Raises:
        `ValueError`: if there is no such task, or it does not take these settings.
        `ImportError`: if the task's package is not installed.
    """
    family, _, generator = name.partition(":")
    if family == "reasoning_gym" and generator:
        return ReasoningGymTask(generator, **kwargs)
    if name not in _TASKS:
        near = difflib.get_close_matches(name, _TASKS, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise ValueError(
            f"Unknown task '{name}'. {hint}Tasks are: {', '.join(_TASKS)}, and `reasoning_gym:<generator>`."
        )
    try:
        return _TASKS[name](**kwargs)
    except TypeError as error:
        raise ValueError(f"Task '{name}' does not accept the settings {kwargs}: {error}") from error
