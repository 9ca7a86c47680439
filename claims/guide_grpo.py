"""Guide-GRPO: hints for prompts that fail, and learning without them, reach what GRPO alone does not."""

from ..evidence import Arm, Claim, Comparison
from .hinted_sums import ACCURACY, HINTED_SUMS, PER_TOKEN, RATES

# Rounds of fresh prompts serve GRPO as well; without them the arms differ in the hints alone
GUIDE = {"guide_max_resample_batches": 0}

CLAIM = Claim(
    method="guide_grpo",
    statement="Where every completion of a prompt fails, sampling again with a hint and training as if it had not "
    "been there raises accuracy without hints above GRPO's; the importance weighting is needed for that.",
    figures="up to 4 % macro-average over GRPO on maths benchmarks, 7B and 32B",
    check="Sums of two digits. The start model forgets the carries in 99 % of its answers, unless the prompt names "
    "them. Accuracy is measured greedily on prompts without hints, at equal sampled tokens.",
    **HINTED_SUMS,
    arms={
        "GRPO": Arm(grid=RATES),
        "Guide": Arm(methods=("guide_grpo",), settings=GUIDE, grid=RATES),
        "Guide, unweighted": Arm(
            methods=("guide_grpo",),
            settings=GUIDE | {"guide_importance_weighting": False},
            grid=RATES,
            note="the ratio is to the policy without the hint",
        ),
    },
    comparisons=(
        Comparison("Guide", "GRPO", PER_TOKEN, 0.02),
        Comparison("Guide", "GRPO", ACCURACY, 0.02),
        Comparison("Guide", "Guide, unweighted", ACCURACY, 0.02),
    ),
    evaluations=6,
    logs=("guide/reroll_fraction", "guide/hinted_accuracy"),
    findings="At a learning rate of 5e-4 Guide was ahead of GRPO on both development seeds; with each arm's best "
    "rate, five fresh seeds differ by more than the effect: +0.22, +0.17, -0.03, +0.02 and -0.12. On the "
    "development seeds 80 to 99 % of the guided completions are right at first, and fewer groups fail as "
    "training goes on. But GRPO is not stuck here: on three of five seeds it finds the carries by itself "
    "within 80 steps. On seed 3 no arm learns. Without the importance weighting Guide is behind by 0.31 on "
    "one seed, by 0.07 on another, and level on three.",
)
