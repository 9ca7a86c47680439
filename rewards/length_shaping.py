"""
Rewards of the two-stage recipe (arXiv:2507.08267): a boxed answer before the thinking ends, and short right answers.

[`~papertrl.TwoStageMathGRPOTrainer`] computes the two length rewards by itself, over the groups of all ranks; the
functions here give them to any trainer, over the completions of one call.
"""

import functools
import math
from collections.abc import Callable

import torch

from ..losses.policy.two_stage_math import cosine_reward, relative_length_reward
from .matching import Completion, boxed, boxed_match, completion_text

END_OF_THINKING = "</think>"


def boxed_format(completions: list[Completion], **kwargs) -> list[float]:
    r"""
    1.0 where a boxed answer stands before the end of thinking, and thinking ends; else 0.0.

    A model trained on it can be stopped at the end of thinking, with the answer already there.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or conversational.

    Example:

    ```python
    >>> boxed_format([r"2 and 2, \boxed{4}.</think>It is 4.", r"</think>\boxed{4}", r"\boxed{4}"])
    [1.0, 0.0, 0.0]
    ```
    """
    parts = [completion_text(completion).partition(END_OF_THINKING) for completion in completions]
    return [float(bool(tag) and boxed(thinking) is not None) for thinking, tag, _ in parts]


def cosine_length(
    correct: Callable = boxed_match,
    max_length: int = 30_000,
    unit: str = "characters",
    right: tuple[float, float] = (1.0, 0.1),
    wrong: tuple[float, float] = (-1.0, -0.1),
) -> Callable:
    """
    Reward function that gives right completions less, and wrong ones more, the longer they are.

    Args:
        correct (`Callable`, *optional*, defaults to `boxed_match`):
            Reward function above 0 on right completions; where it does not apply, neither does this one.
        max_length (`int`, *optional*, defaults to `30000`):
            Length from which the reward stays.
        unit (`str`, *optional*, defaults to `"characters"`):
            `"characters"` or `"tokens"`.
        right (`tuple[float, float]`), wrong (`tuple[float, float]`):
            Rewards at length 0 and at `max_length`.

    Relations: TRL's `get_cosine_scaled_reward` has such a curve in tokens, with a verifier of its own.

    Example:

    ```python
    >>> reward = cosine_length(max_length=20)
    >>> [round(r, 3) for r in reward(completions=[r"\\boxed{4}", "no idea"], answer=["4", "4"])]
    [0.62, -0.754]
    ```
    """

    def shape(lengths, right_ones, prompts):
        return cosine_reward(lengths, right_ones, max_length, right, wrong)

    return _shaped("cosine_length", correct, unit, shape)


def relative_length(correct: Callable = boxed_match, unit: str = "characters") -> Callable:
    """
    Reward function that compares the lengths of a prompt's completions: 0.5 for the shortest, -0.5 for the longest.

    Wrong completions get no more than 0.

    Args:
        correct (`Callable`), unit (`str`):
            As in [`cosine_length`].

    Relations: [`cosine_length`] rates a length by itself.

    Example:

    ```python
    >>> reward = relative_length()
    >>> reward(prompts=["2+2"] * 2, completions=[r"\\boxed{4}", r"two twos: \\boxed{4}"], answer=["4", "4"])
    [0.5, -0.5]
    ```
    """

    def shape(lengths, right_ones, prompts):
        first = {}
        group_ids = torch.tensor([first.setdefault(str(prompt), len(first)) for prompt in prompts])
        return relative_length_reward(lengths, right_ones, group_ids)

    return _shaped("relative_length", correct, unit, shape)


def _shaped(name: str, correct: Callable, unit: str, shape: Callable) -> Callable:
    if unit not in ("characters", "tokens"):
        raise ValueError(f"`unit` must be 'characters' or 'tokens', got {unit!r}.")

    # Wrapped so that the dataset columns which `correct` reads are known to be needed
    @functools.wraps(correct)
    def reward(completions, prompts=None, completion_ids=None, **kwargs):
        verdicts = correct(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
        measured = map(completion_text, completions) if unit == "characters" else completion_ids
        lengths = torch.tensor(
            [math.nan if v is None else len(m) for v, m in zip(verdicts, measured, strict=True)], dtype=torch.float64
        )
        right_ones = torch.tensor([v is not None and v > 0 for v in verdicts])
        return [None if math.isnan(value) else value for value in shape(lengths, right_ones, prompts).tolist()]

    reward.__name__ = name
    return reward
