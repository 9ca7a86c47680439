"""Sem-DPO: pairs whose winner strays from the prompt count less, so that style is learned and content kept."""

from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, Start, kl_to_start
from ..tasks import rewrite

OVERLAP = Metric("overlap")
STYLE = Metric("style")
BETA = {"beta": (0.3,)}


def style_and_overlap(probe: Probe) -> dict[str, float]:
    """
    Means over four samples a prompt. `style`: share of the kinds of marks; `overlap`: cosine between the letters of
    prompt and rewrite.
    """
    texts = probe.texts(samples=4)
    prompts = [prompt for prompt in probe.problems["prompt"] for _ in range(4)]
    return {
        "style": fmean(map(rewrite.style, texts)),
        "overlap": fmean(map(rewrite.overlap, prompts, texts)),
    }


CLAIM = Claim(
    method="sem_dpo",
    statement="DPO on pairs that only style decides learns to change what the prompt means; with pairs weighted by "
    "how near the winner stays to the prompt, meaning is kept at the same style.",
    figures="8 to 12 % higher CLIP similarity, 5 to 9 % higher HPSv2.1 and PickScore than DPO (Qwen-1.5B and GPT-2)",
    check="Letters to repeat with marks of style. Winners have more marks, and other letters in 40 % of the pairs, "
    "losers in 20 %. The encoder counts characters. Measured is the overlap of letters in samples, with style as "
    "guard.",
    task="rewrite",
    settings={"per_device_train_batch_size": 64, "max_steps": 50, "learning_rate": 3e-4},
    arms={
        "DPO": Arm(grid=BETA),
        "Sem-DPO": Arm(
            methods=("sem_dpo",), settings={"sem_alpha": 2.0, "sem_encoder": "characters"}, grid=BETA, note="α = 2"
        ),
        "DPO, half the learning rate": Arm(settings={"learning_rate": 1.5e-4}, grid=BETA),
    },
    comparisons=(
        Comparison("Sem-DPO", "DPO", OVERLAP, 0.05, guards={STYLE: 0.05}),
        Comparison("Sem-DPO", "DPO, half the learning rate", OVERLAP, 0.05, guards={STYLE: 0.05}),
    ),
    tune_on=STYLE,
    measures=(style_and_overlap, kl_to_start),
    start=Start(steps=1000, error_share=0.2),
    evaluations=5,
    logs=("sem_dpo/weight", "sem_dpo/distance"),
    findings="Samples of Sem-DPO keep an overlap of 0.86 to 0.90, about that of the start model; DPO's falls to "
    "between 0.66 and 0.77 on every seed, also at half the learning rate. Style is within 0.02 of DPO's on "
    "four seeds and 0.09 below it on one, so that the guard leaves it open whether style is kept.",
)
