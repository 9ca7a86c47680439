"""Whether and how a model's prompts can be shared: by its structure, then tried out on the model itself."""

import inspect
from dataclasses import dataclass

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..models.observation import causal_lm
from ..models.positions import length_limit
from .shared_prefix import add_shared_prefix, prefixed_states, shared_inputs

logger = get_logger(__name__)

# Tokens of the longest row on which sharing is tried out, and of the longest prompt among them
_LENGTH, _PROMPT = 12, 6


@dataclass(frozen=True)
class Sharing:
    """
    How prompts are shared with a model.

    Args:
        own_positions (`bool`):
            Whether the model makes its positions itself, from the attention mask or the length of the cache. Else they
            are given, and columns that are padding in every row are cut off.
        limit (`int`, *optional*):
            Longest row, padding included: beyond it, all tokens of a row turn by other angles.
    """

    own_positions: bool
    limit: int | None


def find_sharing(model: nn.Module, left_padded: bool) -> Sharing | str:
    """
    How prompts can be shared with this model, or the reason why not.

    Tried out on a few tokens: what comes out with shared prompts has to be what the plain forward computes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Unwrapped causal LM.
        left_padded (`bool`):
            Whether prompts are padded in the plain forward, on the left, or only rows, on the right.
    """
    if (reason := why_not_shared(model)) is not None:
        return reason
    lm = causal_lm(model)
    limit = length_limit(lm)
    if limit is not None and limit < _LENGTH:
        return "its rotary positions change with the length of the row"
    ways = [False, True] if "position_ids" in inspect.signature(lm.base_model.forward).parameters else [True]
    modes = [(module, module.training) for module in lm.modules()]
    lm.eval()
    try:
        for own_positions in ways:
            if _deviation(lm, left_padded, own_positions) <= _tolerance(lm):
                return Sharing(own_positions, limit)
    except Exception as error:
        return f"{type(lm).__name__} does not take up a cache ({type(error).__name__}: {error})"
    finally:
        for module, training in modes:
            module.training = training
    return f"with {type(lm).__name__}, states of a prompt depend on more than the prompt"


def why_not_shared(model: nn.Module) -> str | None:
    """
    Reason in the structure of a model why prompts cannot be shared with it, or `None`.

    A causal text model qualifies whose cache holds plain keys and values of all positions in every layer.
    """
    base = model.get_base_model() if is_peft_model(model) else model
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return "prompt-learning adapters put their own prefix into the cache"
    if base.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    if base.config.get_text_config() is not base.config:
        return "the model is multimodal"
    if getattr(base, "_is_stateful", False):
        return "the model keeps a recurrent state instead of a cache"
    if "past_key_values" not in inspect.signature(base.base_model.forward).parameters:
        return f"{type(base).__name__} has no key-value cache"
    layer_types = getattr(base.config, "layer_types", None) or ["full_attention"]
    if set(layer_types) != {"full_attention"}:
        return f"its layers are of types {sorted(set(layer_types))}, and only full attention is supported"
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=base.config).layers):
        return "its cache does not hold all positions of every layer"
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
        if self.args.gradient_checkpointing:
            reason = "gradient checkpointing turns off the cache that would hold them"
        elif self.is_deepspeed_enabled or self.is_fsdp_enabled:
            reason = "sharded parameters are gathered once per forward, and sharing takes several"
        else:
            found = {find_sharing(self.accelerator.unwrap_model(model), left_padded) for model in models}
            reason = next((one for one in found if isinstance(one, str)), None)
            if reason is None and len(found) > 1:
                reason = "the reference differs from the policy in how they could be shared"
        if reason is not None:
            logger.warning(f"Prompts are computed once per completion, as in TRL: {reason}.")
            return
        (self.sharing,) = found
        for model in models:
            add_shared_prefix(causal_lm(model), temperature, cast_lm_head_to_fp32, outputs)

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


@torch.no_grad()
def _deviation(model: PreTrainedModel, left_padded: bool, own_positions: bool) -> float:
    """Largest difference of states with shared prompts to those of the plain forward, relative to their length."""
    embedding = model.get_input_embeddings()
    vocab, device = embedding.weight.shape[0], embedding.weight.device
    padding = getattr(model.config, "pad_token_id", None) or 0
    prompts, time = torch.tensor([2, _PROMPT, 2, _PROMPT], device=device), _LENGTH - _PROMPT
    ids = vocab // 4 + torch.arange(4 * _LENGTH, device=device).view(4, -1) * vocab // (8 * _LENGTH)
    ids[2:, :_PROMPT] = ids[:2, :_PROMPT]
    lengths = torch.tensor([time, time - 1, time - 2, time], device=device)
    places = torch.arange(_LENGTH, device=device)
    before, after = _PROMPT - prompts.unsqueeze(1), _PROMPT + lengths.unsqueeze(1)
    mask = ((places >= before) & (places < after)).long()
    ids = torch.where(mask.bool() & (ids != padding), ids, torch.where(mask.bool(), vocab - 1, padding))
    positions, plain, start = places.unsqueeze(0), (ids, mask), torch.full_like(before, _PROMPT)
    if not left_padded:
        moved = (places + before).clamp(max=_LENGTH - 1)
        kept = (places < after - before).long()
        plain = ids.gather(1, moved).masked_fill(kept == 0, padding), kept
        positions, start = (places - before).clamp(min=0), prompts.unsqueeze(1)
    states = model.base_model(input_ids=plain[0], attention_mask=plain[1], use_cache=False).last_hidden_state
    expected = states[torch.arange(4, device=device).unsqueeze(1), start - 1 + places[:time]]
    parts = [value[:, part] for part in (slice(_PROMPT), slice(_PROMPT, None)) for value in (ids, mask, positions)]
    labels = mask[:, _PROMPT:].bool()
    found = prefixed_states(model.base_model, **shared_inputs(*parts, labels, own_positions))
    expected, found = expected[labels].float(), found[labels].float()
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def _tolerance(model: PreTrainedModel) -> float:
    """How much rounding may make of it."""
    kinds = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    coarsest = max([*(torch.finfo(kind).eps for kind in kinds), torch.finfo(torch.float32).eps])
    if getattr(model, "is_quantized", False):
        coarsest = max(coarsest, torch.finfo(torch.bfloat16).eps)
    return max(1e-4, 8 * coarsest)
