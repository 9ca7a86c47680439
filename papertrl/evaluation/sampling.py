"""Completions and their log-probabilities, in batches that fit the memory."""

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase, set_seed
from trl.trainer.utils import selective_log_softmax

from ..core.errors import JobError
from ..models.tokenization import end_tokens
from ..samplers.decoding.rollout import sample_rollouts, supported, warn_of_generate
from ..samplers.decoding.stopping import StopStrings
from .models import Loaded

# Neutral values of what decides how a token is drawn
GREEDY = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None}
# Rows of the first batch where the size is chosen automatically; it is halved until it fits
FIRST_BATCH_SIZE = 256
# Logits of one batch that are scored at a time, about 1 GB: the system kills a process that takes all memory, without
# an error that one could halve upon
MOST_LOGITS = 1 << 28


def in_batches(
    rows: list[Any],
    call: Callable[[list[Any]], Iterable[Any]],
    batch_size: int | None,
    bar: tqdm | None = None,
    first: int = FIRST_BATCH_SIZE,
) -> list[Any]:
    """
    Apply `call` to batches of rows and join what it returns.

    Args:
        rows (`list`):
            Rows.
        call (`Callable`):
            Rows of a batch → as many results.
        batch_size (`int`, *optional*):
            Rows at a time. Chosen automatically if unset: halved whenever memory does not suffice.
        bar (`tqdm`, *optional*):
            Progress bar to move by the number of rows.
        first (`int`, *optional*, defaults to `256`):
            Size to try first where it is chosen automatically.

    Raises:
        [`~papertrl.core.errors.JobError`]: if memory does not suffice for one row, or for the given size.
    """
    size = batch_size or first
    done: list[Any] = []
    while len(done) < len(rows):
        batch = rows[len(done) : len(done) + size]
        try:
            results = list(call(batch))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if batch_size is not None or size == 1:
                raise JobError(
                    f"Memory does not suffice for a batch of {size}. Set a smaller `--batch_size` or "
                    "`--max_new_tokens`, or leave `--batch_size` out to have it chosen."
                ) from error
            size = max(1, size // 2)
            continue
        done += results
        if bar is not None:
            bar.update(len(batch))
    return done


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of the device, is exhausted."""
    text = str(error).lower()
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in text or "can't allocate" in text
    )


def answer_config(
    tokenizer: PreTrainedTokenizerBase,
    ends: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> GenerationConfig:
    """
    How answers are generated: as [`~trl.GRPOTrainer`] samples, but greedily unless a temperature is given.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer.
        ends (`list[int]`):
            Tokens that end an answer, see [`~papertrl.models.tokenization.end_tokens`].
        max_new_tokens (`int`):
            Longest answer.
        temperature (`float`, *optional*, defaults to `0.0`), top_p (`float`, *optional*, defaults to `1.0`):
            Sampling; temperature 0 decodes greedily.
        options (`Mapping[str, Any]`, *optional*):
            Further options of generation, such as `stop_strings`.
    """
    draws = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else GREEDY
    return GenerationConfig(
        **{
            "max_new_tokens": max_new_tokens,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": ends,
            # TRL's, whatever the model's own generation config says
            "repetition_penalty": 1.0,
            **options,
            **draws,
        },
        disable_compile=True,
    )


def answer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Options of generation that a trainer's config sets for sampling in training, without those that say how to draw.

    Args:
        config (`Mapping[str, Any]`):
            Fields of the config by name, or those of them that `run.json` keeps.
    """
    given = config.get("generation_kwargs") or {}
    if config.get("repetition_penalty") is not None:
        given = {"repetition_penalty": config["repetition_penalty"], **given}
    return {name: value for name, value in given.items() if name not in (*GREEDY, "max_new_tokens")}


def complete(
    loaded: Loaded,
    prompt_ids: list[list[int]],
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    batch_size: int | None = None,
    bar: tqdm | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> list[list[list[int]]]:
    """
    Complete prompts.

    Greedy completions do not depend on the batch size (rounding aside); sampled ones are repeated by the same seed at
    the same batch size.

    Args:
        loaded ([`Loaded`]):
            Model.
        prompt_ids (`list[list[int]]`):
            Tokens of the prompts.
        samples (`int`):
            Completions per prompt.
        max_new_tokens (`int`):
            Longest completion.
        temperature (`float`), top_p (`float`):
            Sampling; temperature 0 decodes greedily.
        seed (`int`):
            Seed of the sampling.
        batch_size (`int`, *optional*), bar (`tqdm`, *optional*):
            As in [`in_batches`], in completions.
        options (`Mapping[str, Any]`, *optional*):
            As in [`answer_config`].

    Returns:
        `list[list[list[int]]]`: token ids of each prompt's completions, the end-of-sequence token included.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    ends = end_tokens(tokenizer, model.generation_config)
    config = answer_config(tokenizer, ends, max_new_tokens, temperature, top_p, options)
    set_seed(seed)
    rows = [ids for ids in prompt_ids for _ in range(samples)]
    flat = in_batches(rows, lambda batch: generate(model, tokenizer, batch, config), batch_size, bar)
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


@torch.no_grad()
def generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """
    One completion of each prompt, the end-of-sequence token included.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model, ready to generate.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompt_ids (`list[list[int]]`):
            Tokens of the prompts. Equal ones that stand together share their prefill.
        config ([`~transformers.GenerationConfig`]):
            From [`answer_config`].
    """
    if (reason := supported(model, config)) is None:
        groups = [(ids, len(list(same))) for ids, same in groupby(prompt_ids)]
        return sample_rollouts(
            model, *map(list, zip(*groups, strict=True)), config, tokenizer=tokenizer
        ).completion_ids
    warn_of_generate(reason)
    stops = config.stop_strings or model.generation_config.stop_strings
    told = {"tokenizer": tokenizer} if stops else {}
    width = max(map(len, prompt_ids))
    ids = torch.tensor([[config.pad_token_id] * (width - len(row)) + row for row in prompt_ids], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompt_ids], device=model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, **told)[:, width:].tolist()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    rows = [row[: next((i + 1 for i, t in enumerate(row) if t in ends), len(row))] for row in output]
    return StopStrings(stops, tokenizer).cut(prompt_ids, rows) if stops else rows


@torch.no_grad()
def completion_logps(
    model: Any, prompt_ids: list[list[int]], completion_ids: list[list[int]], batch_size: int | None = None
) -> list[list[float]]:
    """Log-probability, in nats, of each token of each completion at temperature 1."""

    def call(batch: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        rows = [torch.tensor(prompt + completion) for prompt, completion in batch]
        ids = pad_sequence(rows, batch_first=True).to(model.device)
        lengths = torch.tensor([len(row) for row in rows], device=model.device)
        mask = torch.arange(ids.shape[1], device=model.device) < lengths.unsqueeze(1)
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
        logps = selective_log_softmax(logits, ids[:, 1:]).tolist()
        return [row[len(p) - 1 : len(p) + len(c) - 1] for row, (p, c) in zip(logps, batch, strict=True)]

    pairs = list(zip(prompt_ids, completion_ids, strict=True))
    longest = max((len(p) + len(c) for p, c in pairs), default=1)
    logits = longest * model.config.get_text_config().vocab_size
    return in_batches(pairs, call, batch_size, first=max(1, min(FIRST_BATCH_SIZE, MOST_LOGITS // logits)))
