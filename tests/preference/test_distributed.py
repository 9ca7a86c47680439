"""Two processes give what one gives on the same global batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig

from papertrl import (
    DriftDPOTrainer,
    HypoDPOTrainer,
    IrpoDPOTrainer,
    LnDPOTrainer,
    OfsDPOTrainer,
    PreferenceTrainer,
    RlhfWorkflowDPOTrainer,
    RpoDPOTrainer,
    RsoDPOTrainer,
    SemDPOTrainer,
    SrpoDPOTrainer,
    UpoDPOTrainer,
    XpoDPOTrainer,
    compose,
)
from papertrl.models.tiny import tiny_tokenizer

from ..harness.pairs import history, make_trainer, pairs, weights

TOKEN_MEAN = {"rpo_aggregation": "token_mean", "rpo_coef": 1.0}
ONLINE = {"hypo_kl_coef": 0.3, "hypo_kl_max_new_tokens": 4, "beta": 0.1}
DISTANT = pairs().add_column("sem_distance", [i / 8 for i in range(16)])
ROUNDS = {"online_iterations": 2, "online_max_new_tokens": 4, "online_num_prompts": 8}
# Lists of which some do not count, more on one process than on the other
LISTS = Dataset.from_dict(
    {
        "prompt": ["1+1=", "2", "33", "4"] * 4,
        "completions": [["2", "33"], ["4", "5", "66"], ["7"], ["8", "99"]] * 4,
        "relevance": [[1, 0], [0, 2, 1], [1], [0, 0]] * 4,
    }
)


def varied(completions, **kwargs):
    return [sum(map(ord, text)) % 7 for text in completions]


# ỹ is in some pairs only
EXPLORE = {
    **ROUNDS,
    "reward_funcs": varied,
    "online_num_samples": 3,
    "xpo_alpha": [0.1],
    "online_reference": "previous",
}
CHASE = {
    "ofs_alpha": 0.4,
    "ofs_chasing_interval": 1,
    "gradient_accumulation_steps": 2,
    "peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
}
TOURNAMENT = {"online_num_samples": 6, "rso_num_samples": 5, "rso_pairing": "tournament"}
MIXED = {"upo_estimator_learning_rate": 1e-3, "upo_original_rate": 0.5, "upo_hard_rate": 0.3, "upo_nll_coef": 0.1}


def digits(completions, **kwargs):
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def more_digits(prompts, firsts, seconds):
    return [1 / (1 + 2.0 ** (b - a)) for a, b in zip(digits(firsts), digits(seconds), strict=True)]


RUNS = {
    "dpo": (PreferenceTrainer, {"loss_type": ["sigmoid", "hinge"]}),
    "rpo": (RpoDPOTrainer, {**TOKEN_MEAN, "gradient_accumulation_steps": 2}),
    "hypo": (HypoDPOTrainer, ONLINE),
    "drift": (DriftDPOTrainer, {**ROUNDS, "dataset": pairs().add_column("feedback", ["low"] * 16)}),
    "sem_dpo": (SemDPOTrainer, {"dataset": DISTANT, "sem_alpha": 2.0, "sem_normalize": True}),
    "irpo": (IrpoDPOTrainer, {"dataset": LISTS}),
    # Short enough that some pairs do not count
    "srpo": (SrpoDPOTrainer, {"max_length": 16, "beta": 0.3}),
    "ofs_dpo": (OfsDPOTrainer, CHASE),
    "rlhf_workflow_xpo": (compose(RlhfWorkflowDPOTrainer, XpoDPOTrainer), EXPLORE),
    "hypo_ofs_dpo": (compose(HypoDPOTrainer, OfsDPOTrainer), {**CHASE, **ONLINE}),
    "rso": (RsoDPOTrainer, {**ROUNDS, **TOURNAMENT, "judge": more_digits}),
    "upo": (UpoDPOTrainer, {"online_iterations": 0, "upo_estimator_learning_rate": 1e-3}),
    "upo_online": (UpoDPOTrainer, {**ROUNDS, **MIXED, "reward_funcs": digits}),
    "all": (compose(LnDPOTrainer, RpoDPOTrainer, HypoDPOTrainer), {**TOKEN_MEAN, **ONLINE}),
}


def train(tiny_path: str, out: str, world: int) -> None:
    """The runs, as one of `world` processes; the main one saves weights and logs to `out`."""
    results = {}
    for name, (cls, options) in RUNS.items():
        trainer = make_trainer(
            cls,
            tiny_path,
            tiny_tokenizer(),
            f"{out}_{name}",
            per_device_train_batch_size=4 // world,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            **options,
        )
        assert trainer.accelerator.num_processes == world
        trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        start = {n: w for n, w in weights(trainer).items() if n in trained}
        trainer.train()
        rows = [{k: v for k, v in row.items() if k != "total_flos"} for row in history(trainer)]
        results[name] = {"start": start, "end": weights(trainer), "history": rows}
    if trainer.accelerator.is_main_process:
        torch.save(results, out)


@pytest.fixture(scope="module")
def results(tiny_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    root = Path(__file__).parents[len(__package__.split("."))]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    command = [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}", tiny_path, str(folder / "two")]
    logs = [folder / f"rank_{rank}.txt" for rank in range(2)]
    workers = []
    try:
        for rank, log in enumerate(logs):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                workers.append(
                    subprocess.Popen(command, env=environment | ranks, cwd=folder, stdout=file, stderr=file)
                )
        train(tiny_path, str(folder / "one"), world=1)
        codes = [worker.wait(timeout=400) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join(log.read_text()[-3000:] for log in logs)
    return [torch.load(folder / name, weights_only=True) for name in ("one", "two")]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(name, results):
    one, two = (by_name[name] for by_name in results)
    for parameter, start in one["start"].items():
        first, second = one["end"][parameter] - start, two["end"][parameter] - start
        assert first.norm() > 0
        # Relative to how far training moved the parameter
        assert (first - second).norm() < 1e-3 * first.norm(), parameter
    for one_row, two_row in zip(one["history"], two["history"], strict=True):
        assert two_row == pytest.approx(one_row, rel=1e-3, abs=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_progress_bars()
    train(sys.argv[1], sys.argv[2], world=2)
