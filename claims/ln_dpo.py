"""LN-DPO: log-ratios per token give shorter answers of equal quality."""

from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, kl_to_start, sampled_accuracy

SCORE = Metric("sampled_accuracy")
LENGTH = Metric("length", "lower")
MARKER = Metric("marker")


def marker_share(probe: Probe) -> dict[str, float]:
    """`marker`: share of sampled completions that contain the marker, whatever their length."""
    prompts = [prompt for prompt in probe.problems["prompt"] for _ in range(4)]
    return {
        "marker": fmean(float(p[0] + p[3] in text) for p, text in zip(prompts, probe.texts(samples=4), strict=True))
    }


CLAIM = Claim(
    method="ln_dpo",
    statement="DPO on log-ratios divided by the length gives shorter answers than DPO at equal or better quality.",
    figures="shorter responses than DPO at equal or better quality, and more stable across β",
    check="Words that must contain a marker. In 80 % of the pairs the chosen word is the longer one, though length "
    "adds nothing to quality. Length is compared, with the share of words that have the marker as guard.",
    task="marker",
    task_kwargs={"longer_share": 0.8, "cost": 0.0},
    settings={"per_device_train_batch_size": 64, "max_steps": 120, "learning_rate": 5e-4},
    arms={
        "DPO": Arm(grid={"beta": (0.05, 0.1, 0.5)}),
        "LN-DPO": Arm(methods=("ln_dpo",), grid={"beta": (0.5, 2.0, 8.0)}),
        "DPO, half the learning rate": Arm(settings={"learning_rate": 2.5e-4}, grid={"beta": (0.05, 0.1, 0.5)}),
    },
    comparisons=(
        Comparison("LN-DPO", "DPO", LENGTH, 0.2, guards={MARKER: 0.03}),
        Comparison("LN-DPO", "DPO", MARKER, 0.02),
        Comparison("LN-DPO", "DPO, half the learning rate", LENGTH, 0.2, guards={MARKER: 0.03}),
    ),
    tune_on=MARKER,
    measures=(marker_share, sampled_accuracy, kl_to_start),
    findings="Answers grow under every arm, from 8 tokens to between 9 and 12: the pairs prefer length, and the tiny "
    "model learns that sooner than the marker. DPO's shorter mean comes from seeds in which it breaks down to short "
    "words, not from ignoring length. On a development seed, a fifth of the learning rate keeps DPO from breaking "
    "down, and both then end between 11.3 and 12.6 tokens at every β tried. The start model finds the marker in a "
    "tenth of its words; a task that it masters better has not been tried.",
)
