"""A place in transformers' attention where a forward pass can put its own arrangement of queries and keys."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

_KEY = "attention_layout"


class AttentionLayout(Protocol):
    """Takes the place of a plain attention call, which it may make as often as it likes, on what it likes."""

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
        Args:
            attention (`Callable`):
                What the model would call (SDPA, eager, ...), with the other arguments.
            module (`nn.Module`):
                The attention layer.
            query (`torch.Tensor` of shape `(rows, heads, queries, head_dim)`), key, value (`torch.Tensor` of shape
                `(rows, key_value_heads, keys, head_dim)`): after positions are applied and the cache is updated.
            attention_mask (`torch.Tensor`, *optional*), kwargs: as the layer gives them (`scaling`, `dropout`,
                `sliding_window`, ...).

        Returns:
            Output `(rows, queries, heads, head_dim)`, and attention weights or `None`.
        """


def accept_layouts() -> None:
    """
    Let every model that calls its attention through transformers' interface take `attention_layout`, an
    [`AttentionLayout`], as a keyword of its forward.

    It travels with the keywords of the forward, so that a recomputation under gradient checkpointing sees it too.
    Calls without it are what they were.
    """
    plain = AttentionInterface.get_interface
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def get_interface(self, attn_implementation: str, default: Callable) -> Callable:
        return functools.partial(_dispatch, plain(self, attn_implementation, default))

    AttentionInterface.get_interface = get_interface


def _dispatch(attention: Callable, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    layout = kwargs.pop(_KEY, None)
    if layout is None:
        return attention(module, *args, **kwargs)
    return layout.attend(attention, module, *args, **kwargs)
