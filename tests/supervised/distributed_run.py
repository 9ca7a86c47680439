"""Program of `test_distributed`: a short ASFT run whose log and final weights go to a folder."""

import json
import sys
from pathlib import Path

import torch
from datasets import disable_progress_bars
from safetensors.torch import save_file

from papertrl import AsftSFTConfig, AsftSFTTrainer
from papertrl.tiny import tiny_tokenizer

from .helpers import history, make, weights


def run(folder: Path, batch_size: int) -> None:
    trainer = make(
        AsftSFTTrainer,
        AsftSFTConfig,
        tiny_tokenizer(),
        folder,
        anchor_coef=0.5,
        optim="sgd",
        learning_rate=0.5,
        per_device_train_batch_size=batch_size,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights(trainer), folder / "weights.safetensors")
        (folder / "history.json").write_text(json.dumps(history(trainer)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    run(Path(sys.argv[1]), int(sys.argv[2]))
