"""COFS-DPO's second half (arXiv:2406.05534): one adapter from those of several domains, weighted on a small memory."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import selective_log_softmax

from ..losses.preference.pair_losses import sigmoid
from ..models.tokenization import stack_sequences, template_options, tokenize_completions, with_end

RECORD = "combination.json"


@dataclass(frozen=True)
class Combination:
    """
    Adapters and their weights.

    Args:
        weights (`list[float]`):
            w, one per domain.
        losses (`list[float]`):
            Mean DPO loss on the memory before the first step of the search, at equal weights, and after each.
    """

    weights: list[float]
    losses: list[float]


def combine_domains(
    model: str | PreTrainedModel,
    adapters: Sequence[str | PathLike],
    memories: Sequence[Dataset],
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | PathLike,
    weights: Sequence[float] | None = None,
    memory_size: int = 64,
    beta: float = 0.1,
    steps: int = 50,
    learning_rate: float = 0.05,
    batch_size: int = 16,
    seed: int = 42,
) -> Combination:
    """
    Combine the LoRA adapters of domains 1 to K into one, and write it to `output_dir`.

    The combination is linear in what adapters add to the base model's weights, ΔW = Σ_k w_k s_k B_k A_k with s_k the
    adapter's own scaling, and exact: its rank is the sum of theirs. Plain `PeftModel.from_pretrained` loads it. The
    weights are those that minimize the mean DPO loss on a few pairs of every domain, see [`fit_weights`]; they may be
    negative. How the paper searches them is not known to us.

    The flow for a stream of domains: train [`~papertrl.OfsDPOTrainer`] on each, from the base model or going on from
    the last domain's adapter, keep `memory_size` pairs, and at the end combine the output folders, which hold the
    better module of each. An adapter that goes on from another contains it, which the weights make up for.

    Args:
        model (`str` or `~transformers.PreTrainedModel`):
            Base model, or its id or folder. It is left as it was.
        adapters (`Sequence[str | PathLike]`):
            Folders of the adapters, one per domain.
        memories (`Sequence[Dataset]`):
            Pairs (`prompt`, `chosen`, `rejected`) of each domain.
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            Tokenizer of the model; saved beside the adapter.
        output_dir (`str | PathLike`):
            Folder to write the adapter, and `combination.json`, to.
        weights (`Sequence[float]`, *optional*):
            w, to skip the search.
        memory_size (`int`, *optional*, defaults to `64`):
            Pairs taken of each domain, at random where there are more.
        beta (`float`), steps (`int`), learning_rate (`float`), batch_size (`int`):
            As in [`fit_weights`].
        seed (`int`, *optional*, defaults to `42`):
            Of the choice of pairs.

    Raises:
        `ValueError`: if the numbers of adapters, memories and weights differ, or an adapter is no plain LoRA.
    """
    _check(adapters, memories, weights, memory_size)
    base = AutoModelForCausalLM.from_pretrained(model) if isinstance(model, str) else model
    training, trainable = base.training, [p for p in base.parameters() if p.requires_grad]
    names = [f"domain_{number}" for number in range(1, len(adapters) + 1)]
    combined = PeftModel.from_pretrained(base, adapters[0], adapter_name=names[0])
    try:
        for name, folder in zip(names[1:], adapters[1:], strict=True):
            combined.load_adapter(folder, name)
        combined.eval()
        if weights is None:
            parts = [memory.shuffle(seed=seed).select(range(min(memory_size, len(memory)))) for memory in memories]
            columns = ["prompt", "chosen", "rejected"]
            memory = concatenate_datasets([part.select_columns(columns) for part in parts])
            found = fit_weights(combined, names, memory, tokenizer, beta, steps, learning_rate, batch_size)
        else:
            found = Combination(list(map(float, weights)), [])
        # PEFT writes the adapter of this name to the folder itself
        combined.base_model.add_weighted_adapter(names, found.weights, "default", combination_type="cat")
        combined.save_pretrained(output_dir, selected_adapters=["default"])
    finally:
        combined.unload()
        base.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)
    tokenizer.save_pretrained(output_dir)
    record = {"adapters": list(map(str, adapters)), **asdict(found)}
    (Path(output_dir) / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return found


def fit_weights(
    model: PeftModel,
    adapters: Sequence[str],
    memory: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    beta: float = 0.1,
    steps: int = 50,
    learning_rate: float = 0.05,
    batch_size: int = 16,
) -> Combination:
    """
    Weights that minimize the mean DPO loss of the combination on `memory`, by Adam on the weights alone.

    min_w mean −log σ(β(m_w − m_base)), from w_k = 1/K; the best weights seen are returned.

    Args:
        model (`~peft.PeftModel`):
            Has the adapters; without them, it is the reference.
        adapters (`Sequence[str]`):
            Their names.
        memory (`Dataset`):
            Pairs, as text or messages.
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            Tokenizer of the model.
        beta (`float`, *optional*, defaults to `0.1`), steps (`int`, *optional*, defaults to `50`):
            β, and steps over the whole memory.
        learning_rate (`float`, *optional*, defaults to `0.05`):
            Adam's.
        batch_size (`int`, *optional*, defaults to `16`):
            Pairs in memory at a time; it changes nothing else.
    """
    rows = [_sides(row, tokenizer) for row in memory]
    batches = []
    for start in range(0, len(rows), batch_size):
        parts = stack_sequences(rows[start : start + batch_size], tokenizer.pad_token_id)
        # All chosen sequences, then their rejected partners
        batches.append([part.transpose(0, 1).flatten(0, 1).to(model.device) for part in parts])
    with torch.no_grad(), model.disable_adapter():
        references = [_margins(model, *batch) for batch in batches]
    weights = torch.full((len(adapters),), 1 / len(adapters), device=model.device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    tried, losses = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        total = 0.0
        for batch, reference in zip(batches, references, strict=True):
            with weighted(model, adapters, weights), torch.set_grad_enabled(step < steps):
                loss = sigmoid(_margins(model, *batch) - reference, beta).sum() / len(rows)
            if step < steps:
                loss.backward()
            total += loss.item()
        tried.append(weights.tolist())
        losses.append(total)
        if step < steps:
            optimizer.step()
    return Combination(tried[min(range(len(losses)), key=losses.__getitem__)], losses)


@contextmanager
def weighted(model: PeftModel, adapters: Sequence[str], weights: torch.Tensor) -> Iterator[None]:
    """
    Let `model` act as if its weights were W + Σ_k w_k s_k B_k A_k, differentiably in w.

    Args:
        model (`~peft.PeftModel`), adapters (`Sequence[str]`):
            Model, and the adapters' names.
        weights (`torch.Tensor` of shape `(adapters,)`):
            w.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    scalings = [dict(layer.scaling) for layer in layers]
    active = model.active_adapters
    model.base_model.set_adapter(list(adapters), inference_mode=True)
    try:
        for layer in layers:
            for adapter, weight in zip(adapters, weights, strict=True):
                if adapter in layer.scaling:
                    layer.scaling[adapter] = layer.scaling[adapter] * weight
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling.update(scaling)
        model.base_model.set_adapter(active, inference_mode=True)


