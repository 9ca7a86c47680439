"""
One optimizer step of TRL's `GRPOTrainer` and of papertrl's `PolicyTrainer`, in turn, on the same completions.

    python benchmarks/grpo_step.py                    # all workloads, with TRL's defaults and without checkpointing
    python benchmarks/grpo_step.py --workloads a c --axes defaults
"""

import copy
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from papertrl import PolicyConfig, PolicyTrainer

CLASSES = {"trl": (GRPOTrainer, GRPOConfig), "ours": (PolicyTrainer, PolicyConfig)}


@dataclass(frozen=True)
class Workload:
    """
    One kind of step.

    Args:
        title: what it shows.
        prompt: fewest and most tokens of a prompt.
        completion: median, sigma and longest of the log-normal completion lengths.
        half_settled: whether half of the groups have no variance.
        model: one of [`harness.MODELS`], or `"smollm2"` for SmolLM2-135M-Instruct.
        bf16: under autocast.
        adapter: LoRA instead of all weights.
        groups, group_size, batch: prompts of a step, completions of each, rows of a micro-batch.
        pairs: to measure by axis.
    """

    title: str
    prompt: tuple[int, int]
    completion: tuple[float, float, int]
    half_settled: bool = False
    model: str = "llama"
    bf16: bool = False
    adapter: bool = False
    groups: int = 4
    group_size: int = 8
    batch: int = 8
    pairs: tuple[int, int] = (4, 2)


A = {"prompt": (160, 192), "completion": (32, 0.5, 64)}
# In words, each of which is several tokens of SmolLM2: 128 of them
D = {"prompt": (26, 27), "completion": (32, 0.5, 64), "model": "smollm2", "groups": 2, "pairs": (2, 1)}
WORKLOADS = {
    "a": Workload("prompts of 160-192 tokens, completions up to 64", **A),
    "b": Workload("prompts of 32 tokens, completions up to 256", (32, 32), (64, 0.8, 256)),
    "c": Workload("as a, half of the groups without variance", **A, half_settled=True),
    "d-fp32": Workload("SmolLM2-135M, prompts of 128, half settled", **D, half_settled=True),
    "d-bf16": Workload("as d-fp32, in bf16", **D, half_settled=True, bf16=True),
    "f": Workload("prompts of 64 tokens, completions up to 512", (64, 64), (128, 0.8, 512), pairs=(2, 1)),
    "g-mistral": Workload("as a, sliding window of 64", **A, model="mistral"),
    "g-gemma3": Workload("as a, sliding window of 64 in every other layer", **A, model="gemma3"),
    "h": Workload("SmolLM2-135M with LoRA, prompts of 128", **D, adapter=True),
}


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return harness.smollm2() if name == "smollm2" else harness.random_model(harness.MODELS[name])


def make_steppers(
    work: Workload, model, tokenizer, texts: list[str], folder: str, settings: dict[str, Any]
) -> dict[str, harness.Stepper]:
    harness.impose_lengths(model, *work.completion)
    model = harness.with_adapter(copy.deepcopy(model)) if work.adapter else model
    settings = settings | {
        "output_dir": folder,
        "bf16": work.bf16,
        "per_device_train_batch_size": work.batch,
        "gradient_accumulation_steps": work.groups * work.group_size // work.batch,
        "num_generations": work.group_size,
        "max_completion_length": work.completion[2],
    }
    reward = harness.half_graded if work.half_settled else harness.graded
    steppers = {}
    for side, (trainer_class, config_class) in CLASSES.items():
        config, data = config_class(**settings), harness.rollout_data(texts)
        trainer = trainer_class(copy.deepcopy(model), reward, config, data, processing_class=copy.deepcopy(tokenizer))
        steppers[side] = harness.Stepper(trainer, {"_prepare_inputs": "scoring"})
    return steppers


def step_rows(work: Workload, trainer, number: int) -> list[dict]:
    data = trainer.train_dataset
    return [data[number * work.groups + i] for i in range(work.groups) for _ in range(work.group_size)]


def tokenize(trainer, rows: list[dict]) -> list[list[int]]:
    return trainer._tokenize_prompts([row["prompt"] for row in rows])[0]


