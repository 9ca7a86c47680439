"""Program of `test_distributed`: short runs of several methods whose weights and logs go to a folder."""

import gc
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from papertrl import DeepsearchGRPOTrainer
from papertrl.core.catalogue import load_trainer
from papertrl.core.compose import compose
from papertrl.trainers.policy.batching import MicroBatches

from .table import active_config, dataset, digit_parity, history, reward_of, weights

EVERY_ROW = {"skip_zero_rows": False}
LOOSE = EVERY_ROW | {"dler_truncation_length": 6, "lp_reg_kappa": 0.02, "lp_reg_rho": 0.9}
RUNS = {
    "lite_ppo": (["lite_ppo"], EVERY_ROW | {"max_tokens_per_micro_batch": 30}),
    "combined": (["lp_reg", "d3s", "dler", "gain_rl"], LOOSE),
    # A group of eight lies on two ranks
    "straddling": (["lp_reg", "d3s", "dler", "gain_rl"], LOOSE | {"num_generations": 8}),
    "intra_group": (["d3s"], EVERY_ROW | {"d3s_scope": "intra_group", "loss_type": "grpo"}),
    # How many groups fail, and with how many hints, differs between ranks and steps
    "guided": (["guide_grpo"], EVERY_ROW),
    "guided_straddling": (
        ["guide_grpo", "lp_reg", "dler"],
        LOOSE | {"num_generations": 8, "guide_reroll_threshold": 0.4},
    ),
    "scaffolded": (["scaf_grpo", "lite_ppo"], EVERY_ROW),
    "constrained": (["constrained_rlhf", "dler"], EVERY_ROW | {"dler_truncation_length": 6, "num_generations": 8}),
    "gradient_weighting": (["dynamic_reward_weighting", "lite_ppo"], EVERY_ROW | {"weighting_regularization": 0.1}),
    "accumulated": (["oblr_po"], {}),
    "disco": (["disco"], EVERY_ROW | {"num_iterations": 2, "disco_kl": "k3", "disco_delta": 0.0}),
    # A group of eight lies on two ranks
    "two_stage_math": (["two_stage_math"], EVERY_ROW | {"num_generations": 8}),
    "searching": (["deepsearch"], EVERY_ROW | {"num_generations": 8, "tree_replay_accuracy_max": 0.5}),
    # One group on two ranks, one of which searches while the other only keeps up
    "idle_rank": (["deepsearch"], EVERY_ROW | {"num_generations": 16, "tree_selection": "uct"}),
    # Demonstrations may all lie on one rank
    "demonstrated": (["hpt_upge", "guide_grpo"], EVERY_ROW | {"hpt_upge_instance": "gspo", "hpt_gate": 0.3}),
    "demonstrated_straddling": (
        ["hpt_upge", "d3s"],
        EVERY_ROW | {"num_generations": 8, "hpt_mode": "soft", "loss_type": "dapo"},
    ),
    "skipping_demonstrated": (["hpt_upge"], {"hpt_upge_instance": "reinforce"}),
    # Ranks need more or fewer passes for their rows
    "entropies": (["hapo"], EVERY_ROW | {"num_iterations": 2, "max_tokens_per_micro_batch": 40}),
    "skipping": (["lp_reg", "dler"], LOOSE | {"skip_zero_rows": True, "dler_dynamic_sampling": False}),
    "skipping_by_tokens": (["dler"], {"dler_truncation_length": 6, "max_tokens_per_micro_batch": 25}),
}


def brevity(completions, **kwargs):
    """Reward 1 for fewer than four characters."""
    return [float(len(text) < 4) for text in completions]


# Runs on more than one reward
REWARDS = {"gradient_weighting": [digit_parity, brevity]}
# Saved half way, and resumed by the other number of processes
RESUMED = "combined"
# Runs that compare micro-batches: as many of them, with the same rows, on either number of processes
ALIKE = {"accumulated"}


class InOrder(MicroBatches):
    """Micro-batches of the rows as they come."""

    def cut(self, group_ids, computed):
        return list(torch.arange(len(group_ids)).split(self.rows))


def keyed_completions(self, prompt_ids, *args, **kwargs):
    """Completions that depend on prompt, place in the group and batch, but not on how ranks share the rows."""
    rows, equal = [], Counter()
    for i, ids in enumerate(prompt_ids):
        place = self.accelerator.process_index * len(prompt_ids) + i
        # Rows sampled anew belong to no group yet
        place = place if self.num_generations == 1 else place % self.num_generations
        if isinstance(self, DeepsearchGRPOTrainer):
            # Trees ask for more or fewer rows each, and one tree's all lie on one rank
            place = equal[tuple(ids)]
            equal[tuple(ids)] += 1
        digest = hashlib.sha256(f"{ids}-{place}-{self.state.global_step}".encode()).digest()
        rows.append([4 + byte % 60 for byte in digest[: 1 + digest[31] % 6]] + [self.eos_token_ids[0]])
    # DeepSearch samples in steps
    return [row[: self.generation_config.max_new_tokens] for row in rows], None


def run(folder: Path, model: str, world: int, other: Path) -> None:
    for label in RUNS:
        run_one(folder, model, world, label)
    run_one(folder, model, world, RESUMED, other / RESUMED / "checkpoint-2")
    # While a wrapped model is alive, ending the process group can block for ever
    gc.collect()
    PartialState().destroy_process_group()


def run_one(folder: Path, model: str, world: int, label: str, resumed: Path | None = None) -> None:
    names, values = RUNS[label]
    trainer_class = compose(*map(load_trainer, names))
    trainer_class = type(trainer_class.__name__, (trainer_class,), {"_generate_single_turn": keyed_completions})
    micro_batch = 8 if label in ALIKE else 16 // world
    args = active_config(
        trainer_class,
        names,
        folder / (label if resumed is None else "resumed"),
        **values,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=16 // world // micro_batch,
        optim="sgd",
        learning_rate=0.1,
        max_steps=4,
        save_strategy="steps" if label == RESUMED else "no",
        save_steps=2,
    )
    trainer = trainer_class(
        model, REWARDS.get(label, [reward_of(trainer_class)]), args, train_dataset=dataset("policy")
    )
    if label in ALIKE:
        trainer.batching = InOrder(**vars(trainer.batching))
    assert trainer.accelerator.num_processes == world
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    if trainer.accelerator.is_main_process:
        label = label if resumed is None else "resumed"
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights(trainer), folder / f"{label}.safetensors")
        (folder / f"{label}.json").write_text(json.dumps(history(trainer)))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
