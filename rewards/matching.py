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


def boxed_match(completions: list[Completion], answer: list[str], **kwargs) -> list[float]:
    r"""
    1.0 where the first `\boxed{...}` of the completion holds the answer, as text or as a number; else 0.0.

    Args:
        completions (`list[str]` or `list[list[dict]]`):
            Completions, plain or conversational.
        answer (`list[str]`):
            The dataset's column `answer`.

    Relations: TRL's `accuracy_reward` also accepts equivalent expressions, and needs the package `math-verify`.

    Example:

    ```python
    >>> boxed_match([r"So \boxed{12}.", r"\boxed{1{,}2}", "12"], answer=["12.0", "12", "12"])
    [1.0, 0.0, 0.0]
    ```
    """
    return [float(_same(boxed(completion_text(c)), str(a))) for c, a in zip(completions, answer, strict=True)]


def boxed(text: str) -> str | None:
    r"""Content of the first `\boxed{...}` in a text, with braces inside it paired; `None` if there is none."""
    _, opening, rest = text.partition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if opening else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:place]
    return None


def _same(found: str | None, answer: str) -> bool:
    if found is None or found.strip() == answer.strip():
        return found is not None
    try:
        return float(found.replace(",", "")) == float(answer.replace(",", ""))
    except ValueError:
        return False


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
