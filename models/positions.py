"""Up to which length a model's positions are those of its tokens alone."""

import copy
import inspect

import torch
from torch import nn

# Longer than any context of today
_LONGEST = 1 << 24


@torch.no_grad()
def length_limit(model: nn.Module) -> int | None:
    """
    Longest sequence up to which no token turns by another angle because of tokens after it; `None` without bound.

    Some rotary embeddings choose their frequencies by the length of the whole sequence. Copies of the model's own are
    asked, so that nothing depends on the name of such a rule.

    Args:
        model (`nn.Module`):
            Model with modules that hold inverse frequencies, or without.
    """
    limits = [limit for module in model.modules() for limit in _limits(module)]
    return min(limits, default=None)


def _limits(module: nn.Module) -> list[int]:
    frequencies = [value for name, value in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
    arguments = inspect.signature(module.forward).parameters
    if not frequencies or "position_ids" not in arguments:
        return []
    kinds = [{}]
    if "layer_type" in arguments and isinstance(getattr(module, "rope_type", None), dict):
        kinds = [{"layer_type": kind} for kind in module.rope_type]
    return [limit for kind in kinds if (limit := _limit(module, frequencies[0].device, kind)) is not None]


def _limit(module: nn.Module, device: torch.device, kind: dict[str, str]) -> int | None:
    def unchanged(length: int) -> bool:
        return all(map(torch.equal, _angles(module, device, kind, _LONGEST, length), short))

    try:
        short = _angles(module, device, kind, 4)
        low, high = 0, _LONGEST
        if unchanged(high):
            return None
    except Exception:  # an embedding of another kind, of which nothing is known
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if unchanged(middle) else (low, middle)
    return low


def _angles(module: nn.Module, device: torch.device, kind: dict[str, str], *lengths: int) -> list[torch.Tensor]:
    """What the first tokens turn by after sequences of `lengths`, of which some embeddings remember the longest."""
    module = copy.deepcopy(module)
    for length in lengths:
        places = torch.tensor([[0, 1, 2, length - 1]], device=device)
        turned = module(torch.zeros(1, 4, 1, device=device), position_ids=places, **kind)
    return [part[:, :3] for part in (turned if isinstance(turned, tuple) else (turned,))]
