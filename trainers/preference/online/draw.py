"""Completions drawn for a round: each depends on its own seed, not on what is drawn beside it."""

import hashlib
from typing import Any

import torch

from ..sampling import distribution, left_pad, sample_completions


def keyed_seed(seed: int, iteration: int, *key: Any) -> int:
    """Seed of one completion of an iteration, from the run's `seed` and what tells the completion from others."""
    digest = hashlib.sha256(f"{seed} {iteration} {key}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def draw_completions(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    seeds: list[int],
    args: Any,
    pad_token_id: int,
    eos_token_ids: list[int],
    device: torch.device,
) -> list[list[int]]:
    """
    One completion per row, with its end-of-sequence token if it ended.

    Args:
        model (`torch.nn.Module`):
            Unwrapped model, ready to generate.
        prompt_ids (`list[list[int]]`), seeds (`list[int]`):
            Prompt and seed of each row.
        args ([`~papertrl.PreferenceConfig`]):
            Temperature, filters, length and rows per forward.
        pad_token_id (`int`), eos_token_ids (`list[int]`):
            Special tokens.
        device (`torch.device`):
            That of the model's inputs.
    """
    # Similar lengths next to each other, so that little is padded
    order = sorted(range(len(prompt_ids)), key=lambda row: len(prompt_ids[row]))
    processors = distribution(args.online_temperature, args.online_top_k, args.online_top_p)
    drawn: dict[int, list[int]] = {}
    for start in range(0, len(order), args.online_batch_size):
        rows = order[start : start + args.online_batch_size]
        ids, mask = left_pad([prompt_ids[row] for row in rows], pad_token_id, device)
        input_ids, _, completion_mask = sample_completions(
            model,
            ids,
            mask,
            [seeds[row] for row in rows],
            args.online_max_new_tokens,
            pad_token_id,
            eos_token_ids,
            processors,
        )
        for row, tokens, kept in zip(rows, input_ids.tolist(), completion_mask.tolist(), strict=True):
            drawn[row] = [token for token, keep in zip(tokens, kept, strict=True) if keep]
    return [drawn[row] for row in range(len(prompt_ids))]
