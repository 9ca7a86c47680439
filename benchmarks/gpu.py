"""
The workloads of `grpo_step.py` and `dpo_step.py` on a CUDA device: a larger model, longer rows, bf16, TRL's defaults.

    python benchmarks/gpu.py                               # unattended, in ten minutes
    python benchmarks/gpu.py --model smollm2-1.7b --minutes 20
    python benchmarks/gpu.py --device cpu --small          # the same code on a tiny model, in seconds

Weights are random, nothing is downloaded. Each workload is written as soon as it is measured. No pair begins after
`--minutes`, less than the ten since one that has begun ends; workloads that are left are dropped, and named.
"""

import dataclasses
import os
import sys
import traceback
from functools import partial

import dpo_step
import grpo_step
import harness
import torch
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config
from transformers.utils import is_flash_attn_2_available

# The numbers of the public configs
MODELS: dict[str, PreTrainedConfig] = {
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        **harness.SPECIAL,
    ),
    "smollm2-1.7b": LlamaConfig(
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **harness.SPECIAL,
    ),
}
SMALL = LlamaConfig(
    vocab_size=harness.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    **harness.SPECIAL,
)
WINDOW = 64
# Lengths over those on a CPU
SCALE = {False: 2.0, True: 0.25}
# With what each shows beyond its lengths; what takes longest comes last
WORKLOADS = {
    "a": (grpo_step.WORKLOADS["a"], ""),
    "c": (grpo_step.WORKLOADS["c"], "half of the groups without variance, "),
    "d": (dataclasses.replace(grpo_step.WORKLOADS["d-bf16"], prompt=(128, 128)), "2 prompts, half settled, "),
    "e": (dpo_step.E, "DPO, "),
    "g": (grpo_step.WORKLOADS["g-mistral"], "sliding window, "),
    "h": (dataclasses.replace(grpo_step.WORKLOADS["h"], prompt=(128, 128)), "LoRA, "),
    "b": (grpo_step.WORKLOADS["b"], ""),
    "f": (grpo_step.WORKLOADS["f"], ""),
}


def scaled(work, what: str, scale: float, bf16: bool):
    """A workload with other lengths."""
    shortest, longest = (round(scale * length) for length in work.prompt)
    if isinstance(work, dpo_step.Workload):
        completion = tuple(round(scale * length) for length in work.completion)
    else:
        median, sigma, most = work.completion
        completion = (scale * median, sigma, round(scale * most))
    prompts = f"{shortest}-{longest}" if shortest < longest else f"{longest}"
    title = f"{what}prompts of {prompts} tokens, completions up to {completion[-1]}"
    return dataclasses.replace(work, title=title, prompt=(shortest, longest), completion=completion, bf16=bf16)


def load(config: PreTrainedConfig, window: int | None, device: str):
    """Random model of the numbers of `config`, on the device, and its tokenizer."""
    if window is not None:
        numbers = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
            "tie_word_embeddings",
        )
        same = {name: getattr(config, name) for name in numbers}
        config = MistralConfig(**same, **harness.SPECIAL, sliding_window=window)
    with torch.device(device):
        model, tokenizer = harness.random_model(config)
    model.set_attn_implementation(attention(device))
    return model, tokenizer


def attention(device: str) -> str:
    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


def main(arguments: list[str] | None = None) -> None:
    parser = harness.step_arguments(__doc__, minutes=8)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--model", choices=MODELS, default="qwen2.5-0.5b", help="whose numbers the model has")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="a tiny model and short rows, to try the code")
    parser.set_defaults(axes=["defaults"])
    args = parser.parse_args(arguments)
    # The trainers would split batches over several
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device. `--device cpu --small` runs the same code on a tiny model.")
    if args.device == "cpu" and not args.small:
        sys.exit("`--device cpu` needs `--small`: the models of this benchmark are made for a GPU.")
    torch.set_num_threads(args.threads)
    config, scale, failed = SMALL if args.small else MODELS[args.model], SCALE[args.small], []
    budget = harness.Budget(args.minutes, len(args.workloads) * len(args.axes))
    for name in args.workloads:
        work = scaled(*WORKLOADS[name], scale, args.device == "cuda")
        module = dpo_step if name == "e" else grpo_step
        window = round(scale * WINDOW) if name == "g" else None
        origin = {"title": work.title, "settings": vars(work), "model": "small" if args.small else args.model}
        try:
            harness.measure_axes(
                args,
                f"gpu_{name}",
                origin | {"attention": attention(args.device)},
                work.pairs,
                budget,
                partial(load, config, window, args.device),
                partial(module.measure, work),
                work.bf16,
                args.device,
            )
        except Exception:
            # The others are worth having, and nobody watches
            traceback.print_exc()
            failed.append(name)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
