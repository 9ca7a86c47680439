"""Dynamic reward weighting: weight that leaves saturated rewards reaches better trade-offs, and in fewer steps."""

from math import prod
from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, mean
from ..rewards.matching import exact_match

VOLUME = Metric("hypervolume")
RATES = {"learning_rate": (1e-3,)}
LONGEST = 9


def accuracy(completions: list[str], answer: list[str], **kwargs) -> list[float]:
    """Hard: what stands after the workings, if there are any, is the sum."""
    return exact_match([text.rpartition(";")[2] for text in completions], answer)


def clarity(completions: list[str], **kwargs) -> list[float]:
    """In between: the answer comes with workings, as in three of ten answers of the start model."""
    return [float(";" in text) for text in completions]


def brevity(completions: list[str], **kwargs) -> list[float]:
    """Easy: there is no more text than workings and answer take, as there hardly ever is from the start."""
    return [float(len(text) <= LONGEST) for text in completions]


REWARDS = (accuracy, clarity, brevity)


def hypervolume(probe: Probe) -> dict[str, float]:
    """Mean of each reward over samples of held-out prompts, and the volume of the box that they span from zero."""
    means = {reward.__name__: fmean(probe.scores(samples=4, reward=reward)) for reward in REWARDS}
    return {"hypervolume": prod(means.values()), **means}


CLAIM = Claim(
    method="dynamic_reward_weighting",
    statement="Weights that follow what each reward's gradient gives all rewards, or advantages scaled by the "
    "hypervolume gained, end at better trade-offs than fixed weights, and get there in fewer steps.",
    figures="MATH-style data, Qwen3-8B and others, GRPO, REINFORCE and RLOO: Pareto-dominant points in fewer steps",
    check="Two-digit sums: the answer should be right (hard), come with workings (learned sooner, and a help to be "
    "right) and be no longer than it has to (saturated). Measured is the hypervolume of the three mean rewards, over "
    "the run and at its end. Fixed weights are equal ones, which the others start from.",
    task="addition",
    task_kwargs={"digits": 2, "workings_share": 0.3, "workings_error_share": 0.3},
    rewards=REWARDS,
    settings={
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": 11,
        "max_steps": 80,
    },
    arms={
        "fixed weights": Arm(grid=RATES),
        "by gradients": Arm(
            methods=("dynamic_reward_weighting",), settings={"weighting_regularization": 0.01}, grid=RATES
        ),
        "by hypervolume": Arm(
            methods=("dynamic_reward_weighting",), settings={"weighting_mode": "hypervolume"}, grid=RATES
        ),
    },
    comparisons=(
        Comparison("by gradients", "fixed weights", Metric("hypervolume", summary=mean), 0.02),
        Comparison("by gradients", "fixed weights", VOLUME, 0.02),
        Comparison("by hypervolume", "fixed weights", Metric("hypervolume", summary=mean), 0.02),
        Comparison("by hypervolume", "fixed weights", VOLUME, 0.02),
    ),
    tune_on=VOLUME,
    measures=(hypervolume,),
    evaluations=5,
    held_out=128,
    logs=tuple(f"dynamic_reward_weighting/{reward.__name__}/weight" for reward in REWARDS),
    findings="Weights by hypervolume are ahead over the run on every seed, +0.045 [+0.007, +0.083], within the "
    "margin's reach; weights by gradients are ahead on three of five. At the end both differ from fixed "
    "weights by less than seeds do. One learning rate for all arms, 1e-3, which the development probes ran "
    "at. This is the third task: on two versions with random words no arm left a hypervolume of 0.02.",
)