def sample(work: Workload, stepper: harness.Stepper, rows: list[dict], seed: int) -> list[list[int]]:
    trainer = stepper.trainer
    trainer.optimizer.zero_grad()
    ids = tokenize(trainer, rows)
    torch.manual_seed(seed)
    with stepper.measured(), stepper.clock.phase("generation"):
        return type(trainer)._generate_single_turn(trainer, ids, None, {}, work.group_size)[0]


def train(stepper: harness.Stepper, rows: list[dict], completions: list[list[int]], seed: int) -> dict:
    """The gradients of a step on `completions`."""
    trainer = stepper.trainer
    trainer._generate_single_turn = lambda *args, **kwargs: (copy.deepcopy(completions), None)
    return stepper.step([rows] * trainer.args.gradient_accumulation_steps, seed=seed)


def step_pair(work: Workload, steppers: dict[str, harness.Stepper], number: int, order: tuple[str, str]) -> dict:
    """Both sides sample; then both train on what TRL sampled, from the same weights."""
    for stepper in steppers.values():
        law = harness.causal_lm(stepper.trainer.model).length_law
        law.divisor = harness.WARM_UP_DIVISOR if number == 0 else 1
    trainers = {side: stepper.trainer for side, stepper in steppers.items()}
    rows = step_rows(work, trainers["trl"], number)
    sampled = {side: sample(work, steppers[side], rows, seed=number) for side in order}
    lengths = {side: [len(completion) for completion in sampled[side]] for side in order}
    if sorted(lengths["trl"]) != sorted(lengths["ours"]):
        raise ValueError(f"The law of lengths must act alike on both sides, got {lengths!r}.")
    gradients = {side: train(steppers[side], rows, sampled["trl"], seed=number) for side in order}
    pair = {side: steppers[side].take() for side in order}
    pair["gradient_difference"] = harness.gradient_difference(gradients["trl"], gradients["ours"])
    trainers["ours"].model.load_state_dict(trainers["trl"].model.state_dict())
    prompt_lengths = [len(prompt) for prompt in tokenize(trainers["trl"], rows[:: work.group_size])]
    return pair | {
        "lengths": lengths,
        "prompt_lengths": prompt_lengths,
        "tokens": sum(lengths["trl"]),
        "flop": needed(work, harness.Work.of(trainers["ours"]), prompt_lengths, lengths["trl"], rows),
    }


def needed(work: Workload, flop: harness.Work, prompts: list[int], lengths: list[int], rows: list[dict]) -> dict:
    """FLOP by phase with each prompt once, and trained on where its group has an effect."""
    live = [not (work.half_settled and row["settled"]) for row in rows]
    trained = sum(length for length, counts in zip(lengths, live, strict=True) if counts)
    prefixes = sum(prompt for prompt, counts in zip(prompts, live[:: work.group_size], strict=True) if counts)
    return {
        "generation": flop.forward(sum(prompts) + sum(lengths), sum(lengths)),
        "update": flop.training(prefixes + trained, trained),
    }


def measure(
    work: Workload,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: dict[str, Any],
    count: int,
    budget: harness.Budget | None = None,
    profile: AbstractContextManager | None = None,
) -> list[dict]:
    """Up to `count` pairs, and another step of ours under `profile`."""
    texts = harness.prompts((count + 1) * work.groups, *work.prompt)
    with tempfile.TemporaryDirectory() as folder:
        steppers = make_steppers(work, model, tokenizer, texts, folder, settings)
        pairs = harness.run_pairs(partial(step_pair, work, steppers), count, budget)
        if pairs and profile is not None:
            ours = steppers["ours"]
            rows = step_rows(work, ours.trainer, count)
            with profile:
                train(ours, rows, sample(work, ours, rows, seed=count), seed=count)
    return pairs


def main() -> None:
    parser = harness.step_arguments(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    budget = harness.Budget(args.minutes, len(args.workloads) * len(args.axes))
    for name in args.workloads:
        work = WORKLOADS[name]
        harness.measure_axes(
            args,
            f"grpo_{name}",
            {"title": work.title, "settings": vars(work)},
            work.pairs,
            budget,
            lambda work=work: load_model(work.model),
            partial(measure, work),
            work.bf16,
        )


if __name__ == "__main__":
    main()
