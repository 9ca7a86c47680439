"""Attention of single tokens to a prompt that their rows have in common, and to what each row has of its own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .cache import GrowingLayer, RowCache

# What attention calls carry that either the mask says as well, or that concerns other implementations
_HARMLESS = {
    *("sliding_window", "is_causal", "position_ids", "output_attentions", "output_hidden_states", "use_cache"),
    *("return_dict", "output_router_logits"),
}


class PromptLayout:
    """
    [`~papertrl.models.attention.AttentionLayout`] of a decoding step whose cache shares prompts.

    All rows of a prompt attend to its keys in one product, then to their own, with one softmax over both. Layers that
    hold a copy for each row are left alone.

    Args:
        cache ([`~.cache.RowCache`]):
            Right after [`~.cache.RowCache.repeat`].
        source (`torch.Tensor` of shape `(rows,)`):
            Prompt of each row.
    """

    def __init__(self, cache: RowCache, source: Tensor):
        self._cache = cache
        self._source = source.tolist()
        self._device = source.device
        self._prompts = 1 + max(self._source)
        self._arrange()

    def keep(self, kept: list[int]) -> None:
        """Keep the rows at `kept`."""
        self._source = [self._source[row] for row in kept]
        self._arrange()

    def _arrange(self) -> None:
        """Say which place of a `(prompts, rows of a prompt)` table each row takes, and which row stands there."""
        live = sorted(set(self._source))
        if len(live) < self._prompts:
            for layer in self._shared():
                layer.prompt = tuple(states[live] for states in layer.prompt)
            self._source = [live.index(prompt) for prompt in self._source]
            self._prompts = len(live)
        counts = [0] * self._prompts
        ranks = []
        for prompt in self._source:
            ranks.append(counts[prompt])
            counts[prompt] += 1
        self._largest = max(counts)
        places = [prompt * self._largest + rank for prompt, rank in zip(self._source, ranks, strict=True)]
        self._places = self._rows = None
        if places != list(range(self._prompts * self._largest)):
            self._places = torch.tensor(places, device=self._device)
            self._rows = torch.zeros(self._prompts * self._largest, dtype=torch.long, device=self._device)
            self._rows[self._places] = torch.arange(len(places), device=self._device)

    def _shared(self) -> list[GrowingLayer]:
        layers = [layer for layer in self._cache.layers if isinstance(layer, GrowingLayer)]
        return [layer for layer in layers if layer.prompt is not None]

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """`(rows, heads, groups, size)` as `(prompts * heads, rows of a prompt * groups, size)`."""
        if self._rows is not None:
            rows = rows.index_select(0, self._rows)
        table = rows.view(self._prompts, self._largest, *rows.shape[1:]).transpose(1, 2)
        return table.reshape(self._prompts * rows.shape[1], self._largest * rows.shape[2], rows.shape[3])

    def _by_row(self, table: Tensor, groups: int) -> Tensor:
        """The reverse of [`_by_prompt`]."""
        table = table.view(self._prompts, -1, self._largest, groups, table.shape[-1]).transpose(1, 2)
        rows = table.flatten(0, 1)
        return rows if self._places is None else rows.index_select(0, self._places)

    def attend(
        self,
        attention: Callable[..., tuple[Tensor, Tensor | None]],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """
        As in [`~papertrl.models.attention.AttentionLayout`].

        Raises:
            `NotImplementedError`: if the call is not of a kind that is known here.
        """
        layer = self._cache.layers[module.layer_idx]
        if getattr(layer, "prompt", None) is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        scaling, dropout = kwargs.pop("scaling", None), kwargs.pop("dropout", 0.0)
        unknown = [name for name, given in kwargs.items() if given is not None and name not in _HARMLESS]
        if unknown or not (attention is sdpa_attention_forward or attention.__name__ == "eager_attention_forward"):
            raise NotImplementedError(f"an attention call of {attention} with {unknown}")
        prompt_keys, prompt_values = (states[:, :, layer.first :] for states in layer.prompt)
        width, own = prompt_keys.shape[2], key.shape[2]
        rows, heads, queries, size = query.shape
        shared = prompt_keys.shape[1]
        groups = heads // shared
        mask = attention_mask
        if queries != 1 or key.shape[1] != shared or (mask is not None and mask.shape[1:] != (1, 1, width + own)):
            raise NotImplementedError(
                f"queries of shape {query.shape} to keys of {key.shape}, prompts of {prompt_keys.shape}"
            )
        query = query.reshape(rows, shared, groups, size) * (size**-0.5 if scaling is None else scaling)
        scores = torch.bmm(query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)).view(rows, shared, groups, own)
        # A window may have left the prompt behind
        if width:
            to_prompt = torch.bmm(self._by_prompt(query), prompt_keys.flatten(0, 1).transpose(1, 2))
            scores = torch.cat([self._by_row(to_prompt, groups), scores], dim=-1)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        shares = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        shares = nn.functional.dropout(shares, dropout) if dropout else shares
        output = torch.bmm(shares[..., width:].flatten(0, 1), value.flatten(0, 1)).view(rows, shared, groups, -1)
        if width:
            found = torch.bmm(self._by_prompt(shares[..., :width]), prompt_values.flatten(0, 1))
            output += self._by_row(found, groups)
        return output.view(rows, 1, heads, -1), None
