"""A reward function's outcome, checked before it reaches a trainer."""

import asyncio
import functools
import logging
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from .event_loop import submit

logger = logging.getLogger(__name__)


class RewardError(ValueError):
    """A reward function raised, or returned something that is no list of rewards."""


def checked(reward_func: Callable) -> Callable:
    """
    Wrap a reward function so that a fault names the function, the row and what it returned.

    Each row must be a finite number, or `None` where the reward does not apply, as TRL allows. A function that returns
    only `None` when it is first called is warned of.

    Args:
        reward_func (`Callable`):
            Reward function with TRL's signature: a function, a callable object or a `functools.partial` of these,
            synchronous or not.

    Returns:
        `Callable`: of the same name, signature and rewards.

    Raises:
        [`RewardError`]: when called, if `reward_func` raises or exits, returns no list, one of the wrong length, or a
            row that is neither a finite number nor `None`.
    """
    name = reward_name(reward_func)
    called = False

    def outcome(rewards: Any, completions: list) -> list[float | None]:
        nonlocal called
        rewards = check_rewards(name, rewards, completions)
        if not called and rewards and all(reward is None for reward in rewards):
            logger.warning(
                f"Reward function '{name}' returned `None` for all {len(rewards)} completions of its first call: it "
                "applies to none of them."
            )
        called = True
        return rewards

    return _wrapped(reward_func, (SystemExit, Exception), outcome)


def guarded(reward_func: Callable) -> Callable:
    """Wrap a reward function so that it cannot end the process: `sys.exit` becomes a [`RewardError`] that names it."""
    return _wrapped(reward_func, SystemExit, lambda rewards, completions: rewards)


def _wrapped(
    reward_func: Callable,
    caught: type[BaseException] | tuple[type[BaseException], ...],
    outcome: Callable[[Any, list], Any],
) -> Callable:
    name = reward_name(reward_func)

    def failure(error: BaseException) -> RewardError:
        return RewardError(
            f"Reward function '{name}' raised {type(error).__name__}: {error}. It is called with `prompts`, "
            "`completions`, `completion_ids`, `trainer_state`, `log_extra`, `log_metric` and every other dataset "
            "column as keyword arguments; rerun with `--debug` for its traceback."
        )

    async def awaited(kwargs: dict[str, Any]) -> Any:
        try:
            return await reward_func(**kwargs)
        except RewardError:
            raise
        # An exit inside of an event loop would end the loop, and leave everybody waiting
        except caught as error:
            raise failure(error) from error

    if is_async(reward_func):

        @functools.wraps(reward_func, updated=())
        async def wrapped(**kwargs):
            return outcome(await asyncio.wrap_future(submit(awaited(kwargs))), kwargs["completions"])

    else:

        @functools.wraps(reward_func, updated=())
        def wrapped(**kwargs):
            try:
                rewards = reward_func(**kwargs)
            except RewardError:
                raise
            except caught as error:
                raise failure(error) from error
            return outcome(rewards, kwargs["completions"])

    wrapped.__name__ = name
    return wrapped


def reward_name(reward_func: Callable) -> str:
    """Name of a reward, as TRL logs it: that of a function, of what a partial wraps, or of an object's class."""
    from trl.trainer.utils import get_callable_name

    return get_callable_name(reward_func)


def is_async(reward_func: Callable) -> bool:
    """Whether calling the reward gives a coroutine."""
    from trl.trainer.utils import is_async_callable

    return is_async_callable(reward_func)


def check_rewards(name: str, rewards: Any, completions: list) -> list[float | None]:
    """
    Check what reward function `name` returned for `completions`.

    Returns:
        `list[float | None]`: the rewards as plain numbers.

    Raises:
        [`RewardError`]: naming the function, the row and the value.
    """
    rewards = one_per_completion(name, rewards, completions)
    return [_check_row(name, row, reward, completions[row]) for row, reward in enumerate(rewards)]


def one_per_completion(name: str, rewards: Any, completions: list) -> list:
    """
    What reward function `name` returned for `completions`, as a list.

    Raises:
        [`RewardError`]: if it is none, or not of their number.
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
    return list(rewards)


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
