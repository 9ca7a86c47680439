"""Models to evaluate: full ones and PEFT adapters, from folders, the Hub or the packaged GGUF."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import JobError
from ..hub.cards import pipeline_of
from ..hub.files import RUN_FILE, START_MODEL
from ..hub.health import check_model
from ..hub.runfile import read_json
from ..models.declared_size import check_declared_size
from ..models.loading import whole_checkpoints
from ..models.start import prepare_model

ADAPTER_CONFIG = "adapter_config.json"


@dataclass
class Loaded:
    """
    A model ready to generate.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            In evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_model(name: str, trust_remote_code: bool = False) -> Loaded:
    """
    Load a model or an adapter with its base.

    Args:
        name (`str`):
            Folder, Hub id, or `smollm2`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of the model's repository may run.

    Raises:
        [`~papertrl.core.errors.JobError`]: if it cannot be loaded, or answers no prompts.
    """
    if name == "smollm2":
        return _ready(*prepare_model(name, None))
    folder = Path(name)
    if pipeline_of(read_json(folder / RUN_FILE) or {}) != "text-generation":
        raise JobError(
            f"Model '{name}' scores answers and writes none. `papertrl train --reward_model` takes it, to judge those "
            "of others."
        )
    if name.startswith((".", "/", "~")) and not folder.is_dir():
        raise JobError(f"Model '{name}': there is no such folder. Give the output directory of a run, or a Hub id.")
    check_model(folder)
    check_declared_size(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        with whole_checkpoints():
            model = AutoModelForCausalLM.from_pretrained(
                base_of(name) if is_adapter(folder) else name, dtype="auto", trust_remote_code=trust_remote_code
            )
            if is_adapter(folder):
                model.resize_token_embeddings(max(len(tokenizer), model.get_input_embeddings().num_embeddings))
                model = PeftModel.from_pretrained(model, name)
        return _ready(model, tokenizer)
    except (OSError, ValueError) as error:
        raise JobError(
            f"Model '{name}' cannot be loaded: {' '.join(str(error).split())[:200]}. Check the spelling and the "
            "network, or give the folder of a model, of an adapter or of a run."
        ) from error


def _ready(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Loaded:
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return Loaded(model.to(device).eval(), tokenizer)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).exists()


def base_of(name: str) -> str | None:
    """Model that the model of a folder was trained from: the start model beside it, else what adapter or run name."""
    folder = Path(name)
    if (folder / START_MODEL).is_dir():
        return str(folder / START_MODEL)
    if is_adapter(folder):
        return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    return (read_json(folder / RUN_FILE) or {}).get("base_model")


def short_names(models: list[str]) -> dict[str, str]:
    """Names for tables and files: Hub ids as they are, folders by as many of their last parts as tell them apart."""
    parts = {name: Path(name).resolve().parts if Path(name).is_dir() else (name,) for name in models}
    names = {}
    for name, own in parts.items():
        others = [other for key, other in parts.items() if key != name]
        depth = next(n for n in range(1, len(own) + 1) if n == len(own) or all(o[-n:] != own[-n:] for o in others))
        names[name] = "/".join(own[-depth:])
    return names
