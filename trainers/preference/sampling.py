"""Completions sampled from the current policy inside a training step, the same whatever the number of processes."""

import hashlib
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from trl.trainer.utils import flush_left

from ...models.observation import causal_lm
from ...samplers.decoding.processors import RowProcessor
from ...samplers.decoding.rollout import sample_rollouts, supported, warn_of_generate


@dataclass
class SampledCompletions:
    """
    Prompts with completions drawn from the policy at temperature 1: `pairs · num_samples` rows, those of one prompt
    next to each other.

    Args:
        input_ids, attention_mask, completion_mask (`torch.Tensor` of shape `(rows, length)`):
            Right-padded token ids; 1 at real tokens; 1 at completion tokens, up to and with the first EOS.
        prompt_mask (`torch.Tensor` of shape `(rows,)`):
            0 for a row whose prompt is empty, which is not to be used.
        num_samples (`int`):
            Rows per prompt.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    prompt_mask: torch.Tensor
    num_samples: int


class KeyedGumbel(RowProcessor):
    """
    Adds to each row's scores noise from that row's own generator, so that greedy decoding samples from the softmax.

    argmax_v (s_v − log e_v), e_v ~ Exp(1), is distributed as softmax(s). A row's tokens depend on its seed and its
    scores alone: not on the other rows, the number of processes or the global generators.

    Args:
        seeds (`list[int]`):
            One per row.
        device (`torch.device`):
            That of the scores.
    """

    def __init__(self, seeds: list[int], device: torch.device):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._repeated = True

    def begin(self, prompt_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        self._repeated = False

    def select(self, rows: torch.Tensor) -> None:
        # What makes rows of prompts comes first, and the generators are those of rows
        if self._repeated:
            self.generators = [self.generators[row] for row in rows.tolist()]
        self._repeated = True

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        exponential = torch.empty_like(scores)
        for row, generator in zip(exponential, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - exponential.log()


def sample_seeds(
    seed: int, step: int, input_ids: torch.Tensor, attention_mask: torch.Tensor, num_samples: int
) -> list[int]:
    """
    Seeds that depend on the run's `seed`, the optimizer `step`, the pair and the sample's number.

    Args:
        seed (`int`), step (`int`):
            Of the run.
        input_ids, attention_mask (`torch.Tensor` of shape `(2·pairs, length)`):
            Chosen rows, then rejected ones.
        num_samples (`int`):
            Samples per pair.

    Returns:
        `list[int]` of length `pairs · num_samples`.
    """
    valid = attention_mask.bool().cpu()
    rows = [ids[mask].numpy().tobytes() for ids, mask in zip(input_ids.cpu(), valid, strict=True)]
    half = len(rows) // 2
    seeds = []
    for chosen, rejected in zip(rows[:half], rows[half:], strict=True):
        for i in range(num_samples):
            key = f"{seed} {step} {i} {len(chosen)} ".encode() + chosen + rejected
            seeds.append(int.from_bytes(hashlib.sha256(key).digest()[:7], "little"))
    return seeds


def left_padded_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Prompts of right-padded rows, padded on the left as generation wants them.

    Args:
        input_ids, attention_mask, completion_mask (`torch.Tensor` of shape `(rows, length)`):
            As in [`~papertrl.trainers.preference.record.PreferenceRecord`].
        pad_token_id (`int`):
            Fills the left.

    Returns:
        Token ids and mask of shape `(rows, prompt_length)`, and a mask of shape `(rows,)` that is 0 where the prompt
        is empty. Such a row keeps one unmasked padding token, so that every row can be generated from.
    """
    lengths = (attention_mask * (1 - completion_mask)).sum(1)
    width = max(1, int(lengths.max()))
    index = torch.arange(width, device=input_ids.device) - (width - lengths).unsqueeze(1)
    ids = input_ids.gather(1, index.clamp(min=0)).masked_fill(index < 0, pad_token_id)
    mask = (index >= 0).long()
    mask[:, -1] = 1
    return ids, mask, (lengths > 0).long()


