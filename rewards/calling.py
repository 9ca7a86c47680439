"""Calls reward functions outside of `GRPOTrainer`, with all that it gives them."""

from collections.abc import Callable
from typing import Any

from .checked import guarded, is_async, one_per_completion, reward_name
from .event_loop import submit, together

# What every reward function is given beside the columns of the dataset
GIVEN_TO_REWARDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL gives to none: `prompts` and the completions that were sampled stand for them
NOT_GIVEN = ("prompt", "completion", "completion_ids")


def call_rewards(
    reward_funcs: list[Callable],
    prompts: list,
    completions: list,
    completion_ids: list[list[int]],
    columns: dict[str, list],
    trainer_state: Any,
    log_extra: Callable[[str, list], None] = lambda column, values: None,
    log_metric: Callable[[str, float], None] = lambda name, value: None,
) -> list[list[float | None]]:
    """
    What reward functions with TRL's signature give to completions.

    Asynchronous ones run at the same time, also where an event loop runs already.

    Args:
        reward_funcs (`list[Callable]`):
            Functions, callable objects or `functools.partial` of these, synchronous or not.
        prompts (`list`), completions (`list`):
            Texts, or lists of messages.
        completion_ids (`list[list[int]]`):
            Tokens of the completions, the end included.
        columns (`dict[str, list]`):
            Columns of the dataset, repeated for each completion. Those that TRL gives to no function are left out.
        trainer_state ([`~transformers.TrainerState`]):
            How far training is.
        log_extra (`Callable`, *optional*), log_metric (`Callable`, *optional*):
            What functions log with. Defaults to functions that do nothing.

    Returns:
        `list[list[float | None]]`: for each function one reward per completion, `None` or NaN where it does not apply.

    Raises:
        [`RewardError`]: if a function exits, or does not return a list with one reward per completion.
    """
    inputs = {name: values for name, values in columns.items() if name not in NOT_GIVEN}
    inputs |= {
        "prompts": prompts,
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": trainer_state,
        "log_extra": log_extra,
        "log_metric": log_metric,
    }
    funcs = list(map(guarded, reward_funcs))
    waiting = [i for i, func in enumerate(funcs) if is_async(func)]
    outcomes = {i: func(**inputs) for i, func in enumerate(funcs) if i not in waiting}
    if waiting:
        awaited = submit(together([funcs[i](**inputs) for i in waiting])).result()
        outcomes |= dict(zip(waiting, awaited, strict=True))
    return [one_per_completion(reward_name(func), outcomes[i], completions) for i, func in enumerate(funcs)]
