"""ASFT: weights and an anchor keep what a model knows while it learns from partly wrong labels."""

from ..evidence import Arm, Claim, Comparison, Metric, Start, greedy_accuracy, kl_to_start

ACCURACY = Metric("accuracy")
KL = Metric("kl", "lower")
RATES = {"learning_rate": (2e-4, 5e-4)}


def noisy_labels(task, problems, seed):
    """A small training set, three of ten labels wrong."""
    return task.supervised(task.generate(problems, seed), error_share=0.3, seed=seed)


CLAIM = Claim(
    method="asft",
    statement="Weighing each label by its own probability ignores labels that contradict what the model knows, and "
    "anchoring it to its start prevents the drift that the weights alone allow: ASFT beats SFT and DFT.",
    figures="ahead of SFT and DFT on mathematics, medicine and code, with little overhead (figures not verified here)",
    check="A model that knows two-digit sums is tuned on 300 of them, 30 % with forgotten carries. Measured is clean "
    "held-out accuracy, and the divergence from the start.",
    task="addition",
    task_kwargs={"digits": 2},
    start=Start(steps=2400, error_share=0.0),
    data=noisy_labels,
    train_problems=300,
    settings={"per_device_train_batch_size": 32, "max_steps": 300},
    arms={
        "SFT": Arm(grid=RATES),
        "ASFT": Arm(methods=("asft",), grid=RATES),
        "DFT": Arm(methods=("asft",), settings={"asft_anchor_coef": 0.0}, grid=RATES),
    },
    comparisons=(
        Comparison("ASFT", "SFT", ACCURACY, 0.05),
        Comparison("ASFT", "DFT", ACCURACY, 0.02),
        Comparison("ASFT", "DFT", KL, 0.02),
    ),
    tune_on=ACCURACY,
    measures=(greedy_accuracy, kl_to_start),
    findings="The check is about what is kept: the start model already knows all of the task, so that not to train at "
    "all would be best, and ASFT comes closest to that. Starts that know half of it (wrong labels in half of their "
    "demonstrations, or a quarter of the warm-up) were tried on a development seed; 1000 labels with 30 % errors "
    "taught none of the arms anything there, so that nothing is claimed about learning.",
)
