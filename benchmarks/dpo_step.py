"""
One optimizer step of TRL's `DPOTrainer` and of papertrl's `PreferenceTrainer`, in turn, on the same pairs.

    python benchmarks/dpo_step.py
"""

import copy
import random
import tempfile

import harness
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from papertrl import PreferenceConfig, PreferenceTrainer

PAIRS = 8
CLASSES = {"trl": (DPOTrainer, DPOConfig), "ours": (PreferenceTrainer, PreferenceConfig)}


def preference_data(count: int, prompt: tuple[int, int], completion: tuple[int, int]) -> Dataset:
    """Random pairs; token counts between the two bounds."""
    chosen, rejected = (harness.prompts(count, *completion, seed=seed) for seed in (1, 2))
    spaced = {"chosen": [" " + text for text in chosen], "rejected": [" " + text for text in rejected]}
    return Dataset.from_dict({"prompt": harness.prompts(count, *prompt)} | spaced)


def make_stepper(trainer_class, config_class, model, tokenizer, data: Dataset, folder: str) -> harness.Stepper:
    config = config_class(output_dir=folder, per_device_train_batch_size=PAIRS, max_length=1024, **harness.COMMON)
    models = copy.deepcopy(model), copy.deepcopy(model)
    trainer = trainer_class(*models, config, train_dataset=data, processing_class=tokenizer)
    stepper = harness.Stepper(trainer, {"_prepare_inputs": "collation"})
    trainer.ref_model.forward = stepper.clock.timed("reference", trainer.ref_model.forward)
    return stepper


def collated(trainer, number: int) -> dict[str, torch.Tensor]:
    """Batch `number` of the trainer's dataset."""
    rows = random.Random(number).sample(range(len(trainer.train_dataset)), PAIRS)
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def main() -> None:
    args = harness.arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = harness.random_model()
    data = preference_data(64, (256, 256), (32, 64))
    with tempfile.TemporaryDirectory() as folder:
        steppers = {side: make_stepper(*classes, model, tokenizer, data, folder) for side, classes in CLASSES.items()}

        def pair(number, order):
            batch = collated(steppers["trl"].trainer, number)
            gradients = {side: steppers[side].step([dict(batch)], seed=number) for side in order}
            result = {side: steppers[side].take() for side in order}
            result["gradient_difference"] = harness.gradient_difference(gradients["trl"], gradients["ours"])
            steppers["ours"].trainer.model.load_state_dict(steppers["trl"].trainer.model.state_dict())
            return result

        pairs = harness.run_pairs(pair, args.pairs)
    summary = harness.summarize(pairs)
    title = "DPO, prompts of 256 tokens, completions of 32-64"
    harness.show(f"(e) {title}", summary)
    harness.write(args.output, "dpo_e", {"title": title, "summary": summary, "pairs": pairs})


if __name__ == "__main__":
    main()
