"""Key-value caches of the rollout loop: written in place, and with each prompt's keys and values held once."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

# Layers whose rows can be exchanged: those that ours replace, and those that do it right themselves
_KNOWN = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    DynamicIndexedLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
)
_SMALLEST = 16


class GrowingLayer(DynamicLayer):
    """
    Key-value cache layer that writes in place into a buffer which doubles when full, up to `limit` positions.

    Holds and returns what transformers' dynamic layers would, without copying the cache at every step. Earlier
    returned tensors are views of the same buffer, so that it serves only where no gradient is kept.

    After [`share_prompts`], `keys` and `values` are those of positions after the prompt alone, and an
    [`~.layout.PromptLayout`] has to attend to the prompt's. Lengths and masks go on to count both.

    Args:
        limit (`int`):
            Positions that the layer will hold at most.
        window (`int`, *optional*):
            Positions that a token sees, itself included, as in
            [`~transformers.cache_utils.DynamicSlidingWindowLayer`].

    Attributes:
        prompt (`tuple` of two `torch.Tensor` of shape `(prompts, heads, width, head_dim)`, *optional*):
            Shared keys and values.
        first (`int`):
            Position of the first key that the last [`update`] made visible.
    """

    def __init__(self, limit: int, window: int | None = None):
        super().__init__()
        self.limit = limit
        self.window = window
        self.is_sliding = window is not None
        self.prompt: tuple[Tensor, Tensor] | None = None
        self.first = self._start = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        self.first = self.get_mask_sizes(0)[1]
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self._buffers = (key_states, value_states)
            end = key_states.shape[-2]
        else:
            start = self.keys.shape[-2]
            end = start + key_states.shape[-2]
            if end > self._buffers[0].shape[-2]:
                self._reallocate(key_states.shape[-2])
                start = self.keys.shape[-2]
                end = start + key_states.shape[-2]
            self._buffers[0][:, :, start:end] = key_states
            self._buffers[1][:, :, start:end] = value_states
        self._set_length(end)
        hidden = self.first - self._start
        if hidden <= 0:
            return self.keys, self.values
        return self.keys[:, :, hidden:], self.values[:, :, hidden:]

    def get_seq_length(self) -> int:
        return self._start + self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length = self.get_seq_length()
        first = 0 if self.window is None else max(length - self.window + 1, 0)
        return length - first + query_length, first

    def share_prompts(self, rows: int) -> None:
        """Take the positions so far as those of prompts, and go on with that many rows, which hold none."""
        self.prompt = self.keys, self.values
        self._start = self.keys.shape[-2]
        self._buffers = tuple(states.new_empty(rows, states.shape[1], 0, states.shape[3]) for states in self.prompt)
        self._set_length(0)

    def keep(self, rows: int, holes: Tensor, moved: Tensor) -> None:
        """Keep the first `rows` rows, after those at `moved` have taken the place of those at `holes`."""
        length = self.keys.shape[-2]
        for buffer in self._buffers:
            buffer[holes, :, :length] = buffer[moved, :, :length]
        self._buffers = tuple(buffer[:rows] for buffer in self._buffers)
        self._set_length(length)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._reallocate(1, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.keys.shape[0], device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.device))

    def _reallocate(self, more: int, indices: Tensor | None = None) -> None:
        """
        Move the cached positions, of all rows or those at `indices`, into buffers with room for some `more`.

        Those that no later token sees stay behind.
        """
        hidden = max(self.get_mask_sizes(0)[1] - self._start, 0)
        self._start += hidden
        length = self.keys.shape[-2] - hidden
        needed = length + more
        capacity = max(needed, min(max(2 * needed, _SMALLEST), self.limit - self._start))
        buffers = []
        for states in (self.keys, self.values):
            states = states[:, :, hidden:]
            rows = states.shape[0] if indices is None else len(indices)
            buffer = states.new_empty(rows, states.shape[1], capacity, states.shape[3])
            if indices is None:
                buffer[:, :, :length] = states
            else:
                torch.index_select(states, 0, indices, out=buffer[:, :, :length])
            buffers.append(buffer)
        self._buffers = tuple(buffers)
        self._set_length(length)

    def _set_length(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def unknown_layers(config: PreTrainedConfig) -> list[str]:
    """Types of layers in the cache of a model with that config whose rows we do not know how to exchange."""
    return sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers if type(layer) not in _KNOWN})


class RowCache(DynamicCache):
    """
    Cache whose rows are repeated and leave: transformers' for that config, attention in [`GrowingLayer`]s.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            That of a model for which [`unknown_layers`] finds none.
        limit (`int`):
            As in [`GrowingLayer`].
    """

    def __init__(self, config: PreTrainedConfig, limit: int):
        super().__init__(config=config)
        for i, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer:
                self.layers[i] = GrowingLayer(limit)
            elif type(layer) is DynamicSlidingWindowLayer:
                self.layers[i] = GrowingLayer(limit, layer.sliding_window)

    def repeat(self, source: Tensor, shared: bool) -> None:
        """
        Go on with rows that begin with the prompts read so far.

        Args:
            source (`torch.Tensor` of shape `(rows,)`):
                Prompt of each row.
            shared (`bool`):
                Whether rows share the keys and values of their prompt, where the layer can; else each has a copy.
        """
        for layer in self.layers:
            if shared and isinstance(layer, GrowingLayer):
                layer.share_prompts(len(source))
            else:
                layer.reorder_cache(source)

    def keep(self, kept: Tensor, holes: Tensor) -> None:
        """Keep the rows at `kept`, of which all but those at `holes` stay where they are."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.keep(len(kept), holes, kept[holes])
            else:
                layer.reorder_cache(kept)
