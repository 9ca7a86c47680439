"""The experiment that claims about hints share: sums whose start model nearly always forgets the carries."""

from ..evidence import Metric, Start, greedy_accuracy

ACCURACY = Metric("accuracy")
PER_TOKEN = Metric("accuracy", axis="sampled_tokens")
RATES = {"learning_rate": (2.5e-4, 5e-4)}

# It does not forget those that a hint in the prompt names. Accuracy is measured without hints
HINTED_SUMS = {
    "task": "addition",
    "task_kwargs": {"digits": 2, "hint_share": 0.5},
    "start": Start(error_share=0.99),
    "settings": {
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": 4,
        "max_steps": 80,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 10,
    },
    "tune_on": ACCURACY,
    "measures": (greedy_accuracy,),
}
