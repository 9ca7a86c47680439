"""A reward function's outcome, checked before it reaches a trainer."""

import functools
import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any


class RewardError(ValueError):
    """A reward function raised, or returned something that is no list of rewards."""


def checked(reward_func: Callable) -> Callable:
    """
    Wrap a reward function so that a fault names the function, the row and what it returned.

    Each row must be a finite number, or `None` where the reward does not apply, as TRL allows.

    Args:
        reward_func (`Callable`):
            Reward function with TRL's signature; it may be a coroutine function.

    Returns:
        `Callable`: of the same name, signature and rewards.

    Raises:
        [`RewardError`]: when called, if `reward_func` raises, returns no list, one of the wrong length, or a row that
            is neither a finite number nor `None`.
    """
    name = reward_name(reward_func)

    def failure(error: Exception) -> RewardError:
        return RewardError(
            f"Reward function '{name}' raised {type(error).__name__}: {error}. It is called with `prompts`, "
            "`completions`, `completion_ids` and every other dataset column as keyword arguments; rerun with "
            "`--debug` for its traceback."
        )

    if inspect.iscoroutinefunction(reward_func):

        @functools.wraps(reward_func)
        async def wrapped(**kwargs):
            try:
                rewards = await reward_func(**kwargs)
            except Exception as error:
                raise failure(error) from error
            return check_rewards(name, rewards, kwargs["completions"])

    else:

        @functools.wraps(reward_func)
        def wrapped(**kwargs):
            try:
                rewards = reward_func(**kwargs)
            except Exception as error:
                raise failure(error) from error
            return check_rewards(name, rewards, kwargs["completions"])

    wrapped.__name__ = name
    return wrapped


def reward_name(reward_func: Callable) -> str:
    """Name of a reward function: its own, or its class's if it is a callable object."""
    return reward_func.__name__ if hasattr(reward_func, "__name__") else type(reward_func).__name__


def check_rewards(name: str, rewards: Any, completions: list) -> list[float | None]:
    """
    Check what reward function `name` returned for `completions`.

    Returns:
        `list[float | None]`: the rewards as plain numbers.

    Raises:
        [`RewardError`]: naming the function, the row and the value.
    """
    if hasattr(rewards, "tolist"):
        rewards = rewards.tolist()
    if not isinstance(rewards, (list, tuple)):
        raise RewardError(
            f"Reward function '{name}' returned {_shown(rewards)} of type `{type(rewards).__name__}`. It must return "
            f"a list with one number per completion ({len(completions)} here)."
        )
    if len(rewards) != len(completions):
        raise RewardError(
            f"Reward function '{name}' returned {len(rewards)} rewards for {len(completions)} completions. It must "
            "return one per completion; use `None` for rows to which the reward does not apply."
        )
    return [_check_row(name, row, reward, completions[row]) for row, reward in enumerate(rewards)]


def _check_row(name: str, row: int, reward: Any, completion: Any) -> float | None:
    if hasattr(reward, "item"):
        reward = reward.item()
    if reward is None or (isinstance(reward, Real) and math.isfinite(reward)):
        return reward if reward is None else float(reward)
    raise RewardError(
        f"Reward function '{name}' returned {_shown(reward)} of type `{type(reward).__name__}` for row {row}, whose "
        f"completion is {_shown(completion)}. Each reward must be a finite number, or `None` where the reward does "
        "not apply."
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
