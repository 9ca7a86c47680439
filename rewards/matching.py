"""Rewards that compare a completion's text with the dataset's `answer` column."""

import re
from typing import Any

Completion = str | list[dict[str, Any]]

_NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?")


def completion_text(completion: Completion) -> str:
    """Text of a completion in either of TRL's formats: a string, or the messages the model produced."""
    if isinstance(completion, str):
        return completion
    return "".join(message["content"] for message in completion)


def exact_match(completions: list[Completion], answer: list[str], **kwargs) -> list[float]:
    """
    1.0 where the completion, stripped of surrounding white space, is the answer; else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or conversational.
        answer (`list[str]`):
            The dataset's column `answer`.

    Relations: [`last_number_match`] accepts words around a numeric answer.

    Example:

    ```python
    >>> exact_match(["12 ", "12!"], answer=["12", "12"])
    [1.0, 0.0]
    ```
    """
    return [float(completion_text(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def last_number_match(completions: list[Completion], answer: list[str], **kwargs) -> list[float]:
    """
    1.0 where the last number in the completion equals the answer as a number; else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or conversational.
        answer (`list[str]`):
            The dataset's column `answer`; numbers may have thousands separators.

    Example:

    ```python
    >>> last_number_match(["7 + 5 = 12.", "no idea"], answer=["12", "12"])
    [1.0, 0.0]
    ```
    """
    return [
        float(_last_number(completion_text(c)) == float(str(a).replace(",", "")))
        for c, a in zip(completions, answer, strict=True)
    ]


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
