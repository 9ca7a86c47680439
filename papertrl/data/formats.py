"""Formats of preference data: which columns make one, and what its rows must be like."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from .messages import message_text

# What may say how the completions of a ranking rank, the first present deciding
ORDERS = ("ranks", "scores", "relevance")
# Which roles may follow which; the first message follows `None`
_FOLLOW = {
    None: ("system", "developer", "user"),
    "system": ("user",),
    "developer": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
ROLES = tuple(filter(None, _FOLLOW))


class Malformed(Exception):
    """What is wrong with a row, and in which column."""

    def __init__(self, column: str, problem: str):
        super().__init__(problem)
        self.column = column


@dataclass(frozen=True)
class Format:
    """
    A format of preference data.

    Args:
        columns (`tuple[str, ...]`):
            Columns that it has.
        one_of (`tuple[str, ...]`):
            Columns of which it has at least one.
        check (`Callable`):
            Row → nothing; raises [`Malformed`].
    """

    columns: tuple[str, ...]
    check: Callable[[dict[str, Any]], None]
    one_of: tuple[str, ...] = ()

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether these columns make the format."""
        columns = set(columns)
        return columns.issuperset(self.columns) and (not self.one_of or not columns.isdisjoint(self.one_of))

    def __str__(self) -> str:
        named = ", ".join(f"`{column}`" for column in self.columns)
        return named + (f" and one of {', '.join(f'`{column}`' for column in self.one_of)}" if self.one_of else "")


# --- Rows -------------------------------------------------------------------------------------------------------


def _present(row: dict[str, Any], column: str) -> Any:
    if row.get(column) is None:
        raise Malformed(column, "is missing")
    return row[column]


def _check_roles(messages: list, column: str, after: str | None) -> None:
    """Check messages that stand after one of the role `after`."""
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role is None or role not in _FOLLOW:
            raise Malformed(column, f"has a message whose role is {role!r}, and none of {', '.join(ROLES)}")
        if role not in _FOLLOW[after]:
            raise Malformed(
                column,
                f"has a message of the {role} {f'after one of the {after}' if after else 'at its beginning'}, where "
                f"one of {' or '.join(_FOLLOW[after])} must stand",
            )
        if message.get("content") is None and not message.get("tool_calls"):
            raise Malformed(column, f"has a message of the {role} without content")
        after = role


def _check_prompt(row: dict[str, Any]) -> str | list:
    prompt = _present(row, "prompt")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise Malformed("prompt", f"must be text or a list of messages, got {prompt!r}")
    _check_roles(prompt, "prompt", None)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise Malformed(
            "prompt", f"must end with a message of the user, but ends with one of the {prompt[-1]['role']}"
        )
    return prompt


def _check_asked(row: dict[str, Any]) -> None:
    prompt = _check_prompt(row)
    if isinstance(prompt, str) and not prompt.strip():
        raise Malformed("prompt", "is empty")


def _check_completion(value: Any, column: str, prompt: str | list | None) -> None:
    """Check a completion of `prompt`, or one that begins with its prompt if that is `None`."""
    if value is None:
        raise Malformed(column, "is missing")
    if not isinstance(value, (str, list)):
        raise Malformed(column, f"must be text or a list of messages, got {value!r}")
    if prompt is not None and isinstance(value, str) != isinstance(prompt, str):
        forms = ["text" if isinstance(v, str) else "messages" for v in (value, prompt)]
        raise Malformed(column, f"is {forms[0]}, but the prompt is {forms[1]}; both must be the same")
    if not value or (isinstance(value, str) and not value.strip()):
        raise Malformed(column, "is empty")
    if isinstance(value, str):
        return
    _check_roles(value, column, prompt[-1]["role"] if prompt else None)
    last = value[-1]
    if last["role"] != "assistant":
        raise Malformed(column, f"must end with a message of the assistant, but ends with one of the {last['role']}")
    if not message_text(last).strip() and not last.get("tool_calls"):
        raise Malformed(column, "is empty")


