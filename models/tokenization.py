"""Tokens of further completions and prompts, made, cut and padded as TRL does those of a pair."""

import json
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase
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


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig) -> list[int]:
    """Tokens that end a completion, as in TRL: the tokenizer's, and all that the model's generation config names."""
    ids = generation_config.eos_token_id
    ids = ids if isinstance(ids, list) else [ids]
    return [i for i in dict.fromkeys([tokenizer.eos_token_id, *ids]) if i is not None]


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


def stack_sequences(
    rows: list[list[tuple[list[int], list[int]]]],
    pad_token_id: int,
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
    marks: list[list[list[int]]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Prompts and completions, several for each row of a batch, as tensors; cut as TRL's collator cuts pairs.

    Args:
        rows (`list[list[tuple[list[int], list[int]]]]`):
            Tokens of prompt and completion. Rows may have different numbers of sequences.
        pad_token_id (`int`):
            Fills the right.
        max_length (`int`, *optional*), truncation_mode (`str`, *optional*, defaults to `"keep_start"`):
            As in [`~trl.DPOConfig`].
        marks (`list[list[list[int]]]`, *optional*):
            A number for each completion token. Unset, 1.

    Returns:
        Token ids, attention mask, and the marks, which are 0 on prompts and padding; `torch.Tensor` of shape
        `(rows, sequences, length)` each.
    """
    keeps_end = max_length is not None and truncation_mode == "keep_end"
    kept = slice(-max_length, None) if keeps_end else slice(max_length)
    marks = marks or [[[1] * len(completion) for _, completion in row] for row in rows]
    ids, attention, marked = [], [], []
    for row, numbers in zip(rows, marks, strict=True):
        ids.append([(prompt + completion)[kept] for prompt, completion in row])
        attention.append([[1] * len(sequence) for sequence in ids[-1]])
        marked.append([([0] * len(prompt) + n)[kept] for (prompt, _), n in zip(row, numbers, strict=True)])
    return _stack(ids, pad_token_id), _stack(attention, 0), _stack(marked, 0)


def _stack(rows: list[list[list[int]]], fill: int) -> torch.Tensor:
    return pad([pad([torch.tensor(sequence, dtype=torch.long) for sequence in row], fill) for row in rows], fill)
