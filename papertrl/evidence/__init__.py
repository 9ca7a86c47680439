"""Small experiments that show whether a paper's claim holds here; the claims themselves are in `papertrl.claims`."""

from .claim import Arm, Claim, Comparison, Metric, Start, claimed, load_claim
from .probe import Probe, greedy_accuracy, kl_to_start, sampled_accuracy, sampled_entropy
from .verdict import change, final, maximum, mean, reaching

__all__ = [
    "Arm",
    "Claim",
    "Comparison",
    "Metric",
    "Probe",
    "Start",
    "change",
    "claimed",
    "final",
    "greedy_accuracy",
    "kl_to_start",
    "load_claim",
    "maximum",
    "mean",
    "reaching",
    "sampled_accuracy",
    "sampled_entropy",
]