def _check_number(value: Any, column: str, low: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < low:
        least = f" of at least {low}" if low > -math.inf else ""
        raise Malformed(column, f"must hold finite numbers{least}, got {value!r}")


def _check_pair(row: dict[str, Any]) -> None:
    prompt = _check_prompt(row) if "prompt" in row else None
    for column in ("chosen", "rejected"):
        _check_completion(row.get(column), column, prompt)
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise Malformed("rejected", "is in another form than `chosen`; both must be text or both messages")
    if row["chosen"] == row["rejected"]:
        raise Malformed("rejected", "equals `chosen`")
    scores = [column for column in ("chosen_score", "rejected_score") if column in row]
    for column in scores:
        _check_number(_present(row, column), column)
    if len(scores) == 2 and row["chosen_score"] < row["rejected_score"]:
        raise Malformed("chosen_score", f"is {row['chosen_score']}, below `rejected_score` {row['rejected_score']}")


def _check_ranking(row: dict[str, Any]) -> None:
    prompt = _check_prompt(row)
    completions = _present(row, "completions")
    if not isinstance(completions, list) or len(completions) < 2:
        raise Malformed("completions", f"must be a list of at least two, got {completions!r}")
    for completion in completions:
        _check_completion(completion, "completions", prompt)
    orders = [column for column in ORDERS if row.get(column) is not None]
    if not orders:
        raise Malformed(next(column for column in ORDERS if column in row), "is missing")
    for column in orders:
        values = row[column]
        if not isinstance(values, list) or len(values) != len(completions):
            raise Malformed(
                column, f"must be a list of {len(completions)}, one for each of the `completions`, got {values!r}"
            )
        for value in values:
            _check_number(value, column, {"ranks": 1, "relevance": 0}.get(column, -math.inf))
    distances = levels(row)
    for column in orders[1:]:
        for i, j in permutations(range(len(completions)), 2):
            if distances[i] < distances[j] and row[column][i] < row[column][j]:
                raise Malformed(column, f"contradicts `{orders[0]}`, which rank completion {i} before {j}")


def _check_unpaired(row: dict[str, Any]) -> None:
    _check_completion(row.get("completion"), "completion", _check_prompt(row))
    if _present(row, "label") not in (True, False):
        raise Malformed("label", f"must be true or false, got {row['label']!r}")


def _check_feedback(row: dict[str, Any]) -> None:
    _check_completion(row.get("rejected"), "rejected", _check_prompt(row))
    feedback = _present(row, "feedback")
    if not isinstance(feedback, str):
        raise Malformed("feedback", f"must be the text of the user's reply, got {feedback!r}")
    if not feedback.strip():
        raise Malformed("feedback", "is empty")


def _check_conversation(row: dict[str, Any]) -> None:
    messages = _present(row, "messages")
    if not isinstance(messages, list):
        raise Malformed("messages", f"must be a list of messages, got {messages!r}")
    _check_roles(messages, "messages", None)
    feedback_turn(row)


FORMATS = {
    "rankings": Format(("prompt", "completions"), _check_ranking, ORDERS),
    "scored_pairs": Format(("prompt", "chosen", "rejected", "chosen_score", "rejected_score"), _check_pair),
    "pairs": Format(("chosen", "rejected"), _check_pair),
    "feedback": Format(("prompt", "rejected", "feedback"), _check_feedback),
    "unpaired": Format(("prompt", "completion", "label"), _check_unpaired),
    "conversations": Format(("messages",), _check_conversation),
    "prompts": Format(("prompt",), _check_asked),
}


# --- Datasets ---------------------------------------------------------------------------------------------------


def detect_format(dataset: Dataset | IterableDataset) -> str:
    """
    Format of a dataset, going by its columns: one of [`FORMATS`], the first that fits.

    Raises:
        `ValueError`: if none does; the message names the columns, and what they might be.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from papertrl.data import detect_format
    >>> detect_format(Dataset.from_dict({"prompt": ["1+1="], "completions": [["2", "3"]], "scores": [[1.0, 0.0]]}))
    'rankings'
    ```
    """
    columns = get_dataset_column_names(dataset)
    for name, form in FORMATS.items():
        if form.fits(columns):
            return name
    known = "; ".join(f"{name}: {form}" for name, form in FORMATS.items())
    raise ValueError(f"The columns {sorted(columns)} are no format of preference data. Formats are: {known}.")


def check_preference_rows(dataset: Dataset | IterableDataset, format: str | None = None) -> Dataset | IterableDataset:
    """
    Check that every row is well-formed.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Rows. Those of an `IterableDataset` are checked as they come.
        format (`str`, *optional*):
            One of [`FORMATS`]. Defaults to what [`detect_format`] finds.

    Returns:
        The dataset, to be used from here on.

    Raises:
        `ValueError`: naming the number of the row, counted from 0, the column and what is wrong: a value is missing or
            empty, a completion is rejected and chosen, numbers are not finite, do not fit the completions or
            contradict the preference, text and messages are mixed, or roles stand in a wrong order.
    """
    return check_each(dataset, FORMATS[format or detect_format(dataset)].check)


def check_each(
    dataset: Dataset | IterableDataset, check: Callable[[dict[str, Any]], None]
) -> Dataset | IterableDataset:
    """The dataset, every row of which `check` has seen or, of an `IterableDataset`, will see."""
    if isinstance(dataset, Dataset):
        for number, row in enumerate(dataset):
            _check_row(row, number, check)
        return dataset
    return dataset.map(_check_row, with_indices=True, fn_kwargs={"check": check})


def _check_row(row: dict[str, Any], number: int, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    try:
        check(row)
    except Malformed as error:
        raise refusal(number, error.column, str(error)) from None
    return row


def refusal(number: int, column: str, problem: str) -> ValueError:
    """The error that says what is wrong with a row of a dataset, and in which column."""
    return ValueError(f"Row {number} (counted from 0), column `{column}`: {problem}.")


def levels(row: dict[str, Any]) -> list[float]:
    """How far each completion of a ranking is from the best, by the first of [`ORDERS`] that it has."""
    name = next(name for name in ORDERS if row.get(name) is not None)
    return row[name] if name == "ranks" else [-value for value in row[name]]


def feedback_turn(row: dict[str, Any]) -> int:
    """
    Place of the user's dissatisfied reply in a row's `messages`: its `feedback_turn`, or else the last turn of the
    user.

    Raises:
        [`Malformed`]: if that is no reply of the user to the assistant.
    """
    messages, turn = row["messages"], row.get("feedback_turn")
    column = "messages" if turn is None else "feedback_turn"
    if turn is None:
        turn = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=0)
    if isinstance(turn, bool) or not isinstance(turn, int) or not 0 <= turn < len(messages):
        raise Malformed(column, f"must be the place of a message, from 0 to {len(messages) - 1}, got {turn!r}")
    if turn == 0 or messages[turn]["role"] != "user" or messages[turn - 1]["role"] != "assistant":
        raise Malformed(column, f"has no reply of the user to an answer of the assistant at place {turn}")
    return turn
