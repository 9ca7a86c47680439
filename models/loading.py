"""Models as their checkpoints hold them: none that is partly random passes for a trained one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import is_fsdp_enabled


@contextmanager
def whole_checkpoints(new_head: bool = False) -> Iterator[None]:
    """
    Inside, `from_pretrained` refuses a checkpoint that lacks weights of the model that is made of it.

    `transformers` draws such weights at random, and warns: of a damaged checkpoint, or of a language model that is
    loaded as a reward model. An adapter that brings the weights counts.

    Args:
        new_head (`bool`, *optional*, defaults to `False`):
            Whether the head on the model may be new, since it is about to be trained.

    Raises:
        `ValueError`: from `from_pretrained`, naming the model and the weights.
    """
    given = PreTrainedModel.__dict__["from_pretrained"]

    def from_pretrained(cls, name, *args, output_loading_info=False, **kwargs):
        model, info = given.__get__(None, cls)(name, *args, output_loading_info=True, **kwargs)
        # Where weights are shared out, one process has them all
        if not (is_fsdp_enabled() or is_deepspeed_zero3_enabled()):
            refuse_new_weights(model, str(name), info["missing_keys"], new_head)
        return (model, info) if output_loading_info else model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)
    try:
        with warnings.catch_warnings():
            # PEFT's way to say that an adapter's file lacks weights
            warnings.filterwarnings("error", message="Found missing adapter keys")
            yield
    except UserWarning as warning:
        raise ValueError(" ".join(str(warning).split())[:300]) from warning
    finally:
        PreTrainedModel.from_pretrained = given


def refuse_new_weights(model: PreTrainedModel, name: str, missing: set[str], new_head: bool = False) -> None:
    """
    Check that a model has no weights that its checkpoint lacks.

    Args:
        model (`~transformers.PreTrainedModel`), name (`str`):
            The model, and what it was loaded from.
        missing (`set[str]`):
            Names of the weights that the checkpoint lacks.
        new_head (`bool`, *optional*, defaults to `False`):
            Whether those beside the body may be missing.

    Raises:
        `ValueError`: if there are any.
    """
    of_adapters = {
        module for config in getattr(model, "peft_config", {}).values() for module in config.modules_to_save or ()
    }
    missing = {key for key in missing if of_adapters.isdisjoint(key.split("."))}
    body = {key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key}
    if new_head:
        missing = body
    if not missing:
        return
    first = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
    head = type(model).__name__.endswith("ForSequenceClassification") and not body
    raise ValueError(
        f"Model '{name}' lacks {len(missing)} of the weights of a `{type(model).__name__}`, which would be random: "
        f"{first}. "
        + (
            "Is it a language model? Make a reward model of it first, as with `papertrl train --method reward`."
            if head
            else "Its checkpoint is incomplete, or holds a model of another kind."
        )
    )


def reward_model(name: str, trust_remote_code: bool = False, model_init_kwargs: dict[str, Any] | None = None) -> Any:
    """
    A reward model: a sequence classifier with one label.

    Args:
        name (`str`):
            Its id or folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of its repository may run.
        model_init_kwargs (`dict`, *optional*):
            How the policy is loaded. Its revision is that of another repository.

    Raises:
        `ValueError`: if it cannot be loaded, or lacks weights.
    """
    kwargs = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
    kwargs.pop("revision", None)
    try:
        with whole_checkpoints():
            return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"`reward_funcs`: reward model '{name}' cannot be loaded: {' '.join(str(error).split())[:400]}"
        ) from error
