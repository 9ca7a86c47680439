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
    return _tokenize(tokenizer, prompt, add_generation_prompt=True, **options)


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
    sequences = [_tokenize(tokenizer, prompt + completion, **options) for completion in completions]
    start = min(common_prefix_length(prompt_ids, ids) for ids in sequences)
    return prompt_ids[:start], [ids[start:] for ids in sequences]


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str | list[dict], **options: Any) -> list[int]:
    if isinstance(text, str):
        return tokenizer(text=text)["input_ids"]
    return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)["input_ids"]


def with_end(tokenizer: PreTrainedTokenizerBase, completion: str | list[dict]) -> str | list[dict]:
    """A completion as TRL tokenizes it: a text ends with the end-of-sequence token, messages by their template."""
    if not isinstance(completion, str):
        return completion
    return completion.removesuffix(tokenizer.eos_token) + tokenizer.eos_token


def kept_tokens(max_length: int | None, truncation_mode: str) -> slice:
    """What TRL's collator keeps of a sequence."""
    if max_length is None or truncation_mode == "keep_start":
        return slice(max_length)
    return slice(-max_length, None)


def stack_sequences(
    rows: list[list[tuple[list[int], list[int], list[int]]]], kept: slice, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Prompts and completions, several for each row of a batch, as tensors.

    Args:
        rows (`list[list[tuple[list[int], list[int], list[int]]]]`):
            Tokens of a prompt, those of a completion, and a mark for each of the latter: usually 1. Rows may have
            different numbers of sequences.
        kept (`slice`):
            What stays of a sequence, see [`kept_tokens`].
        pad_token_id (`int`):
            Fills the right.

    Returns:
        Token ids, attention mask, and the marks, which are 0 on prompts and padding; `torch.Tensor` of shape
        `(rows, sequences, length)` each.
    """
    ids = [[(prompt + completion)[kept] for prompt, completion, _ in row] for row in rows]
    attention = [[[1] * len(sequence) for sequence in row] for row in ids]
    marks = [[([0] * len(prompt) + marks)[kept] for prompt, _, marks in row] for row in rows]
    return _stack(ids, pad_token_id), _stack(attention, 0), _stack(marks, 0)


def _stack(rows: list[list[list[int]]], fill: int) -> torch.Tensor:
    return pad([pad([torch.tensor(sequence, dtype=torch.long) for sequence in row], fill) for row in rows], fill)
