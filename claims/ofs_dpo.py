"""OFS-DPO: two adapters that chase each other keep a gradient where DPO's fades, and end higher."""

from peft import LoraConfig

from ..evidence import Arm, Claim, Comparison, Metric, Start, greedy_accuracy, kl_to_start

ACCURACY = Metric("accuracy")
MARGIN = Metric("rewards/margins")
CHASE = {"ofs_slow_lr_ratio": 0.3, "ofs_chasing_interval": 10}

CLAIM = Claim(
    method="ofs_dpo",
    statement="DPO's gradient fades once pairs are fitted. A second, slower adapter that it is contrasted with keeps "
    "one alive, and the policy ends better at equal steps.",
    figures="ahead of DPO on summaries, dialogue and sentiment in the domain trained on (figures not confirmed)",
    check="Sorting; the rejected answer swaps two neighbors of the chosen one. LoRA of rank 8 on a model that half "
    "knows the task, at equal steps and rate, which is twice the cost for two adapters. Measured is greedy accuracy, "
    "with the divergence from the start beside it, also against two adapters without chase.",
    task="sorting",
    start=Start(steps=800),
    settings={
        "per_device_train_batch_size": 64,
        "max_steps": 50,
        "learning_rate": 3e-4,
        "beta": 1.0,
        "max_grad_norm": 1e9,
    },
    trainer_kwargs={"peft_config": LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")},
    arms={
        "DPO": Arm(),
        "OFS-DPO": Arm(methods=("ofs_dpo",), settings={**CHASE, "ofs_alpha": 0.3}),
        "no chase": Arm(methods=("ofs_dpo",), settings={**CHASE, "ofs_alpha": 0.0}, note="two adapters, α = 0"),
    },
    comparisons=(
        Comparison("OFS-DPO", "DPO", ACCURACY, 0.02),
        Comparison("OFS-DPO", "no chase", ACCURACY, 0.02),
        Comparison("OFS-DPO", "DPO", MARGIN, 0.1),
        Comparison("OFS-DPO", "DPO", Metric("kl", "lower"), 0.2),
    ),
    tune_on=ACCURACY,
    measures=(greedy_accuracy, kl_to_start),
    evaluations=2,
    logs=("ofs/role", "ofs/margin_gap", "ofs/grad_norm_default", "ofs/grad_norm_slow"),
    findings="Greedy accuracy differs by no more than 0.02 on any seed; the margin of the pairs is larger than DPO's "
    "on every seed, as the chase demands, at little more divergence. On the development seed the two "
    "adapters never exchanged their roles in a run as short as these.",
)
