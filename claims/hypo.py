"""HyPO: a penalty on the policy's own samples bounds the divergence that offline pairs leave free."""

from math import log
from statistics import fmean

from ..evidence import Arm, Claim, Comparison, Metric, Probe, kl_to_start, sampled_accuracy

SCORE = Metric("sampled_accuracy")
KL = Metric("log_kl", "lower")
COVERED = 2
BETAS = {"beta": (0.05, 0.1)}


def uncovered_share(probe: Probe) -> dict[str, float]:
    """`uncovered`: share of sampled completions whose first letter no offline pair begins with."""
    covered = "abcdefghijkl"[:COVERED]
    return {"uncovered": fmean(float(text[:1] not in covered) for text in probe.texts(samples=4))}


def divergence(probe: Probe) -> dict[str, float]:
    """`kl` as in `kl_to_start`, and `log_kl`, its logarithm: divergences of seeds differ by factors."""
    kl = kl_to_start(probe)["kl"]
    return {"kl": kl, "log_kl": log(max(kl, 1e-3))}


CLAIM = Claim(
    method="hypo",
    statement="Offline pairs bound the divergence only where they cover what the policy can say; a reverse-KL penalty "
    "on samples of the policy bounds it everywhere, at equal or higher reward.",
    figures="TL;DR: win rate 46.4 against 42.2 and KL 27.1 against 44.9 (Pythia-1.4B, HyPO against DPO; recalled)",
    check="Words that must contain a marker; all offline pairs begin with one of two letters of eight. Measured is "
    "the reverse KL to the start model by samples, on a logarithmic scale, with the true reward as guard.",
    task="marker",
    task_kwargs={"covered": COVERED},
    settings={"per_device_train_batch_size": 64, "max_steps": 120, "learning_rate": 3e-4},
    arms={
        "DPO": Arm(grid=BETAS),
        "HyPO": Arm(
            methods=("hypo",),
            settings={"hypo_kl_coef": 0.05, "hypo_kl_num_samples": 4, "hypo_kl_max_new_tokens": 13},
            grid=BETAS,
        ),
        "DPO, β tripled": Arm(grid={"beta": (0.15, 0.3)}),
    },
    comparisons=(
        Comparison("HyPO", "DPO", KL, 0.4, guards={SCORE: 0.03}),
        Comparison("HyPO", "DPO", SCORE, 0.02),
        Comparison("HyPO", "DPO, β tripled", KL, 0.4, guards={SCORE: 0.03}),
    ),
    tune_on=SCORE,
    measures=(sampled_accuracy, divergence, uncovered_share),
    findings="Measured first on seeds 0 to 4 without the logarithm: every difference favored HyPO (-2.6 to -16.9 "
    "nats), but one seed of DPO that diverged by 17 nats made the interval wider than the mean (-6.1 "
    "[-13.6, +1.3]). Divergences differ by factors, so that their logarithm is compared now, on seeds not "
    "seen before: HyPO's is about a quarter of DPO's. The reward is not higher, and hardly rises under any "
    "arm: the tiny model learns the marker in few words. Against DPO with β tripled the divergence is "
    "smaller too, but the loss of reward may be larger than the margin.",
)
