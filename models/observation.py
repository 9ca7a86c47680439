"""
Observing model passes, and what methods compute from them.

Methods need more of a forward pass than the log-probabilities that TRL's fused LM head returns. An observer collects
the hidden states of a pass that happens anyway, and `losses.head` makes the statistics from them in token chunks, so
that no `(batch, time, vocabulary)` tensor exists.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import maybe_gather_lm_head_ctx


class Pass(Enum):
    """Which forward pass an observer sees. A recomputation under gradient checkpointing is never observed."""

    OLD = "old"
    REFERENCE = "reference"
    GRADIENT = "gradient"
    PREFILL = "prefill"


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM under wrappers (DDP, PEFT)."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if is_peft_model(model) else model


def backbone(model: nn.Module) -> nn.Module:
    """The causal LM without its head."""
    return causal_lm(model).base_model


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """
    The decoder layers of a causal LM, in order.

    Raises:
        `ValueError`: if the model is not a stack of decoder layers.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for module in backbone(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"`{type(causal_lm(model)).__name__}` has no list of {depth} decoder layers, which this method reads. Use a "
        "decoder-only text model."
    )


def last_mlp(model: nn.Module) -> nn.Module:
    """
    The MLP block of the last decoder layer, whose input is the normalized residual stream.

    Raises:
        `ValueError`: if the model is not a stack of decoder layers that each have an `mlp`.
    """
    layer = decoder_layers(model)[-1]
    if not hasattr(layer, "mlp"):
        raise ValueError(
            f"The decoder layers of `{type(causal_lm(model)).__name__}` have no `mlp`, whose input this method reads. "
            "Use another model."
        )
    return layer.mlp


@dataclass
class Observation:
    """What an observer collected: one `(rows, time, hidden)` tensor per forward call of the observed pass."""

    which: Pass
    calls: list[torch.Tensor] = field(default_factory=list)

    def hidden_states(self, length: int | None = None) -> torch.Tensor:
        """
        The hidden states of all rows.

        Args:
            length (`int`, *optional*):
                Keep the positions that predict the last `length` tokens.

        Returns:
            `torch.Tensor` of shape `(batch, length or time, hidden)`.
        """
        if length is None:
            return torch.cat(self.calls)
        return torch.cat([call[:, -length - 1 : -1] for call in self.calls])


@contextmanager
def observe(module: nn.Module, which: Pass, inputs: bool = False):
    """
    Collect what `module` returns (or, with `inputs`, receives) while the context is active.

    Args:
        module (`nn.Module`):
            Usually [`backbone`] or [`last_mlp`] of a model.
        which (`Pass`):
            The pass that runs inside the context.
        inputs (`bool`, *optional*, defaults to `False`):
            Collect the module's input instead of its output.

    Yields:
        [`Observation`]. The tensors carry gradient if the pass does.
    """
    observation = Observation(which)

    def hook(_, args, kwargs, output):
        if inputs:
            observation.calls.append(args[0] if args else kwargs["hidden_states"])
        else:
            observation.calls.append(output.last_hidden_state if hasattr(output, "last_hidden_state") else output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield observation
    finally:
        handle.remove()


def gradients_apart(
    loss: torch.Tensor, parameters: list[nn.Parameter], retain_graph: bool = False
) -> tuple[torch.Tensor | None, ...]:
    """
    Gradients by a backward pass beside that of training, which nobody sees who observes the latter.

    They are not added to `grad`, are not averaged over ranks, and run no hooks of the parameters.

    Args:
        loss (`torch.Tensor`):
            A scalar.
        parameters (`list[nn.Parameter]`):
            With respect to which.
        retain_graph (`bool`, *optional*, defaults to `False`):
            Whether another backward pass through the same forward pass follows.

    Returns:
        One gradient per parameter, `None` for those that `loss` does not depend on.
    """
    hooks = [parameter._backward_hooks for parameter in parameters]
    for parameter in parameters:
        parameter._backward_hooks = None
    try:
        return torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    finally:
        for parameter, found in zip(parameters, hooks, strict=True):
            parameter._backward_hooks = found


def logit_transform(model: nn.Module) -> tuple[float, float | None]:
    """`logit_scale` and `softcap` that the architecture applies to its logits, in this order."""
    config = model.config.get_text_config()
    scale = next(
        (
            getattr(config, name)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(config, name, None) is not None
        ),
        None,
    )
    if scale is None:
        scaling = getattr(config, "logits_scaling", None) or 1.0
        scale = scaling if config.model_type == "hyperclovax" else 1.0 / scaling
    return scale, getattr(config, "final_logit_softcapping", None)


@contextmanager
def lm_head(model: nn.Module):
    """Yield `(weight, bias, logit_scale, softcap)` of the LM head, gathered if it is sharded."""
    model = causal_lm(model)
    head = model.get_output_embeddings()
    weight, bias = head.weight, head.bias
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    with maybe_gather_lm_head_ctx(weight, bias):
        yield weight, bias, *logit_transform(model)
