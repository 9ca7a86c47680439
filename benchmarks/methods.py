"""
Step time of every method of the catalogue relative to its family's base, with the passes through the model it makes.

    python benchmarks/methods.py
"""

import copy
import itertools
import tempfile

import harness
import torch
from datasets import Dataset
from dpo_step import preference_data

import papertrl
from papertrl.core.catalogue import BASES, METHODS, load_trainer

LAW = (16, 0.5, 32)
FAMILY = {
    "policy": {"num_generations": 8, "max_completion_length": LAW[2], "gradient_accumulation_steps": 4},
    "preference": {"max_length": 256},
    "supervised": {"max_length": 256},
}
# Values that a method has no default for, or that would let it reach another length
SETTINGS = {"hypo": {"hypo_kl_max_new_tokens": LAW[2]}, "dler": {"truncation_length": LAW[2] // 2}}


def save_plain(model: harness.BenchModel, folder: str) -> None:
    """Save the model as the class that transformers knows."""
    model.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def make(family: str, trainer_class, settings: dict, model, tokenizer, reference: str) -> harness.Stepper:
    config = trainer_class.config_class(
        output_dir=f"{reference}/run", per_device_train_batch_size=8, **(harness.COMMON | FAMILY[family] | settings)
    )
    policy = copy.deepcopy(model)
    # A method with a KL penalty loads its reference from where the model says it is from
    policy.config._name_or_path = reference
    if family == "policy":
        arguments, data = (policy, harness.graded), harness.rollout_data(harness.prompts(32, 96, 96))
    else:
        data = preference_data(32, (96, 96), (16, 32))
        if family == "supervised":
            data = Dataset.from_dict({"prompt": data["prompt"], "completion": data["chosen"]})
        arguments = (policy, copy.deepcopy(model)) if family == "preference" else (policy,)
    trainer = trainer_class(*arguments, args=config, train_dataset=data, processing_class=copy.deepcopy(tokenizer))
    generation = {"_generate_single_turn": "generation"} if family == "policy" else {}
    return harness.Stepper(trainer, {"_prepare_inputs": "scoring"} | generation)


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
    args = harness.arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = harness.random_model()
    model.length_law = LAW
    results = {"methods": {}}
    for family, base in BASES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_plain(model, folder)
            neutral = make(family, getattr(papertrl, base), {}, model, tokenizer, folder)
            for name in (name for name, of in METHODS.items() if of == family):
                method = make(family, load_trainer(name), SETTINGS.get(name, {}), model, tokenizer, folder)
                for stepper in (neutral, method):
                    measure(stepper, 0)
                pairs = [(measure(neutral, i), measure(method, i)) for i in range(1, args.pairs + 1)]
                relative = harness.spread([seconds / base_seconds for base_seconds, seconds in pairs])
                results["methods"][name] = {
                    "family": family,
                    "relative": relative,
                    "pairs": pairs,
                    "passes": dict(method.counted),
                    "base_passes": dict(neutral.counted),
                }
                print(
                    f"{name:<10} {relative['median']:5.2f} [{relative['low']:.2f}, {relative['high']:.2f}] of {base}"
                )
                print(f"           {dict(method.counted)}, base {dict(neutral.counted)}", flush=True)
    harness.write(args.output, "methods", results)


if __name__ == "__main__":
    main()
