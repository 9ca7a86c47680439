"""Scaf-GRPO: a success with the smallest sufficient hint gets failing groups going."""

from ..evidence import Arm, Claim, Comparison
from .hinted_sums import ACCURACY, HINTED_SUMS, PER_TOKEN, RATES


def strongest_first(trainer_class: type) -> type:
    """The control: the strongest hint alone, instead of the smallest that helps."""

    class StrongestFirst(trainer_class):
        def _hints(self, draft, group):
            return super()._hints(draft, group)[-1:]

    return StrongestFirst


CLAIM = Claim(
    method="scaf_grpo",
    statement="Putting the policy's own success with the smallest sufficient hint into groups that fail, on policy, "
    "raises accuracy without hints above GRPO's.",
    figures="Qwen2.5-Math-7B on AIME24: 30.0 to 43.3 % pass@1; mean of seven benchmarks 45.2 to 50.9",
    check="Sums of two digits. The start model forgets the carries in 99 % of its answers, but those that the prompt "
    "names: first that of the last column, then both. Accuracy is measured greedily on prompts without hints, at "
    "equal sampled tokens.",
    **HINTED_SUMS,
    arms={
        "GRPO": Arm(grid=RATES),
        "Scaf-GRPO": Arm(methods=("scaf_grpo",), grid=RATES),
        "strongest hint": Arm(
            methods=("scaf_grpo",), control=strongest_first, grid=RATES, note="no ladder: always all carries"
        ),
    },
    comparisons=(
        Comparison("Scaf-GRPO", "GRPO", PER_TOKEN, 0.02),
        Comparison("Scaf-GRPO", "GRPO", ACCURACY, 0.02),
        Comparison("Scaf-GRPO", "strongest hint", ACCURACY, 0.02),
    ),
    evaluations=6,
    logs=("scaf/trigger_rate", "scaf/hint_level"),
    findings="As for Guide, whose task this is: GRPO finds the rare right answers on some seeds by itself, and "
    "differences of +0.25, +0.12, -0.03, +0.03 and -0.12 show nothing. A hint is needed for about half of "
    "the groups, the first or the second in equal parts, and costs a tenth more tokens, against half more "
    "for Guide. The ladder is no better than the strongest hint alone: the weak hint names a carry that is "
    "often none.",
)
