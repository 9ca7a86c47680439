"""From one format of preference data to another. Every function leaves its argument as it is."""

from collections.abc import Callable
from itertools import combinations, pairwise, product
from typing import Any

from datasets import Dataset, IterableDataset
from trl import extract_prompt
from trl.data_utils import get_dataset_column_names

from .formats import FORMATS, ORDERS, check_preference_rows, detect_format, feedback_turn, levels, refusal
from .messages import message_text

AnyDataset = Dataset | IterableDataset
_ROLES = {
    "prompt": "user",
    "hint": "user",
    "completion": "assistant",
    "chosen": "assistant",
    "rejected": "assistant",
}
_OF_CONVERSATIONS = ("messages", "feedback_turn")
_LISTS = {"hints": "user", "completions": "assistant"}


def _expand(
    dataset: AnyDataset,
    rows_of: Callable[[dict[str, Any]], list[dict[str, Any]]],
    drop: tuple[str, ...],
    adds: tuple[str, ...],
) -> AnyDataset:
    """The rows that `rows_of` makes of each, with columns `adds` beside those of the row that are not `drop`."""
    present = get_dataset_column_names(dataset)
    stays = [name for name in present if name not in drop + adds]

    def convert(batch: dict[str, list]) -> dict[str, list]:
        made: dict[str, list] = {name: [] for name in (*adds, *stays)}
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for new in rows_of(row):
                for name, column in made.items():
                    column.append(new[name] if name in adds else row[name])
        return made

    return dataset.map(convert, batched=True, remove_columns=present)


def _key(value: Any) -> Any:
    """What stands for a prompt or completion where equal ones are looked for."""
    return value if isinstance(value, str) else repr(value)


