"""Lp-Reg: protecting low-probability tokens keeps exploration alive, and with it the gain in accuracy."""

from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, mean, sampled_accuracy

ACCURACY = Metric("sampled_accuracy")
RATES = {"learning_rate": (5e-4, 1e-3)}


def workings_share(probe: Probe) -> dict[str, float]:
    """`workings`: share of sampled completions that give workings, which the start model does in 5 % of its own."""
    return {"workings": fmean(float(";" in text) for text in probe.texts(samples=4))}


CLAIM = Claim(
    method="lp_reg",
    statement="Penalizing the loss of low-probability tokens that are not noise sustains exploration: rare but useful "
    "ways to begin an answer survive, entropy stays up, and accuracy ends higher than under GRPO.",
    figures="60.17 % over five maths benchmarks (Qwen3-14B-Base), 2.66 points above the best earlier method",
    check="Two-digit sums. In 5 % of its answers the start model writes the columns' sums first and is then right; "
    "its direct answers forget the carries in 60 %. Measured is whether the rare way survives, and what it is worth.",
    task="addition",
    task_kwargs={"digits": 2, "workings_share": 0.05},
    settings={
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 12,
        "max_steps": 100,
    },
    arms={
        "GRPO": Arm(grid=RATES),
        "Lp-Reg": Arm(methods=("lp_reg",), grid=RATES),
        "GRPO + entropy bonus": Arm(settings={"entropy_coef": 0.01}, grid=RATES),
    },
    comparisons=(
        Comparison("Lp-Reg", "GRPO", ACCURACY, 0.02),
        Comparison("Lp-Reg", "GRPO", Metric("workings", summary=mean), 0.05, guards={ACCURACY: 0.03}),
        Comparison("Lp-Reg", "GRPO", Metric("entropy", summary=mean), 0.02, guards={ACCURACY: 0.03}),
        Comparison("Lp-Reg", "GRPO + entropy bonus", ACCURACY, 0.02),
    ),
    tune_on=ACCURACY,
    measures=(sampled_accuracy, workings_share),
    findings="What was found: GRPO itself does not lose the rare way within 100 steps (on average 6 % of the answers, "
    "from 4 % at the start), so that there is nothing to protect, and direct answers alone reach 95 %. The logged "
    "entropy covers the rows that are computed, which the entropy bonus makes all rows: its curve does not compare. "
    "Longer runs, and a task that needs the rare way, have not been tried yet.",
)
