"""Program of `test_distributed`: short runs whose logs and final weights go to folders."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import disable_progress_bars
from safetensors.torch import save_file

from papertrl import AsftSFTTrainer, ImplicitRewardSFTTrainer
from papertrl.models.tiny import tiny_tokenizer

from .sums import history, make, weights

RUNS = {
    "asft": (AsftSFTTrainer, {"asft_anchor_coef": 0.5}),
    "implicit_reward_sft": (ImplicitRewardSFTTrainer, {"implicit_divergence_level": "sequence"}),
}


def run(root: Path, batch_size: int) -> None:
    for name, (trainer_class, options) in RUNS.items():
        folder = root / name
        trainer = make(
            trainer_class,
            trainer_class.config_class,
            tiny_tokenizer(),
            folder,
            optim="sgd",
            learning_rate=0.5,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=2,
            **options,
        )
        assert trainer.accelerator.num_processes == int(os.environ.get("WORLD_SIZE", "1"))
        trainer.train()
        if trainer.accelerator.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights(trainer), folder / "weights.safetensors")
            (folder / "history.json").write_text(json.dumps(history(trainer)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    run(Path(sys.argv[1]), int(sys.argv[2]))
