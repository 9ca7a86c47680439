"""A model that reads prompts, then one token per row at a time, with a cache whose rows may leave."""

import inspect
import logging
from collections.abc import Callable, Mapping
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...models.attention import accept_layouts
from .cache import RowCache
from .layout import PromptLayout

logger = logging.getLogger(__name__)

# What was found of a model, by question and implementation of attention
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[str, str], bool]] = WeakKeyDictionary()


def forward_arguments(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """Arguments of a model's forward."""
    return inspect.signature(model.forward).parameters


class RowForward:
    """
    Next-token logits, in float32, of rows that begin with prompts.

    Call [`prefill`], then [`repeat`], then [`decode`] as often as there are tokens, with [`keep`] in between.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        mask (`torch.Tensor` of shape `(prompts, width)`, *optional*):
            1 for tokens of the prompts, 0 for padding on the left; `None` without padding.
        width (`int`):
            Of the padded prompts.
        max_length (`int`):
            Longest row.
        shared (`bool`):
            Whether the rows of a prompt share its keys and values, see [`shares_prompts`].
    """

    def __init__(self, model: PreTrainedModel, mask: Tensor | None, width: int, max_length: int, shared: bool):
        self._model, self._shared = model, shared
        self._width = self._length = width
        self.cache = RowCache(model.config, limit=max_length - 1)
        arguments = forward_arguments(model)
        self._takes_positions = "position_ids" in arguments
        self._constants = {"use_cache": True, "past_key_values": self.cache}
        if "logits_to_keep" in arguments:
            self._constants["logits_to_keep"] = 1
        # Without padding all rows share their positions, and the attention kernels need no mask
        self._mask = None
        if mask is not None:
            self._mask = nn.functional.pad(mask, (0, max_length - width), value=1)
        self._positions = torch.tensor([[width - 1]], device=model.device) if mask is None else mask.sum(1, True) - 1

    @property
    def prompt_mask(self) -> Tensor | None:
        """The mask of the rows' prompts."""
        return None if self._mask is None else self._mask[:, : self._width]

    def prefill(self, prompts: Tensor) -> Tensor:
        """Logits after prompts of shape `(prompts, width)`."""
        if self._mask is None:
            positions = torch.arange(self._width, device=prompts.device).unsqueeze(0)
        else:
            positions = (self.prompt_mask.cumsum(1) - 1).clamp(min=0)
        return self._logits(prompts, positions)

    def repeat(self, source: Tensor) -> None:
        """Go on with a row for each prompt in `source`, of shape `(rows,)`."""
        self.cache.repeat(source, self._shared)
        if self._shared:
            self._constants["attention_layout"] = PromptLayout(self.cache, source)
        self._select(source)

    def decode(self, tokens: Tensor) -> Tensor:
        """Logits after a further token of each row, of shape `(rows, 1)`."""
        self._length += 1
        self._positions = self._positions + 1
        return self._logits(tokens, self._positions)

    def keep(self, kept: Tensor, holes: Tensor) -> None:
        """As in [`~.cache.RowCache.keep`]."""
        self.cache.keep(kept, holes)
        if self._shared:
            self._constants["attention_layout"].keep(kept.tolist())
        self._select(kept)

    def _select(self, rows: Tensor) -> None:
        if self._mask is not None:
            self._mask, self._positions = self._mask[rows], self._positions[rows]

    def _logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        inputs = dict(self._constants, input_ids=input_ids)
        if self._takes_positions:
            inputs["position_ids"] = positions
        if self._mask is not None:
            inputs["attention_mask"] = self._mask[:, : self._length]
        return self._model(**inputs).logits[:, -1].float()


def shares_prompts(model: PreTrainedModel) -> bool:
    """
    Whether the rows of a prompt can share its keys and values in this model's attention.

    Tried out once on a few tokens: the logits have to be those with copies.
    """
    accept_layouts()
    return _agree(model, "shared", lambda: _trial(model, shared=False), lambda: _trial(model, shared=True))


def keeps_rows(model: PreTrainedModel) -> bool:
    """
    Whether what a model remembers of each row is in its cache, so that rows may be repeated and leave.

    Tried out once on a few tokens: the logits have to be those without cache.
    """
    return _agree(model, "rows", lambda: _uncached(model), lambda: _trial(model, shared=False))


def _agree(model: PreTrainedModel, question: str, expected: Callable[[], Tensor], found: Callable[[], Tensor]) -> bool:
    known = _KNOWN.setdefault(model, {})
    key = question, str(model.config._attn_implementation)
    if key in known:
        return known[key]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        wanted, logits = expected(), found()
        apart = ((logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()
        known[key] = apart <= max(1e-4, 8 * torch.finfo(_coarsest(model)).eps)
    except Exception as error:
        logger.debug(f"{key} of {type(model).__name__}: {type(error).__name__}: {error}")
        known[key] = False
    finally:
        for module, training in modes:
            module.training = training
    return known[key]


def _few_tokens(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts, their mask, and two times a further token of three rows."""
    vocab, device = model.config.get_text_config().vocab_size, model.device
    ids = vocab // 4 + torch.arange(12, device=device) * (vocab // 2) // 12
    return ids[:6].view(2, 3), torch.tensor([[1, 1, 1], [0, 1, 1]], device=device), ids[6:].view(2, 3)


@torch.no_grad()
def _trial(model: PreTrainedModel, shared: bool) -> Tensor:
    """Logits of rows of both prompts after their last token; another row has left before."""
    prompts, mask, tokens = _few_tokens(model)
    forward = RowForward(model, mask, 3, 6, shared)
    with torch.autocast(model.device.type, enabled=False):
        forward.prefill(prompts)
        forward.repeat(torch.tensor([0, 0, 1], device=model.device))
        forward.decode(tokens[0].unsqueeze(1))
        forward.keep(torch.tensor([2, 1], device=model.device), torch.tensor([0], device=model.device))
        return forward.decode(tokens[1, :2].unsqueeze(1))


@torch.no_grad()
def _uncached(model: PreTrainedModel) -> Tensor:
    prompts, mask, tokens = _few_tokens(model)
    ids = torch.cat([prompts[[1, 0]], tokens[0, [2, 1]].unsqueeze(1), tokens[1, :2].unsqueeze(1)], dim=1)
    inputs = {"input_ids": ids, "attention_mask": nn.functional.pad(mask[[1, 0]], (0, 2), value=1)}
    if "position_ids" in forward_arguments(model):
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.autocast(model.device.type, enabled=False):
        return model(**inputs, use_cache=False).logits[:, -1].float()


def _coarsest(model: nn.Module) -> torch.dtype:
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    return max([*kinds, torch.float32], key=lambda kind: torch.finfo(kind).eps)
