"""Whether and how a model's prompts can be shared: by its structure, then tried out on the model itself."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, is_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.generic import is_flash_attention_requested

from ..models.attention import accept_layouts
from ..models.observation import causal_lm
from ..models.positions import length_limit
from .packed_forward import add_packed_forward, packed_states
from .packing import Packing, pack

logger = get_logger(__name__)

# Tokens of the longest row on which sharing is tried out, and of the longest prompt among them
_LENGTH, _PROMPT = 12, 6


@dataclass(frozen=True)
class Sharing:
    """
    How prompts are shared with a model.

    Args:
        count_padding (`bool`):
            Whether the model counts padding on the left as positions.
        limit (`int`, *optional*):
            Longest row, padding included: beyond it, all tokens of a row turn by other angles.
    """

    count_padding: bool
    limit: int | None


def find_sharing(model: nn.Module, left_padded: bool) -> Sharing | str:
    """
    How prompts can be shared with this model, or the reason why not.

    Tried out on a few tokens: what comes out of packed rows has to be what the plain forward computes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped causal LM.
        left_padded (`bool`):
            Whether rows are padded on the left, or only on the right.
    """
    if (reason := why_not_shared(model)) is not None:
        return reason
    lm = causal_lm(model)
    limit = length_limit(lm)
    if limit is not None and limit < _LENGTH:
        return "its rotary positions change with the length of the row"
    accept_layouts()
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        # Kernels of flash attention know half precision alone
        half = torch.autocast(lm.device.type, torch.bfloat16, enabled=is_flash_attention_requested(lm.config))
        with _gathered(lm), half:
            for count_padding in (True, False) if left_padded else (True,):
                deviation, windows = _try_out(lm, left_padded, count_padding)
                if windows != _windows(lm):
                    return f"{type(lm).__name__} does not call every attention through transformers' interface"
                if deviation <= _tolerance(lm):
                    return Sharing(count_padding, limit)
    except Exception as error:
        return f"{type(lm).__name__} does not take packed rows ({type(error).__name__}: {error})"
    finally:
        for module, training in modes:
            module.training = training
    return f"with {type(lm).__name__}, states of a prompt depend on more than the prompt"


def why_not_shared(model: nn.Module) -> str | None:
    """
    Reason in the structure of a model why prompts cannot be shared with it, or `None`.

    A causal text model qualifies whose layers attend to all tokens before, or to a window of them.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    if is_peft_model(model):
        configs = [model.peft_config[name] for name in model.active_adapters]
        if any(config.is_prompt_learning for config in configs):
            return "prompt-learning adapters put their own prefix before the prompt"
        if any(getattr(config, "alora_invocation_tokens", None) is not None for config in configs):
            return "activated LoRA depends on the place in the row"
    if base.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if base.config.get_text_config() is not base.config:
        return "the model is multimodal"
    if getattr(base, "_is_stateful", False):
        return "the model keeps a recurrent state, which only its own kernels pass on"
    kinds = {type(layer).__name__ for layer in DynamicCache(config=base.config).layers}
    if unknown := kinds - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}:
        return f"it has layers whose state is kept in {sorted(unknown)}, and only attention is supported"
    kind = base.config._attn_implementation
    if kind not in ("sdpa", "eager") and not is_flash_attention_requested(base.config):
        return f"its attention implementation is {kind!r}, not 'sdpa', 'eager' or flash attention"
    return None


