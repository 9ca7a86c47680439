"""The built-in start model: a tiny causal LM, made on the spot and warmed up on a task by supervised learning."""

from collections.abc import Iterator

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .tiny import tiny_model, tiny_tokenizer

IGNORED = -100
BATCH_SIZE = 64
LEARNING_RATE = 2e-3


def make_start_model(examples: Dataset, steps: int, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Make a tiny model and train it for `steps` steps to complete `examples`.

    Args:
        examples (`Dataset`):
            Columns `prompt` and `completion`, both text.
        steps (`int`):
            Optimizer steps of supervised warm-up; few, so that the policy gradient has something left to do.
        seed (`int`):
            Seed of the weights and of the order of examples.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = tiny_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps + 1)
    model.train()
    for input_ids, labels in tqdm(_batches(examples, tokenizer, steps), total=steps, desc="Warm-up", leave=False):
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
