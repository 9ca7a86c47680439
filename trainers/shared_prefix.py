"""
Scoring completions of shared prompts: each distinct prompt runs through the model once, for all rows it begins.

The prompt's key-value cache is repeated over its rows, and gradients flow back through it, so that log-probabilities
and gradients are those of the plain forward. Rows run in buckets of similar length, and the LM head sees only the
positions that are scored.
"""

import functools
import types
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

from ..models.observation import lm_head

# In the order in which the kernel returns them
_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
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
        position_ids (`torch.Tensor` of shape `(prompts, prompt_length)` or `(1, prompt_length)`, *optional*):
            Positions of their tokens; `None` for those that the model makes itself.
        index (`torch.Tensor` of shape `(rows,)`):
            Which prompt each row begins with.
        label_mask (`torch.Tensor` of shape `(rows, time)`, bool):
            Completion tokens to score.
        lengths (`list[int]` of length `rows`):
            Completion tokens of each row that are to be run: up to the last one that is scored.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor | None
    index: torch.Tensor
    label_mask: torch.Tensor
    lengths: list[int]


@dataclass
class SharedPrefixOutput:
    """
    Args:
        scores (`dict[str, torch.Tensor]`):
            The fields of TRL's fused LM head that were asked for, `(rows, time)` each; 0 where not scored.
            `"log_probs"`, in nats, and `"entropy"` carry gradient.
        hidden_states (`torch.Tensor` of shape `(rows, time, hidden)`):
            Final hidden states at the positions that predict the completion tokens; 0 where not run.
    """

    scores: dict[str, torch.Tensor]
    hidden_states: torch.Tensor


def add_shared_prefix(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
) -> None:
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
        outputs (`tuple[str, ...]`, *optional*, defaults to `("log_probs", "entropy")`):
            Fields of [`SharedPrefixOutput`]'s scores; any of those of TRL's `add_fused_lm_head`.
    """
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, shared_prefix: SharedPrefix | None = None, **kwargs):
        if shared_prefix is None:
            return plain_forward(*args, **kwargs)
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        hidden = prefixed_states(self.base_model, shared_prefix=shared_prefix, **inputs)
        mask, labels = shared_prefix.label_mask, inputs["input_ids"]
        scores = _score(self, hidden[mask], labels[mask], temperature, cast_lm_head_to_fp32, outputs)
        # Connected to the model even if nothing is scored
        full = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in scores.items()}
        return SharedPrefixOutput(full, hidden)

    model.forward = types.MethodType(forward, model)


def shared_inputs(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    prompt_positions: torch.Tensor,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    completion_positions: torch.Tensor,
    labels: torch.Tensor,
    own_positions: bool = False,
) -> dict:
    """
    Inputs of a model with [`add_shared_prefix`] that score `labels` and compute each distinct prompt once.

    Columns that are padding in every row are cut off, where positions are given.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(rows, prompt_length)`):
            Prompts, padded on the left; each row has at least one prompt token.
        completion_ids, completion_mask (`torch.Tensor` of shape `(rows, time)`):
            Completions, padded on the right.
        prompt_positions, completion_positions (`torch.Tensor` of shape `(rows, ...)` or `(1, ...)`):
            Position ids of their tokens; those of equal prompts are equal.
        labels (`torch.Tensor` of shape `(rows, time)`, bool):
            Completion tokens to score.
        own_positions (`bool`, *optional*, defaults to `False`):
            As in [`~papertrl.trainers.sharing.Sharing`].
    """
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    # One transfer for everything that decides on shapes
    *lengths, widest = torch.cat([(labels * places).amax(1), prompt_mask.sum(1).amax().view(1)]).tolist()
    time, first = max(1, *lengths), 0 if own_positions else prompt_ids.shape[1] - widest
    mask = prompt_mask[:, first:]
    distinct, index = torch.unique(prompt_ids[:, first:].masked_fill(mask == 0, -1), dim=0, return_inverse=True)
    positions = None if own_positions else prompt_positions[:, first:]
    if positions is not None and positions.shape[0] > 1:
        positions = positions.new_empty(distinct.shape).index_copy_(0, index, positions)
    return {
        "input_ids": completion_ids[:, :time],
        "attention_mask": completion_mask[:, :time],
        "position_ids": None if own_positions else completion_positions[:, :time],
        "shared_prefix": SharedPrefix(
            input_ids=distinct.clamp(min=0),
            attention_mask=(distinct >= 0).to(prompt_mask.dtype),
            position_ids=positions,
            index=index,
            label_mask=labels[:, :time],
            lengths=lengths,
        ),
    }


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


def prefixed_states(
    backbone: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    shared_prefix: SharedPrefix,
) -> torch.Tensor:
    """Hidden states `(rows, time, hidden)` that predict the completion tokens."""
    prefix = shared_prefix
    given = {} if position_ids is None else {"position_ids": prefix.position_ids}
    first = backbone(input_ids=prefix.input_ids, attention_mask=prefix.attention_mask, use_cache=True, **given)
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
            if position_ids is not None:
                positions = position_ids if position_ids.shape[0] == 1 else position_ids[chosen]
                given = {"position_ids": positions[:, : length - 1]}
            rest = backbone(
                input_ids=input_ids[chosen, : length - 1],
                attention_mask=torch.cat([prefix.attention_mask[source], attention_mask[chosen, : length - 1]], dim=1),
                past_key_values=cache,
                use_cache=True,
                **given,
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
    temperature: float,
    cast_to_fp32: bool,
    outputs: tuple[str, ...],
) -> dict[str, torch.Tensor]:
    autocast = torch.is_autocast_enabled(hidden.device.type)
    with (
        torch.autocast(hidden.device.type, enabled=autocast and not cast_to_fp32),
        lm_head(model) as (weight, bias, scale, softcap),
    ):
        values = ChunkedLogProbFunction.apply(
            hidden.float() if cast_to_fp32 else hidden,
            weight,
            bias,
            labels,
            temperature,
            _VOCAB_CHUNK,
            softcap,
            scale,
            outputs,
        )
    return {name: value for name, value in zip(_FIELDS, values, strict=True) if name in outputs}