class SharesPrompts:
    """
    Mixin of the family bases that can share prompts: decides, and says why where it does not.

    Attributes:
        sharing ([`Sharing`], *optional*):
            How prompts are shared, if they are.
    """

    sharing: Sharing | None = None

    def _set_up_sharing(
        self, temperature: float, cast_lm_head_to_fp32: bool, outputs: tuple[str, ...], left_padded: bool
    ) -> None:
        if not self.args.share_prompts:
            return
        models = [model for model in (self.model, self.ref_model) if model is not None]
        found = {find_sharing(self.accelerator.unwrap_model(model), left_padded) for model in models}
        reason = next((one for one in found if isinstance(one, str)), None)
        if reason is None and len(found) > 1:
            reason = "the reference differs from the policy in how they could be shared"
        # Under FSDP, ranks other than the first may not have the weights yet
        reason, found = broadcast_object_list([reason, found])
        if reason is not None:
            logger.warning(f"Prompts are computed once per completion, as in TRL: {reason}.")
            return
        (self.sharing,) = found
        for model in models:
            add_packed_forward(causal_lm(model), temperature, cast_lm_head_to_fp32, outputs)

    def shares(self, length: int) -> bool:
        """Whether rows of this length, padding included, share their prompts."""
        if self.sharing is None:
            return False
        within = self.sharing.limit is None or length <= self.sharing.limit
        if not within and not self._warned_of_length:
            self._warned_of_length = True
            logger.warning(
                f"Prompts of rows longer than {self.sharing.limit} tokens are computed once per completion, as in "
                "TRL: the rotary positions of the model change there."
            )
        return within

    _warned_of_length = False


@dataclass
class _Witness:
    """Attends as the packing does, and remembers the window of each layer that asked."""

    packing: Packing
    windows: dict[int, int | None] = field(default_factory=dict)

    def attend(
        self, attention: Callable, module: nn.Module, *args: Any, sliding_window: int | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        self.windows[module.layer_idx] = sliding_window
        return self.packing.attend(attention, module, *args, sliding_window=sliding_window, **kwargs)


def _windows(model: PreTrainedModel) -> dict[int, int | None]:
    """The window of each layer as its cache has it."""
    layers = DynamicCache(config=model.config).layers
    if not layers:
        return dict.fromkeys(range(model.config.num_hidden_layers))
    return {i: getattr(layer, "sliding_window", None) for i, layer in enumerate(layers)}


@contextmanager
def _gathered(model: nn.Module):
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            yield
        return
    # TRL shards a reference when the trainer is built, and the policy when it trains
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


@torch.no_grad()
def _try_out(model: PreTrainedModel, left_padded: bool, count_padding: bool) -> tuple[float, dict[int, int | None]]:
    """
    Largest difference of the states of packed rows to those of the plain forward, relative to their length, and the
    windows of the layers that attended.
    """
    embedding = model.get_input_embeddings()
    vocab, device = embedding.weight.shape[0], embedding.weight.device
    padding = getattr(model.config, "pad_token_id", None) or 0
    prompts, time = torch.tensor([2, _PROMPT, 2, _PROMPT], device=device), _LENGTH - _PROMPT
    lengths = prompts + torch.tensor([time, time - 1, time - 2, time], device=device)
    places = torch.arange(_LENGTH, device=device)
    before = (_PROMPT - prompts if left_padded else torch.zeros_like(prompts)).unsqueeze(1)
    mask = (places >= before) & (places < before + lengths.unsqueeze(1))
    in_prompt = mask & (places < before + prompts.unsqueeze(1))
    ids = vocab // 4 + torch.arange(4 * _LENGTH, device=device).view(4, -1) * vocab // (8 * _LENGTH)
    ids = torch.where(in_prompt, ids.roll(2, 0).minimum(ids), ids)
    # No token is the one that pads
    ids = torch.where(mask, torch.where(ids == padding, vocab - 1, ids), padding)
    labels = mask & ~in_prompt
    states = model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
    expected = states[:, :-1][labels[:, 1:]].float()
    witness = _Witness(pack(ids, mask.long(), prompts, labels, count_padding))
    found = packed_states(model.base_model, witness.packing, witness)[witness.packing.scored].float()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item(), witness.windows


def _tolerance(model: PreTrainedModel) -> float:
    """How much rounding may make of it."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    coarsest = max([*(torch.finfo(kind).eps for kind in kinds), torch.finfo(torch.float32).eps])
    if getattr(model, "is_quantized", False) or is_flash_attention_requested(model.config):
        coarsest = max(coarsest, torch.finfo(torch.bfloat16).eps)
    return max(1e-4, 8 * coarsest)