def _check(adapters: Sequence, memories: Sequence, weights: Sequence[float] | None, memory_size: int) -> None:
    if not adapters:
        raise ValueError("`adapters` must name at least one folder, got none.")
    # With given weights, memories are not looked at
    name, values = ("memories", memories) if weights is None else ("weights", weights)
    if len(values) != len(adapters):
        raise ValueError(f"`{name}` must have one entry per adapter, {len(adapters)}, got {len(values)}.")
    if memory_size < 1:
        raise ValueError(f"`memory_size` must be at least 1, got {memory_size}.")
    for folder in adapters:
        config = PeftConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError(f"`adapters`: '{folder}' is {type(config).__name__}; only LoRA adapters add up.")
        # What is not a product B A, or what PEFT does not put together exactly
        for name in ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "rank_pattern"):
            if getattr(config, name):
                raise ValueError(
                    f"`adapters`: '{folder}' has `{name}={getattr(config, name)!r}`, which does not combine linearly. "
                    "Train the adapters without it."
                )


def _sides(row: dict, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Tokens of prompt and completion of the chosen and of the rejected side."""
    completions = [with_end(tokenizer, row[side]) for side in ("chosen", "rejected")]
    prompt, completions = tokenize_completions(tokenizer, row["prompt"], completions, template_options(row))
    return [(prompt, tokens) for tokens in completions]


def _margins(
    model: PeftModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, completion_mask: torch.Tensor
) -> torch.Tensor:
    """log π(chosen) − log π(rejected) of each pair, `(pairs,)`."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    logps = selective_log_softmax(logits[:, :-1], input_ids[:, 1:]).float()
    chosen, rejected = (logps * completion_mask[:, 1:]).sum(1).chunk(2)
    return chosen - rejected
