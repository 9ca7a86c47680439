"""Scoring packed rows: one forward through the model, and its LM head at the positions that are scored."""

import functools
import types
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction

from ..models.attention import AttentionLayout, accept_layouts
from ..models.observation import lm_head
from .packing import Packing

# In the order in which the kernel returns them
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Vocabulary entries at a time: on the CPU, so few that a tile of logits is read back from the cache
_VOCAB_CHUNK = {"cpu": 8192}
_WIDEST_CHUNK = 32768


@dataclass
class PackedOutput(ModelOutput):
    """
    A [`~transformers.utils.ModelOutput`], in which wrappers such as FSDP and DeepSpeed find the tensors.

    Args:
        scores (`dict[str, torch.Tensor]`):
            The fields of TRL's fused LM head that were asked for, `(rows, time)` each, at the tokens they are about;
            0 where not scored. `"log_probs"`, in nats, and `"entropy"` carry gradient.
        states (`torch.Tensor` of shape `(tokens, hidden)`):
            Final hidden states of the sequence.
    """

    scores: dict[str, Tensor] | None = None
    states: Tensor | None = None


def add_packed_forward(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs", "entropy"),
) -> None:
    """
    Let `model(packing=Packing(...))` score the labels of packed rows; it answers with a [`PackedOutput`].

    Any other call is what it was. A forward of its own, like TRL's fused LM head, so that wrappers such as DDP and
    FSDP see a single call.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal LM; before it is wrapped with PEFT or after, unwrapped.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.
        cast_lm_head_to_fp32 (`bool`, *optional*, defaults to `False`):
            Whether the head runs in float32, outside autocast.
        outputs (`tuple[str, ...]`, *optional*, defaults to `("log_probs", "entropy")`):
            Fields of the scores; any of those of TRL's `add_fused_lm_head`.
    """
    accept_layouts()
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, packing: Packing | None = None, **kwargs):
        if packing is None:
            return plain_forward(*args, **kwargs)
        states = packed_states(self.base_model, packing)
        labels = packing.labels
        scores = _score(self, states[packing.scored], packing.label_ids, temperature, cast_lm_head_to_fp32, outputs)
        # Connected to the model even if nothing is scored
        full = {name: value.new_zeros(labels.shape).masked_scatter(labels, value) for name, value in scores.items()}
        return PackedOutput(full, states)

    model.forward = types.MethodType(forward, model)


def packed_states(backbone: nn.Module, packing: Packing, layout: AttentionLayout | None = None) -> Tensor:
    """Hidden states `(tokens, hidden)`; `layout` stands in for the packing where it attends."""
    return backbone(
        input_ids=packing.input_ids,
        # What is 4-D already, models pass on as it is
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.input_ids.device),
        position_ids=packing.position_ids,
        use_cache=False,
        attention_layout=layout or packing,
    ).last_hidden_state.squeeze(0)


def _score(
    model: PreTrainedModel,
    hidden: Tensor,
    labels: Tensor,
    temperature: float,
    cast_to_fp32: bool,
    outputs: tuple[str, ...],
) -> dict[str, Tensor]:
    autocast = torch.is_autocast_enabled(hidden.device.type)
    with (
        torch.autocast(hidden.device.type, enabled=autocast and not cast_to_fp32),
        lm_head(model) as (weight, bias, scale, softcap),
    ):
        values = ChunkedLogProbFunction.apply(
            hidden.float() if cast_to_fp32 else hidden,
            weight,
            bias,
            labels,
            temperature,
            min(_VOCAB_CHUNK.get(hidden.device.type, _WIDEST_CHUNK), weight.shape[0]),
            softcap,
            scale,
            outputs,
        )
    return {name: value for name, value in zip(FIELDS, values, strict=True) if name in outputs}
