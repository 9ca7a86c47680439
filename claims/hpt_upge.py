"""HPT: where rollouts fail, a demonstration teaches what GRPO cannot find; elsewhere rollouts go on teaching."""

from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, Start, mean, sampled_accuracy

ACCURACY = Metric("sampled_accuracy")
CARRY = Metric("carry_accuracy")
RATES = {"learning_rate": (2.5e-4, 5e-4)}


def carry_accuracy(probe: Probe) -> dict[str, float]:
    """`carry_accuracy`, `plain_accuracy`: `sampled_accuracy` of the sums with a carry and of those without."""
    scores = probe.scores(samples=4)
    carries = [carry for carry in map(carries_over, probe.problems["prompt"]) for _ in range(4)]
    return {
        "carry_accuracy": fmean(s for s, carry in zip(scores, carries, strict=True) if carry),
        "plain_accuracy": fmean(s for s, carry in zip(scores, carries, strict=True) if not carry),
    }


def carries_over(prompt: str) -> bool:
    """Whether a sum such as `47+85=` has a column above 9."""
    left, _, right = prompt.removesuffix("=").partition("+")
    return any(int(a) + int(b) > 9 for a, b in zip(left, right, strict=True))


CLAIM = Claim(
    method="hpt_upge",
    statement="Switching, prompt by prompt, to a demonstration where all rollouts fail and to policy gradient "
    "elsewhere ends at a higher accuracy than either alone.",
    figures="Qwen2.5-Math-7B, six maths benchmarks: HPT 52.7, SFT then GRPO 46.5, SFT 44.5, GRPO 43.1",
    check="Two-digit sums. The start model forgets the carries in 90 % of its answers: it solves most sums without, "
    "and of those with a carry one answer in twenty, so that half of the prompts fail in all of eight rollouts. Every "
    "sum has its answer as a demonstration.",
    task="addition",
    task_kwargs={"digits": 2},
    start=Start(error_share=0.9),
    settings={
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 5,
        "max_steps": 60,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
    },
    arms={
        "GRPO": Arm(grid=RATES),
        "HPT": Arm(methods=("hpt_upge",), settings={"hpt_demo_column": "answer"}, grid=RATES),
        "SFT": Arm(
            methods=("hpt_upge",),
            settings={"hpt_demo_column": "answer", "hpt_gate": 1.0},
            grid=RATES,
            note="every prompt demonstrated",
        ),
    },
    comparisons=(
        Comparison("HPT", "GRPO", ACCURACY, 0.02),
        Comparison("HPT", "SFT", ACCURACY, 0.02),
        Comparison("HPT", "GRPO", Metric("sampled_accuracy", summary=mean), 0.02),
        Comparison("HPT", "GRPO", CARRY, 0.02),
    ),
    tune_on=ACCURACY,
    measures=(sampled_accuracy, carry_accuracy),
    evaluations=6,
    logs=("hpt/solve_none", "hpt/solve_all"),
)
