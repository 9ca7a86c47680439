"""
Scoring completions of shared prompts: each distinct prompt runs through the model once, for all rows it begins.

The prompt's key-value cache is repeated over its rows, and gradients flow back through it, so that log-probabilities
and gradients are those of the plain forward. Rows run in buckets of similar length, and the LM head sees only the
positions that are scored.
"""

import functools
import inspect
import types
from dataclasses import dataclass
from itertools import pairwise

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from trl.kernels import ChunkedLogProbFunction

from .statistics import lm_head

_VOCAB_CHUNK = 32768
_MAX_BUCKETS = 8
# A further bucket has to save this many padded tokens to be worth the calls it adds
_BUCKET_COST = 64


@dataclass
class SharedPrefix:
    """
    Distinct prompts and the rows that begin with them.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(prompts, prompt_length)`):
            Prompts, padded on the left.
        position_ids (`torch.Tensor` of shape `(prompts, prompt_length)` or `(1, prompt_length)`):
            Positions of their tokens.
        index (`torch.Tensor` of shape `(rows,)`):
            Which prompt each row begins with.
        label_mask (`torch.Tensor` of shape `(rows, time)`, bool):
            Completion tokens to score.
        lengths (`list[int]` of length `rows`):
            Completion tokens of each row that are to be run: up to the last one that is scored.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    index: torch.Tensor
    label_mask: torch.Tensor
    lengths: list[int]


@dataclass
class SharedPrefixOutput:
    """
    Args:
        log_probs (`torch.Tensor` of shape `(rows, time)`):
            Log-probability of the completion tokens in nats, with gradient; 0 where not scored.
        entropy (`torch.Tensor` of shape `(rows, time)`):
            Entropy of the next-token distribution in nats; 0 where not scored.
        hidden_states (`torch.Tensor` of shape `(rows, time, hidden)`):
            Final hidden states at the positions that predict the completion tokens; 0 where not run.
    """

    log_probs: torch.Tensor
    entropy: torch.Tensor
    hidden_states: torch.Tensor


def why_not_shared(model: nn.Module) -> str | None:
    """
    Reason why prompts cannot be shared with this model, or `None`.

    A causal text model qualifies whose cache holds plain keys and values of all positions in every layer.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return "prompt-learning adapters put their own prefix into the cache"
    if base.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if base.config.get_text_config() is not base.config:
        return "the model is multimodal"
    if getattr(base, "_is_stateful", False):
        return "the model keeps a recurrent state instead of a cache"
    if "past_key_values" not in inspect.signature(base.base_model.forward).parameters:
        return f"{type(base).__name__} has no key-value cache"
    layer_types = getattr(base.config, "layer_types", None) or ["full_attention"]
    if set(layer_types) != {"full_attention"}:
        return f"its layers are of types {sorted(set(layer_types))}, and only full attention is supported"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=base.config).layers):
        return "its cache does not hold all positions of every layer"
    return None


def add_shared_prefix(model: PreTrainedModel, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False) -> None:
    """
    Let `model(input_ids, attention_mask, position_ids, shared_prefix=SharedPrefix(...))` score completions.

    `input_ids`, `attention_mask` and `position_ids` are then those of the completions alone, `(rows, time)` (or
    `(1, time)` for positions), and the answer is a [`SharedPrefixOutput`]. Any other call is what it was. A forward of
    its own, like TRL's fused LM head, so that wrappers such as DDP see a single call.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM; before it is wrapped with PEFT or after, unwrapped.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.
        cast_lm_head_to_fp32 (`bool`, *optional*, defaults to `False`):
            Whether the head runs in float32, outside autocast.
    """
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, shared_prefix: SharedPrefix | None = None, **kwargs):
        if shared_prefix is None:
            return plain_forward(*args, **kwargs)
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        hidden = _hidden_states(self.base_model, shared_prefix, **inputs)
        log_probs, entropy = _score(
            self, hidden, inputs["input_ids"], shared_prefix.label_mask, temperature, cast_lm_head_to_fp32
        )
        return SharedPrefixOutput(log_probs, entropy, hidden)

    model.forward = types.MethodType(forward, model)


def length_buckets(lengths: list[int]) -> list[list[int]]:
    """
    Split rows into buckets of similar length, so that little padding is left.

    Starts with one bucket and cuts where that saves most padded tokens, as long as it saves more than a call costs.

    Args:
        lengths (`list[int]`):
            Tokens of each row.

    Returns:
        `list[list[int]]`: row numbers, longest bucket first.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    ends = [0, len(order)]
    while len(ends) <= _MAX_BUCKETS:
        # Rows from `cut` to the end of its bucket would no longer be padded to the bucket's first row
        savings = [
            ((lengths[order[start]] - lengths[order[cut]]) * (end - cut), cut)
            for start, end in pairwise(ends)
            for cut in range(start + 1, end)
        ]
        saving, cut = max(savings, default=(0, 0))
        if saving <= _BUCKET_COST:
            break
        ends = sorted([*ends, cut])
    return [order[start:end] for start, end in pairwise(ends)]


def _hidden_states(
    backbone: nn.Module,
    prefix: SharedPrefix,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """Hidden states `(rows, time, hidden)` that predict the completion tokens."""
    first = backbone(
        input_ids=prefix.input_ids,
        attention_mask=prefix.attention_mask,
        position_ids=prefix.position_ids,
        use_cache=True,
    )
    last_state = first.last_hidden_state[:, -1]
    rows, time = input_ids.shape
    out = last_state.new_zeros(rows, time, last_state.shape[-1])
    pieces, places = [], []
    for bucket in length_buckets(prefix.lengths):
        chosen = torch.tensor(bucket, device=input_ids.device)
        source = prefix.index[chosen]
        length = prefix.lengths[bucket[0]]
        states = last_state[source].unsqueeze(1)
        if length > 1:
            cache = _select(first.past_key_values, source)
            positions = position_ids if position_ids.shape[0] == 1 else position_ids[chosen]
            rest = backbone(
                input_ids=input_ids[chosen, : length - 1],
                attention_mask=torch.cat([prefix.attention_mask[source], attention_mask[chosen, : length - 1]], dim=1),
                position_ids=positions[:, : length - 1],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            states = torch.cat([states, rest], dim=1)
        pieces.append(nn.functional.pad(states, (0, 0, 0, time - states.shape[1])))
        places.append(chosen)
    return out.index_copy(0, torch.cat(places), torch.cat(pieces))


def _select(cache: DynamicCache, rows: torch.Tensor) -> DynamicCache:
    """A cache of the given rows; unlike `batch_select_indices`, leaves the original as it is."""
    selected = DynamicCache()
    for i, layer in enumerate(cache.layers):
        selected.update(layer.keys[rows], layer.values[rows], i)
    return selected


def _score(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    cast_to_fp32: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    selected, autocast = hidden[mask], torch.is_autocast_enabled(hidden.device.type)
    with (
        torch.autocast(hidden.device.type, enabled=autocast and not cast_to_fp32),
        lm_head(model) as (weight, bias, scale, softcap),
    ):
        log_probs, entropy, *_ = ChunkedLogProbFunction.apply(
            selected.float() if cast_to_fp32 else selected,
            weight,
            bias,
            labels[mask],
            temperature,
            _VOCAB_CHUNK,
            softcap,
            scale,
            ("log_probs", "entropy"),
        )
    return tuple(values.new_zeros(mask.shape).masked_scatter(mask, values) for values in (log_probs, entropy))
