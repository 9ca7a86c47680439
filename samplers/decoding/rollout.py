"""Group rollouts on the transformers backend: one prefill per prompt, and finished rows leave the decoding batch."""

import functools
import inspect
import logging
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation import GenerationMode, StoppingCriteriaList
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from ...models.positions import length_limit
from .cache import unknown_layers
from .forward import RowForward, forward_arguments, keeps_rows, shares_prompts
from .processors import RowProcessor
from .weights import packed_weights

logger = logging.getLogger(__name__)

# A model that has its own version of one of these generates in a way that the loop below does not know. Taken on
# import, so that what is put in their place later is found out too
_STANDARD = {
    name: inspect.getattr_static(GenerationMixin, name)
    for name in (
        "generate",
        "prepare_inputs_for_generation",
        "_sample",
        "_prefill",
        "_prepare_cache_for_generation",
        "_prepare_position_ids_for_generation",
        "_update_model_kwargs_for_generation",
    )
}
_PEFT_GENERATE = [inspect.getattr_static(kind, "generate") for kind in (PeftModel, PeftModelForCausalLM)]
# Options of `GenerationConfig` that change how tokens are drawn, with the values that do not
_NEUTRAL = {
    "cache_implementation": (None, "dynamic"),
    "use_cache": (None, True),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1, 1.0),
    "token_healing": (None, False),
    "prefill_chunk_size": (None,),
    "watermarking_config": (None,),
}

_BLOCK = 256


