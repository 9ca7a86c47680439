"""Tokens of further completions and prompts, made, cut and padded as TRL does those of a pair."""

import json
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length
from trl.trainer.utils import pad


def template_options(row: dict[str, Any]) -> dict[str, Any]:
    """What the row says to its chat template: the columns `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    options = row.get("chat_template_kwargs") or {}
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **options}


def tokenize_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], options: dict[str, Any]
) -> list[int]:
    """Tokens of text, or of messages with the beginning of an answer."""
    if isinstance(prompt, str):
        return tokenizer(text=prompt)["input_ids"]
    return _chat_ids(tokenizer, prompt, add_generation_prompt=True, **options)


def tokenize_completions(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], completions: list, options: dict[str, Any]
) -> tuple[list[int], list[list[int]]]:
    """
    Tokens of a prompt and of each completion after it.

    Each completion is tokenized together with the prompt; what all of them share with the prompt alone is the prompt.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        prompt (`str` or `list[dict]`):
            Text, or messages.
        completions (`list`):
            Of the prompt's kind. Texts get no end token that they do not have.
        options (`dict[str, Any]`):
            For the chat template, see [`template_options`].

    Returns:
        `tuple[list[int], list[list[int]]]`: the prompt's tokens, and those of each completion.
    """
    prompt_ids = tokenize_prompt(tokenizer, prompt, options)
    if isinstance(prompt, str):
        sequences = [tokenizer(text=prompt + completion)["input_ids"] for completion in completions]
    else:
        sequences = [_chat_ids(tokenizer, prompt + completion, **options) for completion in completions]
    start = min(common_prefix_length(prompt_ids, ids) for ids in sequences)
    return prompt_ids[:start], [ids[start:] for ids in sequences]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]


def kept_tokens(max_length: int | None, truncation_mode: str) -> slice:
    """What TRL's collator keeps of a sequence."""
    if max_length is None or truncation_mode == "keep_start":
        return slice(max_length)
    return slice(-max_length, None)


def stack_tokens(rows: list[list[list[int]]], fill: int) -> torch.Tensor:
    """
    Sequences of tokens, several for each row of a batch, as one tensor.

    Args:
        rows (`list[list[list[int]]]`):
            Rows may have different numbers of sequences.
        fill (`int`):
            Fills the right.

    Returns:
        `torch.Tensor` of shape `(rows, sequences, length)`.
    """
    return pad([pad([torch.tensor(ids, dtype=torch.long) for ids in row], fill) for row in rows], fill)
