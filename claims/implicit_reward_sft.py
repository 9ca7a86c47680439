"""Implicit-reward SFT: a concave utility, or a low rate, in the SFT stage leaves more to a DPO stage after it."""

import random
import tempfile
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch
from transformers import PrinterCallback

from ..evidence import Arm, Claim, Comparison, Metric, Probe, Start, kl_to_start

AFTER_DPO = Metric("after_dpo")
KEPT = Metric("kept")
KL = Metric("kl", "lower")
USUAL_RATE = 1e-3
DPO_SEED = 20_250_630
TAUGHT = "sorting"


def noisy_sorting(task, problems, seed):
    """Demonstrations of one of two domains that the start model half knows, a fifth of them wrong."""
    taught = task.generate(2 * problems, seed).filter(lambda row: row["domain"] == TAUGHT)
    return task.supervised(taught.select(range(min(problems, len(taught)))), error_share=0.2, seed=seed)


def accuracies(probe: Probe) -> dict[str, float]:
    """`taught` and `kept`: greedy accuracy on the domain that is trained on, and on the other one."""
    scores = probe.scores(temperature=0.0)
    by_domain = {True: [], False: []}
    for score, domain in zip(scores, probe.problems["domain"], strict=True):
        by_domain[domain == TAUGHT].append(score)
    return {name: float(np.mean(by_domain[own])) for name, own in (("taught", True), ("kept", False))}


def after_dpo(probe: Probe) -> dict[str, float]:
    """`after_dpo`: accuracy on the taught domain of a copy of the model after a short DPO stage, the same for all."""
    from ..trainers.preference.base import PreferenceConfig, PreferenceTrainer

    # A trainer patches the forward of its model, which a copy would share
    policy, reference = (deepcopy(probe.start_model).train() for _ in range(2))
    for model in (policy, reference):
        model.load_state_dict(probe.model.state_dict())
    states = random.getstate(), np.random.get_state()
    problems = probe.task.generate(4000, DPO_SEED).filter(lambda row: row["domain"] == TAUGHT)
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as output:
        trainer = PreferenceTrainer(
            policy,
            reference,
            PreferenceConfig(
                output,
                beta=1.0,
                learning_rate=3e-5,
                lr_scheduler_type="constant",
                max_steps=40,
                per_device_train_batch_size=64,
                seed=DPO_SEED,
                bf16=False,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=probe.task.preference(problems),
            processing_class=probe.tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    random.setstate(states[0])
    np.random.set_state(states[1])
    tuned = replace(probe, model=policy.eval(), _samples={})
    return {"after_dpo": accuracies(tuned)["taught"]}


PEARSON = {"implicit_divergence": "pearson_chi2", "implicit_divergence_level": "sequence", "implicit_beta": 0.5}
SLOW = {"learning_rate": USUAL_RATE / 4}

CLAIM = Claim(
    method="implicit_reward_sft",
    statement="SFT's linear utility of the implicit reward sets no limit to how far it goes from its start. A clearly "
    "lower learning rate does, and a concave utility too: both leave a model that a DPO stage makes better.",
    figures="a lower rate: up to 25 % relative and 6 points absolute of win rate in instruction following; "
    "f-divergence SFT improves the model after DPO further (from the abstract)",
    check="A model that half knows how to sort and how to walk an automaton is tuned on 400 sorted strings, a fifth "
    "of them wrong, at a rate usual for its size and at a quarter of it, by SFT and by the Pearson utility of the "
    "sequence's reward (β = 0.5). The last measurement trains a copy by DPO, alike for all arms, on 40 batches of "
    "clean pairs of sorted strings. Measured are accuracy on held-out strings after DPO, and before it the accuracy "
    "on the automaton, which is not trained, and the divergence from the start.",
    task="mixture",
    task_kwargs={"weights": {"sorting": 1.0, "automaton": 1.0}, "easy_share": 0.0},
    start=Start(steps=800, error_share=0.5),
    data=noisy_sorting,
    train_problems=400,
    held_out=400,
    settings={"per_device_train_batch_size": 64, "max_steps": 100, "learning_rate": USUAL_RATE},
    arms={
        "SFT": Arm(),
        "SFT, low rate": Arm(settings=SLOW, note="a quarter"),
        "Pearson": Arm(methods=("implicit_reward_sft",), settings=PEARSON),
        "Pearson, low rate": Arm(methods=("implicit_reward_sft",), settings={**PEARSON, **SLOW}),
    },
    comparisons=(
        Comparison("Pearson, low rate", "SFT", AFTER_DPO, 0.03, guards={KEPT: 0.03}),
        Comparison("SFT, low rate", "SFT", AFTER_DPO, 0.03, guards={KEPT: 0.03}),
        Comparison("Pearson", "SFT", AFTER_DPO, 0.03, guards={KEPT: 0.03}),
        Comparison("Pearson, low rate", "SFT, low rate", AFTER_DPO, 0.03, guards={KEPT: 0.03}),
        Comparison("Pearson", "SFT", KL, 0.2),
        Comparison("Pearson", "SFT", KEPT, 0.03),
    ),
    tune_on=AFTER_DPO,
    measures=(accuracies, kl_to_start, after_dpo),
    evaluations=1,
    logs=("implicit_reward/mean", "implicit_reward/slope"),
    findings="Accuracy after DPO is higher than SFT's on every seed for both remedies together; the low rate alone "
    "does not do it, Pearson at the usual rate nearly does. Seeds 0 to 4 had been used for a first design, "
    "with noisy sums in place of sorted strings (all arms within 0.02 of each other after DPO on average, "
    "Pearson's divergence smaller by 0.83 [0.36, 1.30] nats), and then gave +0.053 [0.024, 0.082] with this "
    "one, just not shown; hence seeds 10 to 14. The task had been replaced, for what development seeds "
    "showed, before the first result was known.",
)