def _by_prompt(dataset: AnyDataset, purpose: str) -> list[list[tuple[int, dict[str, Any]]]]:
    """Rows with their numbers, those of one prompt together, in the order in which prompts first occur."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"{purpose} looks for rows of one prompt in the whole dataset, and cannot do so in an `IterableDataset`. "
            "Load it without streaming."
        )
    groups: dict[Any, list] = {}
    for number, row in enumerate(dataset):
        groups.setdefault(_key(row["prompt"]), []).append((number, row))
    return list(groups.values())


# --- Rankings and pairs -----------------------------------------------------------------------------------------


def rankings_to_pairs(dataset: AnyDataset, choose: str = "all") -> AnyDataset:
    """
    Pairs of completions of different rank.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            `prompt`, `completions`, and `ranks` (1 is best), `scores` or `relevance` (higher is better); the first of
            these decides.
        choose (`str`, *optional*, defaults to `"all"`):
            `"all"` pairs; `"best_worst"`, the first completion of the best rank with the last of the worst; or
            `"adjacent"`, each completion with the next of those in order.

    Returns:
        `prompt`, `chosen`, `rejected`, with `chosen_score` and `rejected_score` where there are scores or relevance,
        and the other columns. Completions of one rank, or that are equal, make no pair.

    Raises:
        `ValueError`: if `choose` is none of these.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from papertrl.data import rankings_to_pairs
    >>> rows = Dataset.from_dict({"prompt": ["1+1="], "completions": [["3", "2", "x"]], "ranks": [[2, 1, 3]]})
    >>> rankings_to_pairs(rows, "adjacent").to_list()
    [{'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}, {'prompt': '1+1=', 'chosen': '3', 'rejected': 'x'}]
    ```
    """
    takes = {
        "all": lambda items: combinations(items, 2),
        "adjacent": pairwise,
        "best_worst": lambda x: [(x[0], x[-1])],
    }
    if choose not in takes:
        raise ValueError(f"`choose` must be one of {', '.join(map(repr, takes))}, got {choose!r}.")

    dataset = check_preference_rows(dataset, "rankings")
    graded = [name for name in ORDERS[1:] if name in get_dataset_column_names(dataset)]

    def rows_of(row: dict[str, Any]) -> list[dict[str, Any]]:
        completions, distances = row["completions"], levels(row)
        grades = next((row[name] for name in graded if row[name] is not None), [None] * len(completions))
        order = sorted(range(len(completions)), key=distances.__getitem__)
        return [
            {
                "prompt": row["prompt"],
                "chosen": completions[better],
                "rejected": completions[worse],
                "chosen_score": grades[better],
                "rejected_score": grades[worse],
            }
            for better, worse in takes[choose](order)
            if distances[better] < distances[worse] and completions[better] != completions[worse]
        ]

    adds = FORMATS["scored_pairs"].columns
    return _expand(dataset, rows_of, ("completions", *ORDERS), adds if graded else adds[:3])


def pairs_to_rankings(dataset: Dataset) -> Dataset:
    """
    One ranking per prompt, of all completions that its pairs compare.

    Args:
        dataset (`Dataset`):
            Pairs, with their prompts or, as implicit ones, without.

    Returns:
        `prompt` and `completions`, in the order in which they first occur, with `scores` where pairs have
        `chosen_score` and `rejected_score`, and else `ranks`: 1 plus the length of the longest chain of better
        completions. Completions that no pair compares may share a rank. Other columns are dropped.

    Raises:
        `ValueError`: if the pairs of a prompt contradict each other; the message names the row of one.
    """
    dataset = explicit_prompts(check_preference_rows(dataset, "pairs"))
    scored = FORMATS["scored_pairs"].fits(dataset.column_names)
    rows = []
    for group in _by_prompt(dataset, "`pairs_to_rankings`"):
        completions: dict[Any, Any] = {}
        scores: dict[Any, float] = {}
        for number, row in group:
            for side in ("chosen", "rejected"):
                key = _key(row[side])
                completions.setdefault(key, row[side])
                if scored and scores.setdefault(key, row[f"{side}_score"]) != row[f"{side}_score"]:
                    raise refusal(
                        number,
                        f"{side}_score",
                        f"is {row[f'{side}_score']}, but another pair gives the same completion {scores[key]}",
                    )
        new = {"prompt": group[0][1]["prompt"], "completions": list(completions.values())}
        rows.append(
            new | ({"scores": list(scores.values())} if scored else {"ranks": _ranks(group, list(completions))})
        )
    return Dataset.from_list(rows)


def _ranks(group: list[tuple[int, dict[str, Any]]], keys: list[Any]) -> list[int]:
    """Rank of each completion: 1 plus the longest chain of better ones."""
    # By rejected completion, the chosen ones and the row that says so
    better: dict[Any, dict] = {key: {} for key in keys}
    for number, row in group:
        better[_key(row["rejected"])].setdefault(_key(row["chosen"]), number)
    ranks: dict[Any, int] = {}
    while len(ranks) < len(keys):
        ready = [key for key in keys if key not in ranks and better[key].keys() <= ranks.keys()]
        if not ready:
            # From worse to better among those that are left, until one comes up again
            key, seen = next(key for key in keys if key not in ranks), set()
            while key not in seen:
                seen.add(key)
                key, number = next(item for item in better[key].items() if item[0] not in ranks)
            raise refusal(number, "rejected", "goes around in a circle of preferences with other pairs of the prompt")
        ranks |= {key: 1 + max((ranks[other] for other in better[key]), default=0) for key in ready}
    return [ranks[key] for key in keys]


def explicit_prompts(dataset: AnyDataset) -> AnyDataset:
    """
    Pairs with their prompts in a column.

    Of conversations, the prompt is all but the last turn, from the last message of the user or a tool back; of text,
    what both completions begin with, as in [`~trl.extract_prompt`].

    Raises:
        `ValueError`: if two conversations differ before their last turn.
    """
    if "prompt" in get_dataset_column_names(dataset):
        return dataset
    dataset = check_preference_rows(dataset, "pairs")

    def split(row: dict[str, Any], number: int) -> dict[str, Any]:
        if isinstance(row["chosen"], str):
            return extract_prompt(row)
        places = [
            max((i + 1 for i, message in enumerate(row[side]) if message["role"] in ("user", "tool")), default=0)
            for side in ("chosen", "rejected")
        ]
        prompts = [row[side][:place] for side, place in zip(("chosen", "rejected"), places, strict=True)]
        if prompts[0] != prompts[1]:
            raise refusal(
                number, "rejected", "differs from `chosen` before the last turn: the prompts are not the same"
            )
        return {
            "prompt": prompts[0],
            "chosen": row["chosen"][places[0] :],
            "rejected": row["rejected"][places[1] :],
        }

    return dataset.map(split, with_indices=True)


# --- Labels -----------------------------------------------------------------------------------------------------


def unpaired_to_pairs(dataset: Dataset) -> Dataset:
    """
    Every good completion of a prompt with every bad one.

    Args:
        dataset (`Dataset`):
            `prompt`, `completion`, `label`. A prompt that lacks completions of either label makes no pair.

    Returns:
        `prompt`, `chosen`, `rejected`; other columns are dropped. [`~trl.unpair_preference_dataset`] leads back.

    Raises:
        `ValueError`: if no prompt has completions of both labels.
    """
    rows = []
    dataset = check_preference_rows(dataset, "unpaired")
    for group in _by_prompt(dataset, "`unpaired_to_pairs`"):
        sides = {True: {}, False: {}}
        for _, row in group:
            sides[bool(row["label"])].setdefault(_key(row["completion"]), row["completion"])
        for good, bad in product(*sides.values()):
            if good != bad:
                rows.append(
                    {
                        "prompt": group[0][1]["prompt"],
                        "chosen": sides[True][good],
                        "rejected": sides[False][bad],
                    }
                )
    if not rows:
        raise ValueError("No prompt has completions of both labels, so that no pair can be made.")
    return Dataset.from_list(rows)


# --- Conversations ----------------------------------------------------------------------------------------------


def conversations_to_feedback(dataset: AnyDataset) -> AnyDataset:
    """
    What the user was not satisfied with.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            `messages`, and optionally `feedback_turn`, the place of the user's dissatisfied reply, counted from 0. It
            defaults to the user's last turn.

    Returns:
        `prompt`, the messages before the answer; `rejected`, the answer; `feedback`, the text of the reply; and the
        other columns.
    """
    dataset = check_preference_rows(dataset, "conversations")
    return _expand(dataset, lambda row: [_turns(row)[0]], _OF_CONVERSATIONS, FORMATS["feedback"].columns)


def conversations_to_pairs(dataset: AnyDataset) -> AnyDataset:
    """
    The answer after the user's dissatisfied reply, preferred to the one before it.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            As for [`conversations_to_feedback`]. A conversation that ends with the reply makes no pair.

    Returns:
        `prompt`, the messages before both answers; `chosen` and `rejected`; and the other columns.
    """

    def rows_of(row: dict[str, Any]) -> list[dict[str, Any]]:
        turns, chosen = _turns(row)
        if not chosen or chosen[-1]["role"] != "assistant" or chosen == turns["rejected"]:
            return []
        return [{"prompt": turns["prompt"], "chosen": chosen, "rejected": turns["rejected"]}]

    dataset = check_preference_rows(dataset, "conversations")
    return _expand(dataset, rows_of, _OF_CONVERSATIONS, ("prompt", "chosen", "rejected"))


def _turns(row: dict[str, Any]) -> tuple[dict[str, Any], list]:
    """Prompt, rejected answer and feedback of a conversation, and the answer that follows."""
    messages, turn = row["messages"], feedback_turn(row)
    of_user = [i for i, message in enumerate(messages) if message["role"] == "user"]
    start = max(i for i in of_user if i < turn) + 1
    end = min((i for i in of_user if i > turn), default=len(messages))
    dissatisfied = {
        "prompt": messages[:start],
        "rejected": messages[start:turn],
        "feedback": message_text(messages[turn]),
    }
    return dissatisfied, messages[turn + 1 : end]


# --- Text and messages ------------------------------------------------------------------------------------------


def as_messages(dataset: AnyDataset) -> AnyDataset:
    """The dataset with the text of prompts, hints among them, and of answers turned into messages."""
    names = set(get_dataset_column_names(dataset))

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        def message(text: str, role: str) -> list[dict[str, Any]]:
            return [{"role": role, "content": text}]

        return {name: message(row[name], role) for name, role in _ROLES.items() if name in names} | {
            name: [message(text, role) for text in row[name]] for name, role in _LISTS.items() if name in names
        }

    return dataset.map(convert)


def as_text(dataset: AnyDataset) -> AnyDataset:
    """
    The dataset with prompts and answers of one message each turned into text: the inverse of [`as_messages`].

    Raises:
        `ValueError`: if one has several messages, which only a chat template makes one text of; the message names row
            and column.
    """
    names = set(get_dataset_column_names(dataset))

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        def text(messages: list[dict[str, Any]], name: str) -> str:
            if len(messages) != 1:
                raise refusal(
                    number, name, f"has {len(messages)} messages, which only a chat template makes one text of"
                )
            return message_text(messages[0])

        return {name: text(row[name], name) for name in _ROLES if name in names} | {
            name: [text(messages, name) for messages in row[name]] for name in _LISTS if name in names
        }

    return dataset.map(convert, with_indices=True)


# --- Prompts of pairs -------------------------------------------------------------------------------------------

# What a prompt is called where it is not called `prompt`
_ASKED = {"question", "questions", "instruction", "instructions", "query", "input", "problem", "user", "user_prompt"}
_ASKED |= {"prompts", "request", "user_input", "post", "context"}


def check_prompt_is_read(dataset: AnyDataset) -> None:
    """
    Check that pairs without `prompt` hold their questions, where another column has them.

    Raises:
        `ValueError`: naming a column whose text the completions do not begin with, so that it would not be read.
    """
    columns = get_dataset_column_names(dataset)
    asked = [name for name in columns if name.lower() in _ASKED]
    if "prompt" in columns or not asked or not FORMATS["pairs"].fits(columns):
        return
    row = next(iter(dataset))
    for name in asked:
        question, chosen = row[name], row["chosen"]
        if isinstance(question, str) and isinstance(chosen, str) and not chosen.startswith(question):
            raise ValueError(
                f"Column `{name}` would not be read: pairs take their question from `prompt`, and without one from "
                f"what `chosen` and `rejected` begin with, which is not `{name}`. Is it the prompt? Rename it to "
                "`prompt`; if not, drop it."
            )


def with_prompts_of_conversations(dataset: AnyDataset) -> AnyDataset:
    """
    The dataset; where prompts are text and completions messages, with prompts that are messages as well.

    The conversations of a pair may begin with the prompt, which is split off then.

    Raises:
        `ValueError`: if they begin with another prompt than the column's.
    """
    names = [name for name in ("chosen", "rejected", "completion") if name in get_dataset_column_names(dataset)]
    if not names or "prompt" not in get_dataset_column_names(dataset):
        return dataset
    first = next(iter(dataset), {})
    if not isinstance(first.get("prompt"), str) or not isinstance(first.get(names[0]), list):
        return dataset

    def convert(row: dict[str, Any], number: int) -> dict[str, Any]:
        asked = [{"role": "user", "content": row["prompt"]}]
        found: dict[str, Any] = {"prompt": asked}
        for name in names:
            messages = row[name]
            if not isinstance(row["prompt"], str) or not isinstance(messages, list):
                raise refusal(number, name, "is of another form than in the first row, where the prompt is text")
            place = max((i + 1 for i, m in enumerate(messages) if m.get("role") in ("user", "tool")), default=0)
            users = [message_text(message) for message in messages[:place] if message["role"] == "user"]
            if place and row["prompt"].strip() not in (users[0].strip(), users[-1].strip()):
                raise refusal(
                    number,
                    "prompt",
                    f"is text, and `{name}` a conversation that begins with another prompt. Drop the column `prompt` "
                    "to take the conversations as they are",
                )
            found |= {"prompt": messages[:place] or asked, name: messages[place:]}
        return found

    return dataset.map(convert, with_indices=True)


# --- What a job asks for ----------------------------------------------------------------------------------------

CONVERTERS: dict[tuple[str, str], Callable[[AnyDataset], AnyDataset]] = {
    ("rankings", "scored_pairs"): rankings_to_pairs,
    ("rankings", "pairs"): rankings_to_pairs,
    ("unpaired", "pairs"): unpaired_to_pairs,
    ("conversations", "pairs"): conversations_to_pairs,
    ("pairs", "rankings"): pairs_to_rankings,
    ("scored_pairs", "rankings"): pairs_to_rankings,
    ("conversations", "feedback"): conversations_to_feedback,
    ("pairs", "prompts"): explicit_prompts,
    ("conversations", "prompts"): conversations_to_feedback,
}


def to_format(dataset: AnyDataset, formats: tuple[str, ...]) -> AnyDataset:
    """
    The dataset in the first of `formats` that it has, or else that it can be converted to, its rows checked.

    Prompts that are text beside conversations become messages.

    Raises:
        `ValueError`: if there is no way, a row is malformed (see [`check_preference_rows`]), or another column than
            `prompt` seems to hold the prompts.
    """
    check_prompt_is_read(dataset)
    dataset = with_prompts_of_conversations(dataset)
    columns = get_dataset_column_names(dataset)
    for wanted in formats:
        if FORMATS[wanted].fits(columns):
            return check_preference_rows(dataset, wanted)
    found = detect_format(dataset)
    for wanted in formats:
        if (found, wanted) in CONVERTERS:
            return CONVERTERS[found, wanted](dataset)
    ways = dict.fromkeys([*formats, *(source for source, wanted in CONVERTERS if wanted in formats)])
    needed = "; ".join(f"{way}: {FORMATS[way]}" for way in ways)
    raise ValueError(
        f"The columns {sorted(columns)} do not do. What does is {needed}. Rename the columns that hold it."
    )
