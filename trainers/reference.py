"""The frozen initial model: a copy, or the trained model without its adapter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head, use_adapter

REFERENCE_ADAPTER = "ref"


def frozen_copy(model: PreTrainedModel, accelerator: Accelerator, deepspeed: bool, fsdp: bool) -> nn.Module:
    """
    Copy of `model` as it is now, without gradient and in evaluation mode, prepared for inference beside it.

    Args:
        model (`~transformers.PreTrainedModel`):
            Has a fused LM head and is not yet wrapped for training.
        accelerator (`~accelerate.Accelerator`):
            Prepares the copy.
        deepspeed, fsdp (`bool`):
            Whether the model is trained with DeepSpeed or FSDP.
    """
    copy = deepcopy(model)
    # The copied forward still closes over the original model
    del copy.forward
    add_fused_lm_head(copy)
    copy.requires_grad_(False).eval()
    if deepspeed:
        return prepare_deepspeed(copy, accelerator)
    if fsdp:
        return prepare_fsdp(copy, accelerator)
    return accelerator.prepare_model(copy, evaluation_mode=True)


def keep_adapter(model: PeftModel) -> None:
    """Add a frozen copy of the active adapter, named `"ref"` as in TRL's DPO trainer, unless there is one."""
    if REFERENCE_ADAPTER in model.peft_config:
        return
    active = model.active_adapter
    weights = {name: w.clone() for name, w in get_peft_model_state_dict(model, adapter_name=active).items()}
    model.add_adapter(REFERENCE_ADAPTER, deepcopy(model.peft_config[active]))
    set_peft_model_state_dict(model, weights, adapter_name=REFERENCE_ADAPTER)


@contextmanager
def trainable_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards, what takes gradients now takes them again: PEFT freezes all adapters but the one it switches to."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def as_reference(model: nn.Module, unwrapped: nn.Module) -> Iterator[nn.Module]:
    """
    Make `model` behave as the reference: no gradient, evaluation mode, and, if it is a PEFT model, under the `"ref"`
    adapter if it has one and without adapter otherwise.

    Args:
        model (`nn.Module`):
            The model to call, possibly wrapped.
        unwrapped (`nn.Module`):
            The same without the wrappers of distributed training.
    """
    adapter = nullcontext()
    if is_peft_model(unwrapped):
        adapter = use_adapter(unwrapped, REFERENCE_ADAPTER if REFERENCE_ADAPTER in unwrapped.peft_config else None)
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), adapter:
            yield model
    finally:
        for module in training:
            module.training = True