def left_pad(
    prompt_ids: list[list[int]], pad_token_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Prompts as generation wants them.

    Args:
        prompt_ids (`list[list[int]]`):
            Prompts of at least one token.
        pad_token_id (`int`), device (`torch.device`):
            Fills the left; where the result is.

    Returns:
        Token ids and mask, `(rows, prompt_length)` each.
    """
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[pad_token_id] * (width - len(row)) + row for row in prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=device)
    return ids, mask


def distribution(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    """Processors that make the distribution to sample from, in transformers' order; none for the policy's own."""
    processors: list[LogitsProcessor] = []
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    return processors


def completions_until_eos(completion_ids: torch.Tensor, eos_token_ids: list[int]) -> torch.Tensor:
    """Mask of shape `(rows, time)`: 1 up to and with the first EOS token, or everywhere if there is none."""
    is_eos = torch.isin(completion_ids, torch.tensor(eos_token_ids, device=completion_ids.device)).long()
    return (is_eos.cumsum(1) - is_eos == 0).long()


@contextmanager
def plain_generation(model: nn.Module):
    """
    While active, `model.generate` follows the policy's own distribution: no dropout, and none of the penalties,
    filters or forced tokens that the model's generation config may hold.
    """
    lm = causal_lm(model)
    was_training, generation_config = model.training, lm.generation_config
    lm.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        lm.generation_config = generation_config
        model.train(was_training)


@torch.no_grad()
def sample_completions(
    model: nn.Module,
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    seeds: list[int],
    max_new_tokens: int,
    pad_token_id: int,
    eos_token_ids: list[int],
    processors: Sequence[LogitsProcessor] = (),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Draw one completion per row from the softmax of the model's logits, at temperature 1 over the whole vocabulary
    unless `processors` change it.

    Equal prompts that stand together are read once, where the rollout loop supports the model.

    Args:
        model (`nn.Module`):
            Unwrapped causal LM, with the adapter active that is to be sampled from.
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(rows, prompt_length)`):
            Left-padded prompts.
        seeds (`list[int]`):
            One per row, see [`KeyedGumbel`].
        max_new_tokens (`int`):
            Longest completion.
        pad_token_id (`int`), eos_token_ids (`list[int]`):
            Special tokens.
        processors (`Sequence[LogitsProcessor]`, *optional*):
            Change the logits before a token is drawn; see [`distribution`].

    Returns:
        `input_ids`, `attention_mask`, `completion_mask` as in [`SampledCompletions`].
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad_token_id, eos_token_id=eos_token_ids
    )
    every = LogitsProcessorList([*processors, KeyedGumbel(seeds, prompt_ids.device)])
    with plain_generation(model):
        if (reason := supported(model, config)) is None:
            rows = [ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask.bool(), strict=True)]
            groups = [(ids, len(list(same))) for ids, same in groupby(rows)]
            prompts, counts = map(list, zip(*groups, strict=True))
            found = sample_rollouts(model, prompts, counts, config, processors=every).completion_ids
            completion_ids = pad_sequence(list(map(torch.tensor, found)), batch_first=True, padding_value=pad_token_id)
            completion_ids = completion_ids.to(prompt_ids.device)
        else:
            warn_of_generate(reason)
            output_ids = model.generate(
                input_ids=prompt_ids, attention_mask=prompt_mask, generation_config=config, logits_processor=every
            )
            completion_ids = output_ids[:, prompt_ids.shape[1] :]
    until_eos = completions_until_eos(completion_ids, eos_token_ids)
    attention_mask = torch.cat([prompt_mask, until_eos], dim=1)
    completion_mask = torch.cat([torch.zeros_like(prompt_mask), until_eos], dim=1)
    attention_mask, input_ids, completion_mask = flush_left(
        attention_mask,
        torch.cat([prompt_ids, completion_ids], dim=1).masked_fill(attention_mask == 0, pad_token_id),
        completion_mask,
    )
    return input_ids, attention_mask, completion_mask
