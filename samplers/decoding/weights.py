"""Products of few rows with large weights, which on the CPU take half the time with the weights laid out for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

# Smaller weights stay in the processor's cache, where their layout does not matter
_SMALLEST = 1 << 16
# The packed weights stand beside the model's own
_MOST_BYTES = 4 << 30
# Rows that the layout is chosen for; it serves others as well
_ROWS = 8


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """
    While active, large linear layers on the CPU multiply by copies of their weights in the layout of oneDNN.

    For passes without gradient, with weights that stay as they are. Layers in other dtypes than float32, under
    autocast or with a forward of their own are left alone, and so are models with more than 4 GiB of such weights.

    Args:
        model (`nn.Module`):
            Any model; hooks of its layers are called as ever.
    """
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    layers = _large(model) if known and not torch.is_autocast_enabled("cpu") else []
    if sum(layer.weight.nbytes for layer in layers) > _MOST_BYTES:
        layers = []
    try:
        for layer in layers:
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), _ROWS)
            layer.forward = partial(_multiply, packed, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _large(model: nn.Module) -> list[nn.Linear]:
    return [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
        and module.weight.numel() >= _SMALLEST
    ]


def _multiply(packed: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
