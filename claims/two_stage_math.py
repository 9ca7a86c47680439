"""Two-stage recipe: after SFT on long traces, GRPO with length rewards shortens answers at no cost in accuracy."""

from ..evidence import Arm, Claim, Comparison, Metric, Start, mean, sampled_accuracy

ACCURACY = Metric("sampled_accuracy")
LENGTH = Metric("length", "lower")
RATES = {"learning_rate": (2e-4, 5e-4)}

CLAIM = Claim(
    method="two_stage_math",
    statement="SFT on long right answers first makes a model accurate; a short GRPO stage whose rewards favor short "
    "right answers then cuts their length without losing accuracy, which GRPO on accuracy alone does not.",
    figures="14B, AIME24 at 16k tokens: 61.0 to 66.7 with 8,017 mean tokens instead of 9,708 (-17 %); at 32k -25 %",
    check="The start model is the first stage: SFT on right two-digit sums, 60 % of them with workings (10 tokens "
    "instead of 4), so that both ways are known. The second stage is GRPO on accuracy, with and without the two "
    "length rewards. A quarter of the length is about two tokens.",
    task="addition",
    task_kwargs={"digits": 2, "workings_share": 0.6},
    start=Start(error_share=0.0),
    settings={
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 12,
        "max_steps": 100,
    },
    arms={
        "GRPO on accuracy": Arm(grid=RATES),
        "two stages": Arm(methods=("two_stage_math",), grid=RATES),
    },
    comparisons=(
        Comparison("two stages", "GRPO on accuracy", LENGTH, 2.0, guards={ACCURACY: 0.03}),
        Comparison("two stages", "GRPO on accuracy", ACCURACY, 0.02),
        Comparison("two stages", "GRPO on accuracy", Metric("length", "lower", mean), 2.0),
    ),
    tune_on=ACCURACY,
    measures=(sampled_accuracy,),
    evaluations=6,
    logs=("two_stage_math/length_of_right", "two_stage_math/length_of_wrong"),
    findings="The length rewards do shorten: -3.3 tokens of about 8.6 at the end, on every seed, where GRPO on "
    "accuracy alone lengthens a little. That is 40 %, more than the paper's quarter. But 3.5 points of "
    "accuracy go with it, with an interval that reaches below the 3 points that the guard allows, so that "
    "the claim as stated is not shown.",
)
