"""Rows of ranked lists: checked, completed, shuffled and tokenized."""

import math
import random
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...models.tokenization import template_options, tokenize_completions


def ranked_list(row: dict[str, Any]) -> tuple[list, list[float], list[float]]:
    """
    Items of a row, how relevant each is, and the place that it should have, from 1 on.

    A row has the column `completions`, texts or lists of messages, and at least one of three others: `relevance`
    (graded, 0 for irrelevant), `ranks` (1 is best) and `scores` (any numbers, higher is better). What is missing is
    derived: ranks from scores, or else from relevance, ties in the order of the list; relevance from ranks, as
    (N − rank) / (N − 1). A row without `completions` is a list of two: `chosen` with relevance 1, `rejected` with 0.

    Args:
        row (`dict[str, Any]`):
            Of the dataset.

    Raises:
        `ValueError`: if there is no item, nothing says how they rank, or a column does not fit; the message names it.
    """
    items = row.get("completions")
    if items is None:
        return [row["chosen"], row["rejected"]], [1.0, 0.0], [1.0, 2.0]
    if not items:
        raise ValueError(f"The column `completions` must hold at least one item per row, got {items!r}.")
    given = {name: row[name] for name in ("relevance", "ranks", "scores") if row.get(name) is not None}
    if not given:
        raise ValueError(
            "A row with `completions` must have one of the columns `relevance`, `ranks` and `scores`, but its columns "
            f"are {sorted(row)}."
        )
    for name, values in given.items():
        low = {"relevance": 0, "ranks": 1, "scores": -math.inf}[name]
        if len(values) != len(items) or not all(math.isfinite(value) and value >= low for value in values):
            raise ValueError(
                f"The column `{name}` must hold one finite number of at least {low} for each of the {len(items)} "
                f"`completions`, got {values!r}."
            )
    ranks = given.get("ranks") or places(given.get("scores") or given["relevance"])
    last = max(1, len(items) - 1)
    relevance = given.get("relevance") or [max(0.0, (len(items) - rank) / last) for rank in ranks]
    return items, [float(value) for value in relevance], [float(rank) for rank in ranks]


def places(values: list[float]) -> list[int]:
    """Place of each value when the largest stands first, from 1 on; ties stand in the order of the list."""
    order = sorted(range(len(values)), key=lambda i: -values[i])
    return [order.index(i) + 1 for i in range(len(values))]


def best_and_worst(row: dict[str, Any]) -> dict[str, Any]:
    """`chosen` and `rejected` of a list: the items of first and of last place."""
    items, _, ranks = ranked_list(row)
    return {"chosen": items[ranks.index(min(ranks))], "rejected": items[ranks.index(max(ranks))]}


def tokenize_list(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, layout: str, separator: str, seed: int
) -> dict[str, Any]:
    """
    Tokens of a list, and which item each of them belongs to.

    Args:
        row (`dict[str, Any]`):
            As [`ranked_list`] takes it, with what TRL made of it.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer, a fast one for `in_context`.
        layout (`str`):
            `"in_context"`: one sequence, with the items in an order that `seed` and the row decide. `"separate"`: a
            sequence per item.
        separator (`str`):
            Stands between items in context.
        seed (`int`):
            Of the order.

    Returns:
        `dict[str, Any]`: `irpo_prompt_ids`; `irpo_completion_ids` and `irpo_item_index`, lists of sequences, the
            latter with the number of a token's item from 1 on and 0 for separators; `irpo_relevance` and `irpo_ranks`,
            by item.

    Raises:
        `ValueError`: as [`ranked_list`], or if items cannot stand in one sequence.
    """
    items, relevance, ranks = ranked_list(row)
    if isinstance(items[0], str):
        items = [item.removesuffix(tokenizer.eos_token) for item in items]
    if layout == "in_context":
        order = list(range(len(items)))
        random.Random(repr((seed, row["prompt"], items))).shuffle(order)
        items, relevance, ranks = ([values[i] for i in order] for values in (items, relevance, ranks))
        prompt_ids, completion_ids, item_index = _in_context(row, items, tokenizer, separator)
    else:
        if row.get("completions") is None:
            prompt_ids, completion_ids = row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]
        else:
            if isinstance(items[0], str):
                items = [item + tokenizer.eos_token for item in items]
            prompt_ids, completion_ids = tokenize_completions(tokenizer, row["prompt"], items, template_options(row))
        item_index = [[number] * len(ids) for number, ids in enumerate(completion_ids, 1)]
    return {
        "irpo_prompt_ids": prompt_ids,
        "irpo_completion_ids": completion_ids,
        "irpo_item_index": item_index,
        "irpo_relevance": relevance,
        "irpo_ranks": ranks,
    }


def _in_context(
    row: dict[str, Any], items: list, tokenizer: PreTrainedTokenizerBase, separator: str
) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Prompt, and one sequence of all items up to the end of the last: what follows is not scored."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"`irpo_layout='in_context'` needs to know which characters a token stands for, and "
            f"`{type(tokenizer).__name__}` is no fast tokenizer. Use a fast one, or `irpo_layout='separate'`."
        )
    if isinstance(items[0], str):
        listed = separator.join(items)
        text, start, special = row["prompt"] + listed, len(row["prompt"]), True
    else:
        if any(len(item) != 1 for item in items):
            raise ValueError(
                "`irpo_layout='in_context'` puts all items into one message, and the column `completions` must hold "
                f"items of one message each, got {[len(item) for item in items]}. Use `irpo_layout='separate'`."
            )
        items = [item[0]["content"] for item in items]
        listed = separator.join(items)
        messages = [*row["prompt"], {"role": "assistant", "content": listed}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, **template_options(row))
        start, special = text.rfind(listed), False
        if start < 0:
            raise ValueError(
                f"The chat template changes the list of items {listed!r}, so that they cannot be told apart. Remove "
                "white space at the ends of the items, or use `irpo_layout='separate'`."
            )
    owner = [0] * len(text)
    for number, item in enumerate(items, 1):
        owner[start : start + len(item)] = [number] * len(item)
        start += len(item) + len(separator)
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    index = [max(owner[first:last], default=0) for first, last in encoded["offset_mapping"]]
    of_items = [place for place, number in enumerate(index) if number]
    first, last = (of_items[0], of_items[-1] + 1) if of_items else (len(index), len(index))
    return encoded["input_ids"][:first], [encoded["input_ids"][first:last]], [index[first:last]]
