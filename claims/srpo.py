"""SRPO: answers that the trained model revises, against DPO's answers."""

import random
from statistics import fmean

import torch
from datasets import Dataset

from ..evaluation.revision import revise
from ..evidence import Arm, Claim, Comparison, Metric, Probe, Start
from ..tasks import Task
from ..tasks.sorting import bubble_sorted

REVISIONS = 3
TEMPLATE = "{answer}="
REACHED = Metric("reached")
ANSWER = Metric("answer")
GAIN = Metric("gain")


def attempts(task: Task, n: int, seed: int) -> Dataset:
    """Pairs of two attempts at the same problem, of which the chosen one stopped the bubble sort later."""
    rng = random.Random(seed)
    rows = []
    for prompt in task.generate(n, seed)["prompt"]:
        stages = list(dict.fromkeys(bubble_sorted(prompt.removesuffix("="), k) for k in range(task.length)))
        if len(stages) > 1:
            worse, better = sorted(rng.sample(range(len(stages)), 2))
            rows.append({"prompt": prompt, "chosen": stages[better], "rejected": stages[worse]})
    return Dataset.from_list(rows)


def revised(probe: Probe) -> dict[str, float]:
    """
    Share of right answers to held-out prompts, sampled (`answer`), and of such answers after one to three revisions
    (`revision_1` …); `gain` is what the last revision has over the first answer, `reached` the best of
    all.
    """
    prompts, answers = list(probe.problems["prompt"]), list(probe.problems["answer"])
    with torch.random.fork_rng():
        drafts = revise(
            probe.model,
            probe.tokenizer,
            prompts,
            REVISIONS,
            TEMPLATE,
            max_new_tokens=probe.max_new_tokens,
            seed=20_240_607,
        )
    right = [
        fmean(probe.task.score(texts[k], answer) for texts, answer in zip(drafts, answers, strict=True))
        for k in range(REVISIONS + 1)
    ]
    shares = {f"revision_{k}": right[k] for k in range(1, REVISIONS + 1)}
    return {"answer": right[0], **shares, "gain": right[-1] - right[0], "reached": max(right)}


CLAIM = Claim(
    method="srpo",
    statement="Trained as its own improver, a model revises its answers at inference to better ones than DPO gives.",
    figures="XSum out of distribution: win rate 90 % against human summaries after 5 revisions, 15 points above DPO",
    check="Sorting; pairs are two attempts that stopped a bubble sort at different sweeps. Measured is the share of "
    "right answers, sampled, at the best of zero to three revisions; DPO's model is asked to revise as well. The "
    "improver is asked to sort the answer, which the start model knows how to do.",
    task="sorting",
    data=attempts,
    settings={"per_device_train_batch_size": 32, "max_steps": 60, "learning_rate": 1e-4},
    arms={
        "DPO": Arm(settings={"beta": 0.5}),
        "SRPO": Arm(methods=("srpo",), settings={"beta": 0.1, "srpo_revision_template": TEMPLATE}),
        "IPO": Arm(settings={"beta": 1.0, "loss_type": "ipo"}),
    },
    comparisons=(
        Comparison("SRPO", "DPO", REACHED, 0.05),
        Comparison("SRPO", "DPO", GAIN, 0.05),
        Comparison("SRPO", "DPO", ANSWER, 0.02),
        Comparison("SRPO", "IPO", REACHED, 0.05),
    ),
    tune_on=REACHED,
    measures=(revised,),
    start=Start(steps=600),
    evaluations=5,
    findings="The difference to DPO is 0.05 to 0.18 by seed in favor of SRPO, and comes from revisions, whose "
    "ability SRPO keeps and DPO loses: its first answers are no better. IPO, which is asked to revise as "
    "well, reaches as much. Seeds 0 to 4 had been used for a first design, in which DPO at a low β broke "
    "down (0.37 [0.29, 0.46] in SRPO's favor), and then gave +0.10 [0.02, 0.17] with this one; hence seeds "
    "10 to 14.",
)
