"""
One optimizer step of TRL's `GRPOTrainer` and of papertrl's `PolicyTrainer`, in turn, on the same completions.

    python benchmarks/grpo_step.py                    # all workloads, some minutes
    python benchmarks/grpo_step.py --workloads a c
"""

import copy
import tempfile
from dataclasses import dataclass
from functools import partial

import harness
import torch
from trl import GRPOConfig, GRPOTrainer

from papertrl import PolicyConfig, PolicyTrainer

CLASSES = {"trl": (GRPOTrainer, GRPOConfig), "ours": (PolicyTrainer, PolicyConfig)}


@dataclass
class Workload:
    """
    One kind of step.

    Args:
        title: what it shows.
        prompt: fewest and most tokens of a prompt.
        completion: median, sigma and longest of the log-normal completion lengths.
        half_settled: whether half of the groups have no variance.
        pretrained: SmolLM2-135M-Instruct instead of the random model.
        bf16: under autocast.
        groups, group_size, batch: prompts of a step, completions of each, rows of a micro-batch.
    """

    title: str
    prompt: tuple[int, int]
    completion: tuple[float, float, int]
    half_settled: bool = False
    pretrained: bool = False
    bf16: bool = False
    groups: int = 4
    group_size: int = 8
    batch: int = 8


WORKLOADS = {
    "a": Workload("prompts of 160-192 tokens, completions up to 64", (160, 192), (32, 0.5, 64)),
    "b": Workload("prompts of 32 tokens, completions up to 256", (32, 32), (64, 0.8, 256)),
    "c": Workload("as a, half of the groups without variance", (160, 192), (32, 0.5, 64), half_settled=True),
    "d-fp32": Workload("SmolLM2-135M, prompts of 128, half settled", (26, 27), (32, 0.5, 64), True, True, groups=2),
    "d-bf16": Workload("as d-fp32, in bf16", (26, 27), (32, 0.5, 64), True, True, True, groups=2),
}


def make_steppers(work: Workload, model, tokenizer, texts: list[str], folder: str) -> dict[str, harness.Stepper]:
    model.length_law = work.completion
    settings = harness.COMMON | {
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


def step_pair(work: Workload, steppers: dict[str, harness.Stepper], number: int, order: tuple[str, str]) -> dict:
    """Both sides sample; then both train on what TRL sampled, from the same weights."""
    data = steppers["trl"].trainer.train_dataset
    rows = [data[number * work.groups + i] for i in range(work.groups) for _ in range(work.group_size)]
    sampled, gradients = {}, {}
    for side in order:
        stepper, trainer = steppers[side], steppers[side].trainer
        trainer.optimizer.zero_grad()
        ids, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows])
        torch.manual_seed(number)
        with stepper.measured(), stepper.clock.phase("generation"):
            sampled[side], _ = type(trainer)._generate_single_turn(trainer, ids, None, {}, work.group_size)
    for side in order:
        stepper, trainer = steppers[side], steppers[side].trainer
        trainer._generate_single_turn = lambda *args, **kwargs: (copy.deepcopy(sampled["trl"]), None)
        gradients[side] = stepper.step([rows] * trainer.args.gradient_accumulation_steps, seed=number)
    pair = {side: steppers[side].take() for side in order}
    pair["gradient_difference"] = harness.gradient_difference(gradients["trl"], gradients["ours"])
    steppers["ours"].trainer.model.load_state_dict(steppers["trl"].trainer.model.state_dict())
    lengths = {side: [len(completion) for completion in sampled[side]] for side in order}
    return pair | {"lengths": lengths, "prompt_lengths": [len(prompt) for prompt in ids[:: work.group_size]]}


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.workloads:
        work = WORKLOADS[name]
        model, tokenizer = harness.smollm2() if work.pretrained else harness.random_model()
        texts = harness.prompts((args.pairs + 1) * work.groups, *work.prompt)
        with tempfile.TemporaryDirectory() as folder:
            steppers = make_steppers(work, model, tokenizer, texts, folder)
            pairs = harness.run_pairs(partial(step_pair, work, steppers), args.pairs)
        summary = harness.summarize(pairs)
        harness.show(f"({name}) {work.title}", summary)
        result = {"title": work.title, "settings": vars(work), "summary": summary, "pairs": pairs}
        harness.write(args.output, f"grpo_{name}", result)


if __name__ == "__main__":
    main()
