"""Whether the files of a model and of its run are whole: asked before a model is evaluated or published."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..core.errors import JobError
from .files import CURVES_FILE, EVALUATION_FILE, METRICS_FILE, RECIPE_FILE, RUN_FILE, SAMPLES_FILE

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
# JSON, without which neither model nor tokenizer loads
CONFIGURATIONS = (
    MODEL_CONFIG,
    ADAPTER_CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "preprocessor_config.json",
    "processor_config.json",
)
FILLED = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "merges.txt")
REMEDY = (
    "Train again, or go on from an earlier checkpoint by `--resume_from_checkpoint`; a copy that broke off can be "
    "copied again."
)


def check_model(folder: Path) -> None:
    """
    Check that a folder's model can be trusted: its files are complete, and its weights are numbers.

    Args:
        folder (`Path`):
            Folder of a model, of an adapter or of a run. Files that are not there are not missed, except those that
            others name.

    Raises:
        [`~papertrl.core.errors.JobError`]: naming the file, what is wrong with it, and what to do.
    """
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            _read_mapping(folder / name)
    for name in FILLED:
        if (folder / name).is_file() and not (folder / name).stat().st_size:
            raise JobError(f"'{folder / name}' is empty. {REMEDY}")
    if (folder / INDEX).is_file():
        shards = set(_read_mapping(folder / INDEX).get("weight_map", {}).values())
        lacking = sorted(shard for shard in shards if not (folder / shard).is_file())
        if lacking:
            raise JobError(f"'{folder}' lacks {', '.join(lacking)}, which {INDEX} names. {REMEDY}")
    if (folder / ADAPTER_WEIGHTS).is_file() and not (folder / ADAPTER_CONFIG).is_file():
        raise JobError(f"'{folder}' holds {ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}. {REMEDY}")
    models = sorted(folder.glob("model*.safetensors"))
    if models and not (folder / MODEL_CONFIG).is_file():
        raise JobError(f"'{folder}' holds {models[0].name} without {MODEL_CONFIG}. {REMEDY}")
    for path in [*models, *sorted(folder.glob("adapter_model*.safetensors"))]:
        _check_weights(path)


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise JobError(
                        f"'{path}' holds a model that cannot answer: '{name}' has values that are no finite numbers "
                        f"(NaN or infinity). {REMEDY}"
                    )
    except SafetensorError as error:
        raise JobError(f"'{path}' is damaged or cut off ({' '.join(str(error).split())[:120]}). {REMEDY}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        state = f"is no JSON ({error})" if path.stat().st_size else "is empty"
        raise JobError(f"'{path}' {state}. {REMEDY}") from error
    if not isinstance(content, dict):
        raise JobError(f"'{path}' holds no JSON object. {REMEDY}")
    return content


def missing_reports(folder: Path) -> list[str]:
    """
    Names of what the job that trained a model leaves beside it, and that is missing or empty.

    Args:
        folder (`Path`):
            Output directory.

    Raises:
        [`~papertrl.core.errors.JobError`]: if `run.json` or `evaluation.json` cannot be read.
    """
    for name in (RUN_FILE, EVALUATION_FILE):
        if (folder / name).is_file():
            _read_mapping(folder / name)
    if not (folder / RUN_FILE).is_file():
        return [RUN_FILE]
    run = _read_mapping(folder / RUN_FILE)
    # A trainer used without the command line writes the description alone
    wanted = [METRICS_FILE, RECIPE_FILE, CURVES_FILE] if run.get("command") else []
    wanted += [SAMPLES_FILE] if wanted and "prompts" in (run.get("scores") or {}) else []
    return [name for name in wanted if not (folder / name).is_file() or not (folder / name).stat().st_size]
