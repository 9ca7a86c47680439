"""Rows that are sampled from or imitated: what they must be like before training begins."""

from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from .formats import ROLES, Malformed, check_each
from .messages import message_text


def _check_messages(messages: Any, column: str) -> None:
    if not isinstance(messages, list):
        raise Malformed(column, f"must be text or a list of messages, got {messages!r}")
    if not messages:
        raise Malformed(column, "is empty: it has no message")
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise Malformed(column, f"message {place} has the role {role!r}, and none of {', '.join(ROLES)}")
        if message.get("content") is None and not message.get("tool_calls"):
            raise Malformed(column, f"message {place}, of the {role}, has no content")


def _check_value(value: Any, column: str, may_be_empty: bool = False) -> None:
    if value is None:
        raise Malformed(column, "is missing")
    if isinstance(value, str):
        if not may_be_empty and not value.strip():
            raise Malformed(column, "is empty")
        return
    _check_messages(value, column)


def _check_prompt(row: dict[str, Any]) -> None:
    prompt = row["prompt"]
    _check_value(prompt, "prompt")
    if isinstance(prompt, str):
        return
    if prompt[-1]["role"] in ("system", "developer"):
        raise Malformed("prompt", f"ends with a message of the {prompt[-1]['role']}, which nobody answers")
    parts = any(isinstance(message.get("content"), list) or message.get("tool_calls") for message in prompt)
    if not parts and not any(message_text(message).strip() for message in prompt):
        raise Malformed("prompt", "is empty: no message has text")


def _check_completion(row: dict[str, Any]) -> None:
    _check_value(row["prompt"], "prompt", may_be_empty=True)
    _check_value(row["completion"], "completion")
    forms = ["text" if isinstance(row[column], str) else "messages" for column in ("prompt", "completion")]
    if forms[0] != forms[1]:
        raise Malformed("completion", f"is {forms[1]}, but the prompt is {forms[0]}; both must be the same")


def _check_named(row: dict[str, Any], column: str) -> None:
    _check_value(row[column], column)


def check_prompts(dataset: Dataset | IterableDataset, split: str | None = None) -> Dataset | IterableDataset:
    """
    Check that every row has a prompt to answer.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Column `prompt`: text, or messages. Rows of an `IterableDataset` are checked as they come.
        split (`str`, *optional*):
            What the message calls the dataset.

    Returns:
        The dataset, to be used from here on.

    Raises:
        `ValueError`: naming the number of the row, counted from 0, the column and what is wrong: no prompt or an empty
            one, a message without content or of an unknown role.
    """
    return _checked(dataset, ["prompt"], _check_prompt, split)


def check_texts(dataset: Dataset | IterableDataset, split: str | None = None) -> Dataset | IterableDataset:
    """
    Check that every row has something to imitate, in the form that TRL finds first: `prompt` and `completion`,
    `messages`, or `text`. Rows of token ids are taken as they are.

    Args:
        dataset, split:
            As in [`check_prompts`].

    Raises:
        `ValueError`: as in [`check_prompts`].
    """
    columns = set(get_dataset_column_names(dataset))
    if "input_ids" in columns:
        return dataset
    if {"prompt", "completion"} <= columns:
        return _checked(dataset, ["prompt", "completion"], _check_completion, split)
    name = next((name for name in ("messages", "text") if name in columns), None)
    return dataset if name is None else _checked(dataset, [name], partial(_check_named, column=name), split)


def _checked(
    dataset: Dataset | IterableDataset, columns: list[str], check: Callable[[dict[str, Any]], None], split: str | None
) -> Dataset | IterableDataset:
    try:
        if isinstance(dataset, Dataset):
            # Images beside them need not be decoded
            check_each(dataset.select_columns(columns), check)
            return dataset
        return check_each(dataset, check)
    except ValueError as error:
        raise ValueError(f"{split}: {error}" if split else str(error)) from None


CHECKS = {"prompts": check_prompts, "texts": check_texts}
