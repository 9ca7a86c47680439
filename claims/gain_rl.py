"""GAIN-RL: prompts ordered by the model's own angles are learned in fewer rollouts."""

import torch

from ..evidence import Arm, Claim, Comparison, Metric, mean, reaching, sampled_accuracy

ACCURACY = Metric("sampled_accuracy")
REACH = Metric("sampled_accuracy", "lower", reaching(0.6), axis="sampled_tokens")
RATES = {"learning_rate": (5e-4, 1e-3)}
# The paper's σ = 1000 and s = 500 belong to some 10,000 prompts; as shares they fit any number
WINDOW = {"gain_sigma": 0.15, "gain_step": 0.05, "gain_shift_max": 0.1}


def shuffled_order(trainer_class: type) -> type:
    """The control: the same moving window over prompts in random order."""

    class ShuffledOrder(trainer_class):
        def _prompt_order(self):
            return torch.randperm(len(self.train_dataset), generator=torch.Generator().manual_seed(self.args.seed))

    return ShuffledOrder


CLAIM = Claim(
    method="gain_rl",
    statement="Prompts whose token vectors point closest together teach most; going from them to the others, at the "
    "pace that accuracy sets, reaches the same accuracy in fewer rollouts than uniform sampling.",
    figures="over 2.5 times faster to GRPO's accuracy on maths and code; better with half of the data",
    check="Sums of one to three digits. Measured is the share of the rollouts after which 60 % of the held-out "
    "samples are right, for uniform sampling, GAIN-RL, and the same moving window over shuffled prompts.",
    task="addition",
    task_kwargs={"digits": 3, "min_digits": 1},
    settings={
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 6,
        "max_steps": 150,
    },
    arms={
        "uniform": Arm(grid=RATES),
        "GAIN-RL": Arm(methods=("gain_rl",), settings=WINDOW, grid=RATES),
        "shuffled order": Arm(methods=("gain_rl",), settings=WINDOW, control=shuffled_order, grid=RATES),
    },
    comparisons=(
        Comparison("GAIN-RL", "uniform", REACH, 0.05),
        Comparison("GAIN-RL", "shuffled order", REACH, 0.05),
        Comparison("GAIN-RL", "uniform", Metric("sampled_accuracy", summary=mean), 0.02),
        Comparison("GAIN-RL", "uniform", ACCURACY, 0.02),
    ),
    tune_on=ACCURACY,
    measures=(sampled_accuracy,),
    train_problems=2000,
    evaluations=15,
    findings="The premise does not carry over to this model: its angles put the hard sums first. On the two "
    "development seeds the place in GAIN-RL's order correlates with the start model's success by +0.15 and "
    "+0.39 (Spearman; the method expects a negative one), and the median place of sums of one digit is "
    "behind that of three digits. Prompts of 4 to 8 tokens of a two-layer model have little angle to tell "
    "apart. Two of five seeds do not reach 60 % under any arm, so that their difference is 0. A larger "
    "model with longer prompts has not been tried.",
)
