"""
Step time of every method of the catalogue relative to its family's base, with the passes through the model it makes.

    python benchmarks/methods.py
"""

import copy
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
from datasets import Dataset
from dpo_step import preference_data
from transformers import PreTrainedModel

from papertrl.core.catalogue import METHODS, load_trainer

LAW = (16, 0.5, 32)
# Values that a method has no default for, or that would let it reach another length
SETTINGS = {"hypo": {"hypo_kl_max_new_tokens": LAW[2]}, "dler": {"truncation_length": LAW[2] // 2}}


@dataclass(frozen=True)
class Workload:
    """
    What the methods of a family are measured on.

    Args:
        data (`Callable`):
            → rows to train on.
        settings (`dict`):
            Config values.
        arguments (`Callable`):
            Model → further arguments of the trainer.
        timed (`dict[str, str]`):
            Methods of the trainer, by the phase that they are counted as.
    """

    data: Callable[[], Dataset]
    settings: Mapping[str, Any]
    arguments: Callable[[PreTrainedModel], dict[str, Any]] = lambda model: {}
    timed: Mapping[str, str] = field(default_factory=dict)


def pairs() -> Dataset:
    return preference_data(32, (96, 96), (16, 32))


# By the name of the trainer without a method
WORKLOADS = {
    "grpo": Workload(
        data=lambda: harness.rollout_data(harness.prompts(32, 96, 96)),
        settings={"num_generations": 8, "max_completion_length": LAW[2], "gradient_accumulation_steps": 4},
        arguments=lambda model: {"reward_funcs": harness.graded},
        timed={"_generate_single_turn": "generation"},
    ),
    "dpo": Workload(pairs, {"max_length": 256}, lambda model: {"ref_model": copy.deepcopy(model)}),
    "sft": Workload(
        lambda: pairs().rename_column("chosen", "completion").remove_columns("rejected"), {"max_length": 256}
    ),
}


def make(work: Workload, trainer_class, settings: dict, model, tokenizer, reference: str) -> harness.Stepper:
    config = trainer_class.config_class(
        output_dir=f"{reference}/run",
        per_device_train_batch_size=8,
        **(harness.settings("off") | {**work.settings} | settings),
    )
    policy = copy.deepcopy(model)
    # A method with a KL penalty loads its reference from where the model says it is from
    policy.config._name_or_path = reference
    trainer = trainer_class(
        policy,
        args=config,
        train_dataset=work.data(),
        processing_class=copy.deepcopy(tokenizer),
        **work.arguments(model),
    )
    return harness.Stepper(trainer, {"_prepare_inputs": "scoring", **work.timed})


def measure(stepper: harness.Stepper, number: int) -> float:
    """Seconds of a step on the batches that the trainer's own data loader gives."""
    trainer = stepper.trainer
    if number == 0:
        torch.manual_seed(0)
        stepper.batches = itertools.cycle(trainer.get_train_dataloader())
    batches = list(itertools.islice(stepper.batches, trainer.args.gradient_accumulation_steps))
    stepper.counted.clear()
    stepper.step(batches, seed=number)
    return stepper.take()["step"]


def main() -> None:
    args = harness.arguments(__doc__, pairs=3).parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = harness.random_model(harness.MODELS["llama"])
    harness.impose_lengths(model, *LAW)
    results = {"methods": {}}
    for plain, work in WORKLOADS.items():
        base = load_trainer(plain)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            neutral = make(work, base, {}, model, tokenizer, folder)
            for name in (name for name, family in METHODS.items() if family == base.family.name):
                try:
                    method = make(work, load_trainer(name), SETTINGS.get(name, {}), model, tokenizer, folder)
                except ValueError as error:
                    # It needs columns, options or rewards of its own
                    print(f"{name:<10} is left out: {error}", flush=True)
                    continue
                for stepper in (neutral, method):
                    measure(stepper, 0)
                measured = [(measure(neutral, i), measure(method, i)) for i in range(1, args.pairs + 1)]
                relative = harness.spread([seconds / base_seconds for base_seconds, seconds in measured])
                results["methods"][name] = {
                    "relative": relative,
                    "pairs": measured,
                    "passes": dict(method.counted),
                    "base_passes": dict(neutral.counted),
                }
                print(
                    f"{name:<10} {relative['median']:5.2f} [{relative['low']:.2f}, {relative['high']:.2f}] of {plain}"
                )
                print(f"           {dict(method.counted)}, base {dict(neutral.counted)}", flush=True)
    harness.write(args.output, "methods", results)


if __name__ == "__main__":
    main()
