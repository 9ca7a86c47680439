"""A key-value cache that is not copied at every decoding step."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """
    Key-value cache layer that writes in place into a buffer which doubles when full, up to `limit` positions.

    Holds and returns what a [`~transformers.cache_utils.DynamicLayer`] would, without copying the cache at every
    step. Earlier returned tensors are views of the same buffer, so that it serves only where no gradient is kept.

    Args:
        limit (`int`):
            Positions that the layer will hold at most.
    """

    def __init__(self, limit: int):
        super().__init__()
        self.limit = limit

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.is_initialized = True
            self._buffers = (key_states, value_states)
            end = key_states.shape[-2]
        else:
            start = self.keys.shape[-2]
            end = start + key_states.shape[-2]
            if end > self._buffers[0].shape[-2]:
                self._reallocate(end)
            self._buffers[0][:, :, start:end] = key_states
            self._buffers[1][:, :, start:end] = value_states
        self._set_length(end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self._reallocate(self.keys.shape[-2] + 1, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.keys.shape[0], device=self.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.device))

    def _reallocate(self, needed: int, indices: Tensor | None = None) -> None:
        """Move the cached positions, of all rows or those at `indices`, into buffers with room for `needed`."""
        length = self.keys.shape[-2]
        capacity = max(needed, min(2 * needed, self.limit))
        buffers = []
        for states in (self.keys, self.values):
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
