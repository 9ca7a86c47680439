"""
One optimizer step of TRL's `DPOTrainer` and of papertrl's `PreferenceTrainer`, in turn, on the same pairs.

    python benchmarks/dpo_step.py
"""

import copy
import random
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from papertrl import PreferenceConfig, PreferenceTrainer

CLASSES = {"trl": (DPOTrainer, DPOConfig), "ours": (PreferenceTrainer, PreferenceConfig)}


@dataclass(frozen=True)
class Workload:
    """
    One kind of step.

    Args:
        title: what it shows.
        prompt, completion: fewest and most tokens.
        batch: pairs of a step.
        bf16: under autocast.
        pairs: to measure by axis.
    """

    title: str
    prompt: tuple[int, int] = (256, 256)
    completion: tuple[int, int] = (32, 64)
    batch: int = 8
    bf16: bool = False
    pairs: tuple[int, int] = (5, 2)


E = Workload("DPO, prompts of 256 tokens, completions of 32-64")


def preference_data(count: int, prompt: tuple[int, int], completion: tuple[int, int]) -> Dataset:
    """Random pairs; token counts between the two bounds."""
    chosen, rejected = (harness.prompts(count, *completion, seed=seed) for seed in (1, 2))
    spaced = {"chosen": [" " + text for text in chosen], "rejected": [" " + text for text in rejected]}
    return Dataset.from_dict({"prompt": harness.prompts(count, *prompt)} | spaced)


def make_stepper(
    work: Workload, classes, model, tokenizer, data: Dataset, folder: str, settings: dict[str, Any]
) -> harness.Stepper:
    trainer_class, config_class = classes
    settings = settings | {"bf16": work.bf16, "per_device_train_batch_size": work.batch}
    models = copy.deepcopy(model), copy.deepcopy(model)
    config = config_class(output_dir=folder, **settings)
    trainer = trainer_class(*models, config, train_dataset=data, processing_class=tokenizer)
    stepper = harness.Stepper(trainer, {"_prepare_inputs": "collation"})
    trainer.ref_model.forward = stepper.clock.timed("reference", trainer.ref_model.forward)
    return stepper


def collated(work: Workload, trainer, number: int) -> dict[str, torch.Tensor]:
    """Batch `number` of the trainer's dataset."""
    rows = random.Random(number).sample(range(len(trainer.train_dataset)), work.batch)
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def step_pair(work: Workload, steppers: dict[str, harness.Stepper], number: int, order: tuple[str, str]) -> dict:
    trainers = {side: stepper.trainer for side, stepper in steppers.items()}
    batch = collated(work, trainers["trl"], number)
    gradients = {side: steppers[side].step([dict(batch)], seed=number) for side in order}
    pair = {side: steppers[side].take() for side in order}
    pair["gradient_difference"] = harness.gradient_difference(gradients["trl"], gradients["ours"])
    trainers["ours"].model.load_state_dict(trainers["trl"].model.state_dict())
    scored = int(batch["completion_mask"].sum())
    prompts = int(batch["attention_mask"].sum()) - scored
    # The two rows of a pair have one prompt
    positions, flop = prompts // 2 + scored, harness.Work.of(trainers["ours"])
    needed = {"reference": flop.forward(positions, scored), "update": flop.training(positions, scored)}
    return pair | {"tokens": scored, "flop": needed}


def measure(
    work: Workload,
    model,
    tokenizer,
    settings: dict[str, Any],
    count: int,
    budget: harness.Budget | None = None,
    profile: AbstractContextManager | None = None,
) -> list[dict]:
    """Up to `count` pairs, and another step of ours under `profile`."""
    data = preference_data(8 * work.batch, work.prompt, work.completion)
    with tempfile.TemporaryDirectory() as folder:
        steppers = {
            side: make_stepper(work, classes, model, tokenizer, data, folder, settings)
            for side, classes in CLASSES.items()
        }
        pairs = harness.run_pairs(partial(step_pair, work, steppers), count, budget)
        if pairs and profile is not None:
            batch = collated(work, steppers["ours"].trainer, count)
            with profile:
                steppers["ours"].step([batch], seed=count)
    return pairs


def main() -> None:
    args = harness.step_arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    harness.measure_axes(
        args,
        "dpo_e",
        {"title": E.title, "settings": vars(E)},
        E.pairs,
        harness.Budget(args.minutes, len(args.axes)),
        lambda: harness.random_model(harness.MODELS["llama"]),
        partial(measure, E),
    )


if __name__ == "__main__":
    main()
