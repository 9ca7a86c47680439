"""Constrained RLHF: two correlated rewards are held where they still track a trusted score, not driven past it."""

from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, Start

TRUSTED = Metric("trusted")
PENALTIES = {"beta": (0.3, 1.0)}
CONSTRAINED = {"constraint_thresholds": {"a_share": 0.4, "vowel_share": 0.6}, "constraint_lagrange_lr": 0.3}


def share(text: str, letters: str) -> float:
    """Share of the text's letters that are among `letters`; 0 for no text."""
    return sum(letter in letters for letter in text) / max(1, len(text))


def a_share(completions: list[str], **kwargs) -> list[float]:
    """First proxy: the share of `a`."""
    return [share(text, "a") for text in completions]


def vowel_share(completions: list[str], **kwargs) -> list[float]:
    """Second proxy, correlated with the first: the share of vowels."""
    return [share(text, "aei") for text in completions]


def trusted(probe: Probe) -> dict[str, float]:
    """
    `trusted`: 1 − 4 (share of `a` − 0.4)² − 4 (share of vowels − 0.6)² of samples, and the mean shares.

    Both proxies track it from the start model, a twelfth and a quarter, up to their proxy points.
    """
    pairs = [(share(text, "a"), share(text, "aei")) for text in probe.texts(samples=4)]
    scores = [1 - 4 * (a - 0.4) ** 2 - 4 * (vowels - 0.6) ** 2 for a, vowels in pairs]
    return {"trusted": fmean(scores), "a": fmean(a for a, _ in pairs), "vowels": fmean(v for _, v in pairs)}


CLAIM = Claim(
    method="constrained_rlhf",
    statement="A weighted sum of rewards is driven past the points up to which they track what is wanted. Holding "
    "each at such a point, by a learned weight, avoids the decline; equalities (ξ) do so most reliably.",
    figures="DailyDialog, GPT-2, METEOR and an intent score: plots only",
    check="Words of random letters; the proxies are the shares of `a` and of vowels, the trusted score falls beyond "
    "shares of 0.4 and 0.6. The constrained arms are told these points, as in the paper's main comparison. All arms "
    "choose their divergence penalty by the trusted score.",
    task="marker",
    task_kwargs={"letters": 12, "max_length": 7},
    rewards=(a_share, vowel_share),
    settings={
        "per_device_train_batch_size": 64,
        "num_generations": 8,
        "max_completion_length": 8,
        "learning_rate": 5e-4,
        "max_steps": 100,
    },
    arms={
        "GRPO": Arm(grid=PENALTIES),
        "ξ-GRPO": Arm(methods=("constrained_rlhf",), settings=CONSTRAINED, grid=PENALTIES),
        "μ-GRPO": Arm(
            methods=("constrained_rlhf",),
            settings={**CONSTRAINED, "constraint_mode": "inequality"},
            grid=PENALTIES,
        ),
    },
    comparisons=(
        Comparison("ξ-GRPO", "GRPO", TRUSTED, 0.05),
        Comparison("μ-GRPO", "GRPO", TRUSTED, 0.05),
        Comparison("ξ-GRPO", "μ-GRPO", TRUSTED, 0.05),
    ),
    tune_on=TRUSTED,
    measures=(trusted,),
    start=Start(steps=300),
    evaluations=5,
    held_out=128,
    findings="ξ holds against GRPO, by +0.12 of the trusted score and on every seed; μ is ahead on every seed as "
    "well, by less than the margin can confirm. All arms choose the stronger of two divergence penalties "
    "but μ. The setup was chosen on one development seed with about ten runs of the constrained arms and "
    "five of GRPO, so that it is tuned in favor of the former beyond what the grid shows. Without a penalty "
    "the shares swing around their thresholds, by as much as they were below at the start, whatever the "
    "step size of the multipliers: the standardized divergence pulls back with the same force at any "
    "distance, so that policy and multiplier are two integrators in a loop. A penalty whose pull grows with "
    "the distance damps the swing; hence the common grid.",
)
