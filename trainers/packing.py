"""
Rows that begin alike as one sequence without padding: every shared prefix once, then what follows it.

A token attends to what comes before it in its own rows, and to nothing else. Queries, keys and values of the sequence
are gathered into a few attention calls, of stretches that are about as long; everything else in the model sees each
token once and no padding. There is no cache, so that gradient checkpointing and sharded parameters are served as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

# Pairs of a query and a key that a further attention call has to save
_CALL_COST = 1 << 15
_MAX_CALLS = 8
# Tokens that sharing what completions of one prompt begin with has to save
_BRANCH_COST = 32


@dataclass
class Stretch:
    """
    Adjacent tokens that the same rows have, after the same tokens.

    Args:
        row, start, end (`int`):
            They are the tokens from `start` to `end` of this row, counted without padding.
        rows (`list[int]`):
            All rows that have them.
        before (`list[Stretch]`):
            The stretches that precede it, first to last.
        offset (`int`):
            Its place in the sequence.
    """

    row: int
    start: int
    end: int
    rows: list[int]
    before: list["Stretch"] = field(default_factory=list)
    offset: int = 0

    def __len__(self) -> int:
        return self.end - self.start

    def places(self) -> np.ndarray:
        return np.arange(self.offset, self.offset + len(self))


@dataclass
class Packing:
    """
    Rows packed into one sequence of `tokens` tokens. An [`~papertrl.models.attention.AttentionLayout`].

    Args:
        input_ids, position_ids (`torch.Tensor` of shape `(1, tokens)`):
            Of the sequence.
        places (`torch.Tensor` of shape `(rows, time)`):
            Where the sequence has each token of the rows; 0 for padding and for what is not computed.
        labels (`torch.Tensor` of shape `(rows, time)`, bool):
            Tokens to score.
        label_ids, scored (`torch.Tensor` of shape `(labels,)`):
            These tokens, row by row, and where the sequence has those that predict them.
        calls (`list[AttentionCall]`):
            What attends to what.
        order (`torch.Tensor` of shape `(tokens,)`):
            Where the concatenated outputs of `calls` have each token.
        stretches (`list[Stretch]`):
            What the sequence is made of, in its order.
    """

    input_ids: Tensor
    position_ids: Tensor
    places: Tensor
    labels: Tensor
    label_ids: Tensor
    scored: Tensor
    calls: list["AttentionCall"]
    order: Tensor
    stretches: list[Stretch]

    def attend(
        self,
        attention: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        tokens = [states.transpose(1, 2).flatten(2).squeeze(0) for states in (query, key, value)]
        widths = [states.shape[-1] for states in (query, key, value)]
        if is_flash_attention_requested(module.config):
            keys, lengths = self._ragged
            parts = [
                states.index_select(0, keys).view(1, len(keys), -1, width).transpose(1, 2)
                for states, width in zip(tokens[1:], widths[1:], strict=True)
            ]
            return attention(module, query, *parts, None, sliding_window=sliding_window, **lengths, **kwargs)
        kind = module.config._attn_implementation
        outputs = []
        for call in self.calls:
            parts = [
                states.index_select(0, index).view(call.rows, -1, states.shape[-1] // width, width).transpose(1, 2)
                for states, width, index in zip(tokens, widths, (call.queries, call.keys, call.keys), strict=True)
            ]
            mask = call.mask(sliding_window, kind == "sdpa")
            if mask is not None and kind != "sdpa":
                mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(
                    ~mask, torch.finfo(query.dtype).min
                )
            outputs.append(attention(module, *parts, mask, sliding_window=sliding_window, **kwargs)[0])
        flat = torch.cat([output.flatten(0, 1).flatten(1) for output in outputs])
        return flat.index_select(0, self.order).view(1, len(self.order), query.shape[1], -1), None

    @cached_property
    def _ragged(self) -> tuple[Tensor, dict[str, Any]]:
        """Keys of all stretches without padding, and what kernels for ragged rows want to know of both sides."""
        device = self.order.device
        keys = np.concatenate([part.places() for s in self.stretches for part in (*s.before, s)])
        ends: dict[str, Any] = {}
        for side, lengths in (("q", [len(s) for s in self.stretches]), ("k", [s.end for s in self.stretches])):
            ends[f"cu_seq_lens_{side}"] = _tensor(np.cumsum([0, *lengths]), device).int()
            ends[f"max_length_{side}"] = max(lengths)
        return _tensor(keys, device), ends


@dataclass
class AttentionCall:
    """
    One attention call over stretches that are about as long, each with what precedes it as its keys.

    Args:
        rows (`int`):
            Stretches.
        queries (`torch.Tensor` of shape `(rows * longest,)`), keys (`torch.Tensor` of shape `(rows * longest_keys,)`):
            Their places in the sequence; some place where a stretch is shorter.
        before (`torch.Tensor` of shape `(rows, 1)`):
            Tokens that precede each.
        first (`bool`):
            Whether nothing precedes any.
    """

    rows: int
    queries: Tensor
    keys: Tensor
    before: Tensor
    first: bool

    def mask(self, window: int | None, causal_by_default: bool) -> Tensor | None:
        """
        Which keys each query sees, `(rows, 1, longest, longest_keys)`, bool.

        Args:
            window (`int`, *optional*):
                Last positions that are seen, its own included.
            causal_by_default (`bool`):
                Whether attention without a mask is causal; there is none then where it says the same.
        """
        longest, keys = len(self.queries) // self.rows, len(self.keys) // self.rows
        if window is not None and window >= keys:
            window = None
        if self.first and causal_by_default and window is None:
            return None
        places = torch.arange(max(longest, keys), device=self.keys.device)
        at = (self.before + places[:longest]).unsqueeze(2)
        seen = places[:keys] <= at
        if window is not None:
            # Beyond the end of a stretch, where nothing is read, some key is seen all the same
            seen &= places[:keys] > at.clamp(max=keys - 1) - window
        return seen.unsqueeze(1)


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_lengths: Tensor,
    labels: Tensor,
    count_padding: bool = True,
    whole: bool = False,
) -> Packing:
    """
    Pack rows for a pass that scores `labels`.

    Each distinct prompt is computed once, and so is what completions of one prompt have in common at their beginning,
    if that saves enough. Tokens after the last label of a row are left out.

    Args:
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, time)`):
            Tokens, padded on the left, on the right or on both sides.
        prompt_lengths (`torch.Tensor` of shape `(rows,)`):
            Tokens of each row that are its prompt, at least one.
        labels (`torch.Tensor` of shape `(rows, time)`, bool):
            Tokens of completions to score.
        count_padding (`bool`, *optional*, defaults to `True`):
            Whether the model counts padding on the left as positions.
        whole (`bool`, *optional*, defaults to `False`):
            Whether tokens of a row from its last label on are computed too.

    Returns:
        [`Packing`].
    """
    device = input_ids.device
    # One transfer for everything that decides on shapes
    numbers = torch.stack([input_ids, attention_mask, labels.to(input_ids.dtype)]).cpu().numpy()
    (ids, mask, scored), prompts = numbers, prompt_lengths.cpu().numpy()
    scored = scored.astype(bool)
    time = ids.shape[1]
    places = np.arange(time)
    first = mask.argmax(1)
    last = (mask * places).max(1) + 1
    ends = (scored * (places + 1)).max(1) - 1
    # Something has to be computed, for the result to be connected to the model
    computed = last > 0 if whole else ends > 0
    computed[: not computed.any()] = True
    ends = np.where(whole | (ends < 0), last, ends) - first

    rows = [ids[row, first[row] : first[row] + max(ends[row], 1)] for row in range(len(ids))]
    shift = first if count_padding else np.zeros_like(first)
    stretches = _stretches(rows, prompts, shift, np.flatnonzero(computed).tolist())
    positions, found, offset = [], np.zeros_like(ids), 0
    for stretch in stretches:
        stretch.offset, offset = offset, offset + len(stretch)
        positions.append(np.arange(stretch.start, stretch.end) + shift[stretch.row])
        for row in stretch.rows:
            found[row, first[row] + stretch.start : first[row] + stretch.end] = stretch.places()
    sequence = np.concatenate([rows[s.row][s.start : s.end] for s in stretches])
    calls, order = _calls(stretches, len(sequence), device)
    return Packing(
        input_ids=_tensor(sequence, device).unsqueeze(0),
        position_ids=_tensor(np.concatenate(positions), device).unsqueeze(0),
        places=_tensor(found, device),
        labels=labels,
        label_ids=_tensor(ids[scored], device),
        scored=_tensor(found[:, :-1][scored[:, 1:]], device),
        calls=calls,
        order=order,
        stretches=stretches,
    )


def _stretches(rows: list[np.ndarray], prompts: np.ndarray, shift: np.ndarray, computed: list[int]) -> list[Stretch]:
    """Prompts, then what follows them, parents before children."""
    groups: dict[tuple[bytes, int], list[int]] = {}
    for row in computed:
        groups.setdefault((rows[row][: prompts[row]].tobytes(), int(shift[row])), []).append(row)
    roots = [Stretch(group[0], 0, int(prompts[group[0]]), group) for group in groups.values()]
    found = list(roots)
    for root in roots:
        _branch(rows, root.rows, root.end, root.end, [root], found)
    return found


def _branch(
    rows: list[np.ndarray], members: list[int], start: int, equal: int, before: list[Stretch], found: list[Stretch]
) -> None:
    """Append the stretches from `start` on of the rows `members`, which are known to be the same up to `equal`."""
    if len(members) == 1:
        [row] = members
        if len(rows[row]) > start:
            found.append(Stretch(row, start, len(rows[row]), members, before))
        return
    shortest = min(len(rows[row]) for row in members)
    stacked = np.stack([rows[row][equal:shortest] for row in members])
    differing = (stacked != stacked[0]).any(0)
    equal = equal + int(differing.argmax()) if differing.any() else shortest
    if (equal - start) * (len(members) - 1) >= _BRANCH_COST:
        found.append(Stretch(members[0], start, equal, members, before))
        start, before = equal, [*before, found[-1]]
    # Rows that go on alike may have more in common
    parts: dict[int, list[int]] = {}
    for row in members:
        parts.setdefault(int(rows[row][equal]) if len(rows[row]) > equal else -1 - row, []).append(row)
    for part in parts.values():
        _branch(rows, part, start, equal, before, found)


def _calls(stretches: list[Stretch], tokens: int, device: torch.device) -> tuple[list[AttentionCall], Tensor]:
    calls, order, offset = [], np.empty(tokens, dtype=np.int64), 0
    for first in (True, False):
        chosen = [stretch for stretch in stretches if (not stretch.before) == first]
        for numbers in call_buckets([(len(stretch), stretch.end) for stretch in chosen]):
            members = [chosen[i] for i in numbers]
            queries = np.zeros((len(members), max(map(len, members))), dtype=np.int64)
            keys = np.zeros((len(members), max(stretch.end for stretch in members)), dtype=np.int64)
            for i, stretch in enumerate(members):
                queries[i, : len(stretch)] = stretch.places()
                for part in (*stretch.before, stretch):
                    keys[i, part.start : part.end] = part.places()
                order[stretch.places()] = offset + i * queries.shape[1] + np.arange(len(stretch))
            offset += queries.size
            before = np.array([[stretch.start] for stretch in members])
            indices = (_tensor(values, device) for values in (queries.reshape(-1), keys.reshape(-1), before))
            calls.append(AttentionCall(len(members), *indices, first))
    return calls, _tensor(order, device)


def call_buckets(sizes: list[tuple[int, int]]) -> list[list[int]]:
    """
    Divide stretches into attention calls.

    A call has its longest stretch's queries and its most keys for each of its stretches. Starting with a single call,
    one is cut where that saves most pairs of query and key, as long as it saves more than a call costs.

    Args:
        sizes (`list[tuple[int, int]]`):
            Queries and keys of each stretch.

    Returns:
        `list[list[int]]`: numbers of the stretches in each call.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i], reverse=True)
    ordered = np.array([sizes[i] for i in order]).reshape(-1, 2)
    ends = [0, len(order)]
    while len(ends) <= _MAX_CALLS:
        saving, cut = max((_best_cut(ordered, *part) for part in pairwise(ends)), default=(0, 0))
        if saving <= _CALL_COST:
            break
        ends = sorted([*ends, cut])
    return [order[start:end] for start, end in pairwise(ends) if end > start]


def _best_cut(sizes: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """Pairs that are saved by cutting the stretches from `start` to `end` at the best place, and this place."""
    if end - start < 2:
        return 0, start
    queries, keys = sizes[start:end].T
    forth, back = np.maximum.accumulate(keys), np.maximum.accumulate(keys[::-1])[::-1]
    count = np.arange(1, end - start)
    cost = count * queries[0] * forth[:-1] + (end - start - count) * queries[1:] * back[1:]
    best = int(cost.argmin())
    return int((end - start) * queries[0] * forth[-1] - cost[best]), start + best + 1


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(device, non_blocking=True)