@dataclass(frozen=True)
class Rollouts:
    """
    Sampled completions, grouped by prompt in the order of the prompts.

    Args:
        completion_ids (`list[list[int]]`):
            Tokens of each completion, up to and including the one that ended it (end-of-sequence, or the last of a
            stop string); never padding.
        logprobs (`list[list[float]]`):
            Log-probability of each of these tokens, in nats, under the processed (tempered, filtered, penalized)
            distribution.
        prefill_tokens (`int`):
            Prompt positions that went through the model, padding included.
        decode_row_steps (`int`):
            Completion positions that went through the model: rows in the decoding batch, summed over its steps.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    prefill_tokens: int
    decode_row_steps: int


def supported(model: torch.nn.Module, generation_config: GenerationConfig) -> str | None:
    """
    Why [`sample_rollouts`] cannot stand in for `model.generate`, or `None` if it can.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model in the state in which it would generate: TRL's `unwrap_model_for_generation` switches
            gradient checkpointing off, so that the question is to be asked inside of it.
        generation_config ([`~transformers.GenerationConfig`]):
            What `generate` would be called with.
    """
    if isinstance(model, PeftModel):
        if (reason := _peft_reason(model)) is not None:
            return reason
        model = model.get_base_model()
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return f"`{name}` is not a transformers model that generates"
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    sharded = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
    if sharded and distributed and torch.distributed.get_world_size() > 1:
        return "the model is sharded, so that every rank must take the same number of decoding steps"
    if model.config.is_encoder_decoder:
        return f"`{name}` is an encoder-decoder"
    if model.is_remote_code():
        return f"`{name}` is remote code"
    if "past_key_values" not in forward_arguments(model) or not model._supports_default_dynamic_cache():
        return f"the forward of `{name}` takes no `past_key_values`"
    for method, standard in _STANDARD.items():
        if inspect.getattr_static(model, method) is not standard:
            return f"`{name}` has its own `{method}`"
    if unusual := unknown_layers(model.config):
        return f"the cache of `{name}` has layers of type {', '.join(unusual)}"
    if model._is_stateful and not keeps_rows(model):
        return f"`{name}` keeps states of rows outside of its cache"
    if length_limit(model) is not None:
        return f"the rotary positions of `{name}` change with the length of the longest row, and rows leave"
    if model.is_activation_checkpointing and model.training:
        return "gradient checkpointing is on, with which the layers keep no cache"
    return _config_reason(model._prepare_generation_config(generation_config)[0])


@functools.cache
def warn_of_generate(reason: str) -> None:
    """Say, once for each `reason` that [`supported`] gave, that `generate` samples instead."""
    logger.warning(f"Completions are sampled by `generate`: {reason}.")


def _peft_reason(model: PeftModel) -> str | None:
    configs = [model.peft_config[adapter] for adapter in model.active_adapters]
    if any(config.is_prompt_learning for config in configs):
        return "the adapter is of the prompt-learning kind, which adds to the cache"
    if any(isinstance(config, LoraConfig) and config.alora_invocation_tokens is not None for config in configs):
        return "the adapter is an activated LoRA, which depends on the position in the prompt"
    # The tuner has none, and passes it on to the model
    tuner = inspect.getattr_static(model.base_model, "generate", None)
    if inspect.getattr_static(model, "generate") not in _PEFT_GENERATE or tuner is not None:
        return f"`{type(model).__name__}` has its own `generate`"
    if type(model.base_model).forward is not BaseTuner.forward:
        return f"`{type(model.base_model).__name__}` has its own forward"
    return None


def _config_reason(config: GenerationConfig) -> str | None:
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        return f"the generation mode is {mode.value.replace('_', ' ')}"
    for option, neutral in _NEUTRAL.items():
        if (value := getattr(config, option)) not in neutral:
            return f"`{option}` is {value!r}"
    if config.pad_token_id is None and config.eos_token_id is None:
        return "neither `pad_token_id` nor `eos_token_id` is set"
    return None


@torch.no_grad()
def sample_rollouts(
    model: torch.nn.Module,
    prompt_ids: list[list[int]],
    counts: list[int],
    generation_config: GenerationConfig,
    *,
    processors: LogitsProcessorList | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Rollouts:
    """
    Sample several completions of each prompt, by the law of `model.generate`.

    Each prompt goes through the model once, and its rows share its keys and values where [`~.forward.shares_prompts`]
    finds that they can; else each has a copy. A row leaves the decoding batch when it has finished. Scores are
    processed, and rows stopped, by the very processors and criteria that `generate` builds from the config. The law
    is the same; the random numbers are not: a seed fixes the tokens, to others than it would with `generate`.

    Where dropout is active, the completions of one prompt see it processed with the same dropout noise; each on its
    own still follows the law of `generate`.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped model for which [`supported`] has no objection; runs in its own dtype and mode.
        prompt_ids (`list[list[int]]`):
            Prompts, each with at least one token.
        counts (`list[int]`):
            Completions of each prompt.
        generation_config ([`~transformers.GenerationConfig`]):
            As for `generate`; options that it leaves open are the model's, then transformers' defaults.
        processors ([`~transformers.LogitsProcessorList`], *optional*):
            Further processors, in the place that `generate` gives them. They see the rows still in the batch: each
            must treat a row by its tokens and scores alone, or be a [`~.processors.RowProcessor`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Needed for `stop_strings`.

    Returns:
        [`Rollouts`]: `sum(counts)` rows, all completions of the first prompt, then all of the second, and so on.

    Raises:
        `ValueError`: if `counts` does not match `prompt_ids`, or a prompt is empty.
    """
    if len(counts) != len(prompt_ids) or any(count < 0 for count in counts):
        raise ValueError(f"`counts` must be one number >= 0 per prompt ({len(prompt_ids)} of them), got {counts!r}.")
    if not all(prompt_ids):
        raise ValueError("Every prompt in `prompt_ids` must have at least one token, got an empty one.")
    wanted = [(ids, count) for ids, count in zip(prompt_ids, counts, strict=True) if count]
    if not wanted:
        return Rollouts([], [], 0, 0)
    prompt_ids, counts = map(list, zip(*wanted, strict=True))
    if isinstance(model, PeftModel):
        # Adapters are inside of it: what `PeftModel.generate` calls as well
        model = model.get_base_model()

    config = model._prepare_generation_config(generation_config)[0]
    model._prepare_special_tokens(config, True, device=model.device)
    prompts, mask = _left_pad(prompt_ids, config._pad_token_tensor, model.device)
    width = prompts.shape[1]
    _set_lengths(model, config, generation_config, prompts)
    criteria = model._get_stopping_criteria(config, StoppingCriteriaList(), tokenizer)

    forward = RowForward(model, mask, width, config.max_length, shares_prompts(model))
    readers = [processor for processor in processors or () if isinstance(processor, RowProcessor)]
    for reader in readers:
        reader.begin(prompts, forward.prompt_mask)
    source = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(model.device)
    logits = forward.prefill(prompts)[source]
    forward.repeat(source)
    for reader in readers:
        reader.select(source)
    batch = _Batch.start(prompts[source], config)
    finished = _Batch.start(prompts[source], config)

    def build_processors() -> LogitsProcessorList:
        # Some hold a value per row, hence anew whenever rows leave
        return model._get_logits_processor(
            config,
            input_ids_seq_length=width,
            encoder_input_ids=batch.sequences[:, :width],
            logits_processor=processors,
            device=model.device,
            model_kwargs={"attention_mask": forward.prompt_mask},
        )

    process = build_processors()
    row_steps = 0
    with model._optimize_model_for_decode(), packed_weights(model):
        for end in range(width, config.max_length):
            batch.append(process(batch.sequences[:, :end], logits), end, config)
            batch.done |= criteria(batch.sequences[:, : end + 1], None)
            done = batch.done.tolist()
            if all(done):
                break
            if any(done):
                finished.write(batch)
                kept, holes = _close_gaps(done, model.device)
                batch.select(kept)
                forward.keep(kept, holes)
                for reader in readers:
                    reader.select(kept)
                process = build_processors()
            logits = forward.decode(batch.sequences[:, end : end + 1])
            row_steps += len(batch.done)
    finished.write(batch)
    lengths = finished.lengths.tolist()
    return Rollouts(
        [row[:length] for row, length in zip(finished.sequences[:, width:].tolist(), lengths, strict=True)],
        [row[:length] for row, length in zip(finished.logprobs[:, width:].tolist(), lengths, strict=True)],
        prefill_tokens=prompts.numel(),
        decode_row_steps=row_steps,
    )


def _close_gaps(done: list[bool], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that go on, the last ones in place of those that do not, and the places that they take."""
    going = [row for row, finished in enumerate(done) if not finished]
    holes = [row for row, finished in enumerate(done[: len(going)]) if finished]
    kept = list(range(len(going)))
    for hole, moved in zip(holes, going[len(going) - len(holes) :], strict=True):
        kept[hole] = moved
    return torch.tensor(kept, device=device), torch.tensor(holes, dtype=torch.long, device=device)


def draw(probabilities: Tensor) -> Tensor:
    """
    One index per row, drawn from its probabilities.

    On the CPU, `torch.multinomial` draws an exponential per entry, which for a vocabulary of 50k costs as much as a
    small model's forward. There the cumulative distribution is inverted instead, first over blocks of the vocabulary
    and then within the block drawn, in float64: an entry of probability 0 is never drawn, and no small one is lost.

    Args:
        probabilities (`torch.Tensor` of shape `(rows, vocab)`):
            Non-negative and finite, with a positive sum in each row.

    Returns:
        `torch.Tensor` of shape `(rows, 1)`, int64.

    Raises:
        `ValueError` on the CPU: if a row is not finite.
    """
    if probabilities.device.type != "cpu":
        return torch.multinomial(probabilities, num_samples=1)
    rows, vocab = probabilities.shape
    blocks = torch.nn.functional.pad(probabilities, (0, -vocab % _BLOCK)).view(rows, -1, _BLOCK)
    block = _invert(blocks.sum(dim=-1))
    return block * _BLOCK + _invert(blocks[torch.arange(rows), block.squeeze(1)])


def _invert(weights: Tensor) -> Tensor:
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    if not torch.isfinite(cumulative[:, -1]).all():
        raise ValueError("The next-token probabilities are not finite: the model's weights have diverged.")
    uniform = torch.rand(len(weights), 1, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)


def _left_pad(prompt_ids: list[list[int]], pad_token_id: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts of shape `(prompts, width)`, and their attention mask where any position is padding."""
    width = max(len(ids) for ids in prompt_ids)
    prompts = pad_token_id.repeat(len(prompt_ids), width).cpu()
    mask = torch.zeros(len(prompt_ids), width, dtype=torch.long)
    for row, ids in enumerate(prompt_ids):
        prompts[row, width - len(ids) :] = torch.tensor(ids)
        mask[row, width - len(ids) :] = 1
    return prompts.to(device), None if bool(mask.all()) else mask.to(device)


def _set_lengths(
    model: PreTrainedModel, config: GenerationConfig, given: GenerationConfig, prompts: Tensor
) -> GenerationConfig:
    """Resolve `max_length` and `min_length` of `config`, in place, from what the caller has `given`."""
    default_max = given.max_length is None and model.generation_config.max_length is None
    default_min = given.min_length is None and model.generation_config.min_length is None
    width = prompts.shape[1]
    model._prepare_generated_length(config, default_max, default_min, "input_ids", width, prompts)
    model._validate_generated_length(config, width, default_max)
    return config


class _Batch:
    """
    Tokens of the rows being decoded. All tensors have these rows as their first dimension.

    Args:
        index: rows among all rows.
        sequences, logprobs: `(rows, max_length)`, tokens of prompt and completion, log-probabilities.
        lengths: completion tokens so far.
        done: whether the row has finished; its sequence then goes on with padding.
    """

    def __init__(self, index: Tensor, sequences: Tensor, logprobs: Tensor, lengths: Tensor, done: Tensor):
        self.index, self.sequences, self.logprobs = index, sequences, logprobs
        self.lengths, self.done = lengths, done

    @classmethod
    def start(cls, prompts: Tensor, config: GenerationConfig) -> "_Batch":
        rows, width = prompts.shape
        index = torch.arange(rows, device=prompts.device)
        sequences = config._pad_token_tensor.repeat(rows, config.max_length)
        sequences[:, :width] = prompts
        logprobs = torch.zeros(sequences.shape, device=prompts.device)
        return cls(index, sequences, logprobs, torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool))

    def append(self, scores: Tensor, end: int, config: GenerationConfig) -> None:
        """Draw the token at position `end` of every row from its processed `scores`."""
        probabilities = scores.softmax(dim=-1)
        token = draw(probabilities) if config.do_sample else scores.argmax(dim=-1, keepdim=True)
        self.logprobs[:, end : end + 1] = probabilities.gather(1, token).log()
        self.sequences[:, end] = torch.where(self.done, config._pad_token_tensor, token.squeeze(1))
        self.lengths += ~self.done

    def select(self, kept: Tensor) -> None:
        """Keep the rows at `kept`."""
        for name, tensor in vars(self).items():
            setattr(self, name, tensor[kept])

    def write(self, batch: "_Batch") -> None:
        """Take over the rows of `batch`."""
        for name, tensor in vars(self).items():
            tensor[batch.index] = getattr(batch, name)
