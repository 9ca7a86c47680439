"""DLER: with a hard length limit, whitening and refilled groups keep accuracy while answers shorten."""

from ..evidence import Arm, Claim, Comparison, Metric, mean, sampled_accuracy, sampled_entropy

ACCURACY = Metric("sampled_accuracy")
LENGTH = Metric("length", "lower")
RATES = {"learning_rate": (5e-4, 1e-3)}
LIMIT = 6
# DLER without all but its limit
TRUNCATION = {
    "dler_truncation_length": LIMIT,
    "dler_advantage_whitening": "none",
    "dler_dynamic_sampling": False,
    "epsilon_high": 0.2,
    "delta": None,
    "beta": 0.0,
}

CLAIM = Claim(
    method="dler",
    statement="Given a hard limit on the length, token-wise whitening over the batch, refilled groups and a higher "
    "clip bound keep accuracy and entropy up where plain GRPO loses them, while answers become much shorter.",
    figures="R1-7B: 2,405 tokens (-69 %), AIME24 55.62 against 55.40 before; R1-1.5B: -77 %, 34.38 against 29.79",
    check="Two-digit sums. Most answers of the start model give workings (10 tokens) and are nearly always right; "
    "direct ones (4 tokens) forget the carries in 60 %. Beyond 6 tokens there is no reward.",
    task="addition",
    task_kwargs={"digits": 2, "workings_share": 0.8, "workings_error_share": 0.05},
    settings={
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 12,
        "max_steps": 100,
    },
    arms={
        "GRPO + truncation": Arm(methods=("dler",), settings=TRUNCATION, grid=RATES),
        "DLER": Arm(methods=("dler",), settings={"dler_truncation_length": LIMIT}, grid=RATES),
        "GRPO": Arm(grid=RATES, note="no limit"),
    },
    comparisons=(
        Comparison("DLER", "GRPO + truncation", ACCURACY, 0.02, guards={LENGTH: 0.5}),
        Comparison("DLER", "GRPO + truncation", Metric("sampled_accuracy", summary=mean), 0.02),
        Comparison("DLER", "GRPO + truncation", Metric("sampled_accuracy", axis="sampled_tokens"), 0.02),
        Comparison("DLER", "GRPO + truncation", Metric("sampled_entropy", summary=mean), 0.02),
        Comparison("DLER", "GRPO", LENGTH, 1.0, guards={ACCURACY: 0.05}),
    ),
    tune_on=ACCURACY,
    measures=(sampled_accuracy, sampled_entropy),
    findings="Both arms with a limit give up the workings (4 tokens instead of 10) and with them much of the "
    "accuracy, since the tiny model adds less well without. On two of the five seeds its direct answers are "
    "hardly ever right, and both arms end near 0; on the other three DLER is ahead by 0.00, 0.08 and 0.15. "
    "DLER also loses entropy at first, since the tuning chose twice the learning rate for it. That accuracy "
    "is kept while answers shrink, the paper's main claim, needs a model that can compress its workings, "
    "which was not found among the tiny ones.",
)
