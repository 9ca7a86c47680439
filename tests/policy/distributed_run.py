"""Program of `test_distributed`: short runs of several methods whose weights and logs go to a folder."""

import gc
import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from papertrl.catalogue import load_trainer
from papertrl.trainers.method import compose

from ..suite import active_config, dataset, digit_parity, history, weights

EVERY_ROW = {"skip_zero_rows": False}
LOOSE = EVERY_ROW | {"truncation_length": 6, "lp_reg_kappa": 0.02, "lp_reg_rho": 0.9}
RUNS = {
    "lite_ppo": (["lite_ppo"], EVERY_ROW),
    "combined": (["lp_reg", "d3s", "dler", "gain_rl"], LOOSE),
    # A group of eight lies on two ranks
    "straddling": (["lp_reg", "d3s", "dler", "gain_rl"], LOOSE | {"num_generations": 8}),
    "intra_group": (["d3s"], EVERY_ROW | {"d3s_scope": "intra_group", "loss_type": "grpo"}),
    "disco": (["disco"], EVERY_ROW | {"num_iterations": 2, "disco_kl": "k3", "disco_delta": 0.0}),
    # A group of eight lies on two ranks
    "two_stage_math": (["two_stage_math"], EVERY_ROW | {"num_generations": 8}),
    "skipping": (["lp_reg", "dler"], LOOSE | {"skip_zero_rows": True, "dynamic_sampling": False}),
}


def keyed_completions(self, prompt_ids, *args, **kwargs):
    """Completions that depend on prompt, place in the group and batch, but not on how ranks share the rows."""
    rows = []
    for i, ids in enumerate(prompt_ids):
        place = (self.accelerator.process_index * len(prompt_ids) + i) % self.num_generations
        digest = hashlib.sha256(f"{ids}-{place}-{self.state.global_step}".encode()).digest()
        rows.append([4 + byte % 60 for byte in digest[: 1 + digest[31] % 6]] + [self.eos_token_ids[0]])
    return rows, None


def run(folder: Path, model: str, world: int) -> None:
    for label in RUNS:
        run_one(folder, model, world, label)
    # While a wrapped model is alive, ending the process group can block for ever
    gc.collect()
    PartialState().destroy_process_group()


def run_one(folder: Path, model: str, world: int, label: str) -> None:
    names, values = RUNS[label]
    trainer_class = compose(*map(load_trainer, names))
    trainer_class = type(trainer_class.__name__, (trainer_class,), {"_generate_single_turn": keyed_completions})
    args = active_config(
        trainer_class,
        names,
        folder / label,
        **values,
        per_device_train_batch_size=16 // world,
        gradient_accumulation_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_steps=4,
    )
    trainer = trainer_class(model, [digit_parity], args, train_dataset=dataset("policy"))
    trainer.train()
    if trainer.accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights(trainer), folder / f"{label}.safetensors")
        (folder / f"{label}.json").write_text(json.dumps(history(trainer)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
