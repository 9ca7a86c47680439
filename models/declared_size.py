"""Models that nobody can build: refused by what their config declares, before weights are looked for."""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..core.errors import JobError

# Far beyond any model, and small enough that a slip of a digit or two does not hang the machine
MOST = dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 10**4)
MOST |= dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "n_inner", "ffn_dim"), 10**7)
MOST |= {"vocab_size": 10**8, "max_position_embeddings": 10**9, "n_positions": 10**9}


def check_declared_size(name: str, revision: str | None = None, changed: Mapping[str, Any] | None = None) -> None:
    """
    Check that a model's config declares something that can be built. Runs no code of the model.

    Args:
        name (`str`):
            Folder or Hub id. One whose config cannot be read is left to the loader, which says why.
        revision (`str`, *optional*):
            Of the Hub id.
        changed (`Mapping[str, Any]`, *optional*):
            Values in place of the config's, as in `model_init_kwargs`.

    Raises:
        [`~papertrl.core.errors.JobError`]: naming the model, the field, the value and what is accepted.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError):
        return
    for key, value in _numbers(config | dict(changed or {})):
        if key in MOST and not 0 <= value <= MOST[key]:
            raise JobError(
                f"Model '{name}': `{key}` must be in [0, {MOST[key]}], got {value}. Check its config.json, or "
                "`--model_init_kwargs`."
            )


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, (int, float)):
            yield key, value
