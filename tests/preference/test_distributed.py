"""Two processes give what one gives on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = """
import sys

import torch
from datasets import disable_progress_bars

from papertrl import HypoDPOTrainer, LnDPOTrainer, PreferenceTrainer, RpoDPOTrainer, compose
from papertrl.tiny import tiny_tokenizer
from preference.common import history, make_trainer, weights

torch.set_num_threads(1)
disable_progress_bars()
tiny_path, out, world = sys.argv[1], sys.argv[2], int(sys.argv[3])
token_mean = {"rpo_aggregation": "token_mean", "rpo_coef": 1.0}
online = {"online_kl_coef": 0.3, "online_kl_max_new_tokens": 4, "beta": 0.1}
runs = {
    "dpo": (PreferenceTrainer, {"loss_type": ["sigmoid", "hinge"]}),
    "rpo": (RpoDPOTrainer, {**token_mean, "gradient_accumulation_steps": 2}),
    "hypo": (HypoDPOTrainer, online),
    "all": (compose(LnDPOTrainer, RpoDPOTrainer, HypoDPOTrainer), {**token_mean, **online}),
}
results = {}
for name, (cls, options) in runs.items():
    trainer = make_trainer(
        cls, tiny_path, tiny_tokenizer(), out + name, per_device_train_batch_size=4 // world, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, **options,
    )
    start = weights(trainer)
    trainer.train()
    results[name] = {"start": start, "end": weights(trainer), "history": history(trainer)}
if trainer.accelerator.is_main_process:
    torch.save(results, out)
"""


def launch(world: int, tiny_path: str, folder: Path) -> dict:
    """Run the worker on `world` processes, as a launcher would, and return what rank 0 saved."""
    script, out = folder / "worker.py", folder / f"results_{world}.pt"
    script.write_text(WORKER)
    tests = str(Path(__file__).parent.parent)
    common = os.environ | {"PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])}
    workers = []
    for rank in range(world):
        environment = dict(common)
        if world > 1:
            environment |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        command = [sys.executable, str(script), tiny_path, str(out), str(world)]
        log = open(folder / f"log_{world}_{rank}.txt", "w+")  # noqa: SIM115
        workers.append((subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log), log))
    try:
        codes = [worker.wait(timeout=150) for worker, _ in workers]
    finally:
        for worker, _ in workers:
            worker.kill()
    for code, (_, log) in zip(codes, workers, strict=True):
        log.seek(0)
        assert code == 0, log.read()[-3000:]
        log.close()
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def results(tiny_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    return launch(1, tiny_path, folder), launch(2, tiny_path, folder)


@pytest.mark.parametrize("name", ["dpo", "rpo", "hypo", "all"])
def test_two_processes_equal_one(name, results):
    one, two = (by_name[name] for by_name in results)
    for parameter, start in one["start"].items():
        first, second = one["end"][parameter] - start, two["end"][parameter] - start
        assert first.norm() > 0
        # Relative to how far training moved the parameter
        assert (first - second).norm() < 1e-3 * first.norm(), parameter
    for one_row, two_row in zip(one["history"], two["history"], strict=True):
        assert two_row == pytest.approx(one_row, rel=1e-3, abs=1e-5)
