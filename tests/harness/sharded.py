"""
Program of the tests of sharded training: short runs, of which gradients, weights and passes go to a folder.

Each run is made by one plain process with TRL's trainer, and by two, over which the model is sharded, with ours.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from papertrl import PolicyTrainer, PreferenceTrainer
from papertrl.core.catalogue import load_trainer
from papertrl.core.compose import compose
from papertrl.core.errors import NotFiniteError
from papertrl.models.tiny import tiny_tokenizer

from .distributed_policy import keyed_completions
from .pairs import pairs
from .table import active, dataset, digit_parity, history, settings

# AdamW divides by the size of a gradient: where that is next to nothing, rounding would decide
OPTIMIZER = {"optim": "adamw_torch", "adam_epsilon": 1e-4, "learning_rate": 1e-2, "max_grad_norm": 0.3}
# Two updates on the same completions, so that old and new policy, and policy and reference, differ in the second
POLICY = {"max_steps": 2, "num_iterations": 2}
# Methods that read hidden states, and the LM head beside the model's own forward
METHODS = {**POLICY, "lp_reg_kappa": 0.02, "lp_reg_rho": 0.9, "oblr_weight": "logit_energy", "snr_lr": False}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}


@dataclass(frozen=True)
class Run:
    """
    A run.

    Args:
        family (`str`):
            `"policy"` or `"preference"`.
        values (`dict`):
            Settings, of TRL's config unless `methods` are named.
        methods (`tuple[str, ...]`, *optional*):
            Methods that train; the one process is then ours as well.
        model (`str`, *optional*, defaults to `"tied"`):
            Name of the folder of the model.
        peft (`bool`, *optional*, defaults to `False`):
            Whether an adapter is trained.
    """

    family: str
    values: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    model: str = "tied"
    peft: bool = False


RUNS = {
    "policy": Run("policy", {**POLICY, "beta": 0.1}),
    "policy_checkpointing": Run("policy", {**POLICY, "beta": 0.1, "gradient_checkpointing": True}),
    "policy_skipping": Run("policy", POLICY, model="untied"),
    "policy_lora": Run("policy", {**POLICY, "beta": 0.1}, peft=True),
    "policy_methods": Run("policy", METHODS, methods=("lp_reg", "oblr_po", "gain_rl")),
    "preference": Run("preference", {"max_steps": 2}),
    "preference_checkpointing": Run("preference", {"max_steps": 2, "gradient_checkpointing": True}, model="untied"),
    "preference_lora": Run("preference", {"max_steps": 2}, peft=True),
}
# Those that a launch makes
LAUNCHES = {
    "fsdp2": tuple(RUNS),
    "zero2": ("policy", "policy_skipping", "preference"),
    "zero3": ("policy", "policy_checkpointing", "policy_methods", "preference", "preference_checkpointing"),
}
PROMPTS = [{"prompt": text} for text in ("1+1=", "22", "5+33=", "7", "40-1=", "123456")]


# --- How a model is sharded on CPUs ----------------------------------------------------------------------------------


def let_fsdp_run_on_cpus() -> None:
    """
    Make FSDP real on CPUs.

    `AcceleratorState` of accelerate 1.15 turns a distributed run into one of FSDP on accelerators only; on CPUs, the
    same configuration trains with DDP, and nothing says so. Past this decision, everything is accelerate's.
    """
    decide = AcceleratorState.__init__

    def also_on_cpus(self, *args, fsdp_plugin=None, **kwargs):
        decide(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = also_on_cpus


def engine_settings(engine: str | None) -> dict[str, Any]:
    """Settings with which a trainer shards its model by `engine`, and what they need of accelerate's state."""
    if engine is None:
        return {}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    # accelerate gives DeepSpeed the backend of an accelerator, unless its state is there already
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    zero = {"stage": int(engine.removeprefix("zero"))}
    if engine == "zero3":
        # The tiny model would be kept whole on every rank
        zero["stage3_param_persistence_threshold"] = 0
    return {
        "deepspeed": DEEPSPEED | {"zero_optimization": zero},
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": False,
    }


def sharding(trainer, engine: str) -> dict[str, Any]:
    """How the parameters lie: on how many ranks, in what form, and which share of the trained ones on each."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    total = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    if engine == "fsdp2":
        kinds = {f"{type(p).__name__}{p.placements}" for p in trainer.model.parameters()}
        local = sum(p.to_local().numel() for p in parameters)
    elif engine == "zero3":
        kinds = {p.ds_status.name for p in trainer.model.parameters()}
        local = sum(p.ds_tensor.ds_numel for p in parameters)
    else:
        kinds = {type(trainer.optimizer.optimizer).__name__}
        local = sum(p.numel() for p in trainer.optimizer.optimizer.single_partition_of_fp32_groups)
    return {
        "engine": str(trainer.accelerator.distributed_type),
        "kinds": sorted(kinds),
        "shares": gather_object([local / total]),
    }


def whole(value: torch.Tensor) -> torch.Tensor:
    """All of a parameter or gradient."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def gradients(model) -> dict[str, torch.Tensor]:
    if hasattr(model, "zero_optimization"):
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in model.module.named_parameters() if p.requires_grad}
        return {name: gradient.detach().clone() for name, gradient in found.items() if gradient is not None}
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def weights(trainer) -> dict[str, torch.Tensor]:
    parameters = dict(trainer.model.named_parameters())
    with trainer_parameters(parameters):
        return {name: whole(p) for name, p in parameters.items() if p.requires_grad}


def trainer_parameters(parameters: dict[str, torch.nn.Parameter]):
    from contextlib import nullcontext

    sharded = [p for p in parameters.values() if hasattr(p, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(sharded)


# --- What a run leaves behind ----------------------------------------------------------------------------------------


class Recorded:
    """Mixin of trainers: keeps the gradients of each update, before they are clipped, and the passes over rollouts."""

    def __init__(self, *args, **kwargs):
        self.gradients, self.rows = [], {}
        super().__init__(*args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        if hasattr(model, "zero_optimization") and not hasattr(model, "recorded_step"):
            # DeepSpeed clips and steps within its backward
            model.recorded_step = step = model.step
            model.step = lambda *a, **k: (self.gradients.append(gradients(model)), step(*a, **k))
        return super().training_step(model, *args, **kwargs)

    def _clip_grad_norm(self, model):
        if not hasattr(model, "zero_optimization"):
            self.gradients.append(gradients(model))
        return super()._clip_grad_norm(model)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        for i, key in enumerate(row_keys(output)):
            found = self.rows.setdefault(key, {})
            for name in ("old_per_token_logps", "ref_per_token_logps", "advantages"):
                if output.get(name) is not None:
                    found[name] = output[name][i][: len(key[1])].clone() if output[name].dim() > 1 else output[name][i]
        return output


class Reading:
    """Mixin of policy trainers: keeps everything that a method can ask of the pass over the rollouts."""

    def old_pass_needs(self):
        return super().old_pass_needs() | {"logps", "entropy", "hidden_states", "mlp_inputs"}

    def collect_statistics(self, record, scored, old_pass):
        super().collect_statistics(record, scored, old_pass)
        mask = torch.cat([record.prompt_mask, record.completion_mask], dim=1).bool()
        for i, key in enumerate(row_keys(vars(record))):
            time = len(key[1])
            self.rows.setdefault(key, {}).update(
                entropies=old_pass.entropies[i, :time],
                hidden_states=old_pass.hidden_states[i, :time],
                mlp_inputs=old_pass.mlp_inputs[i, mask[i]],
            )


def row_keys(batch: dict[str, Any]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Tokens of prompt and completion of each row."""
    parts = [
        [tuple(row[kept.bool()].tolist()) for row, kept in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)]
        for name in ("prompt", "completion")
    ]
    return list(zip(*parts, strict=True))


# --- Runs --------------------------------------------------------------------------------------------------------------


def make_trainer(models: Path, folder: Path, run: Run, engine: str | None, world: int, *mixins: type, **values):
    ours = engine is not None or run.methods
    if run.family == "policy":
        trainer_class = compose(*map(load_trainer, run.methods)) if run.methods else PolicyTrainer
        trainer_class, config_class = (
            (trainer_class, trainer_class.config_class) if ours else (GRPOTrainer, GRPOConfig)
        )
    else:
        trainer_class, config_class = (
            (PreferenceTrainer, PreferenceTrainer.config_class) if ours else (DPOTrainer, DPOConfig)
        )
    trainer_class = type(trainer_class.__name__, (*mixins, Recorded, trainer_class), {})
    shared = {"share_prompts": SHARE} if ours else {}
    acting = active(run.methods, trainer_class) if run.methods else {}
    values = OPTIMIZER | acting | run.values | shared | engine_settings(engine) | values
    args = config_class(**settings(run.family, folder, per_device_train_batch_size=8 // world, **values))
    # An adapter is drawn by every rank for itself
    torch.manual_seed(0)
    options = {"peft_config": LORA} if run.peft else {}
    path = str(models / run.model)
    if run.family == "policy":
        trainer = trainer_class(path, digit_parity, args, train_dataset=dataset("policy"), **options)
        trainer._generate_single_turn = partial(keyed_completions, trainer)
    else:
        if not run.peft:
            options["ref_model"] = AutoModelForCausalLM.from_pretrained(models / "reference")
        options["processing_class"] = tiny_tokenizer()
        trainer = trainer_class(path, args=args, train_dataset=pairs(), **options)
    assert trainer.accelerator.num_processes == world
    return trainer


SHARE = False


def make_run(models: Path, folder: Path, label: str, engine: str | None = None, world: int = 1) -> None:
    run = RUNS[label]
    # Of a plain model, tests read the same themselves
    mixins = (Reading,) if label == "policy" and engine else ()
    trainer = make_trainer(models, folder / label, run, engine, world, *mixins)
    trainer.train()
    rows = {key: value for part in gather_object([trainer.rows]) for key, value in part.items()}
    found = {
        "history": history(trainer),
        "gradients": trainer.gradients,
        "weights": weights(trainer),
        "rows": rows,
        "sharding": engine and sharding(trainer, engine),
    }
    if label in ("policy", "preference") and engine:
        vars(trainer).pop("_generate_single_turn", None)
        rank = trainer.accelerator.process_index
        found["answers"] = gather_object(trainer.answer(PROMPTS[rank::world], 6))
    save(trainer, found, folder / f"{label}.pt")


def save(trainer, found: dict[str, Any], file: Path) -> None:
    if trainer.accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)


def make_resumed(models: Path, folder: Path, engine: str, world: int) -> None:
    """A run that goes on from its second step, and one that is not interrupted."""
    run = Run("policy", {"max_steps": 4, "num_iterations": 4, "save_strategy": "steps", "save_steps": 3})
    found = {}
    for name, checkpoint in (("whole", None), ("resumed", folder / "whole" / "checkpoint-3")):
        trainer = make_trainer(models, folder / name, run, engine, world)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        found[name] = {"history": history(trainer), "weights": weights(trainer), "state": trainer.method_state()}
    save(trainer, found, folder / "resuming.pt")


def make_broken(models: Path, folder: Path, engine: str, world: int) -> None:
    """Runs whose loss, or gradient, is not finite in the second step, on one rank."""

    class Broken:
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            if self.state.global_step == 1 and self.accelerator.process_index == 1:
                if part == "loss":
                    return loss * torch.nan
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss

    found = {}
    for part in ("loss", "gradient"):
        trainer = make_trainer(models, folder / part, Run("policy", POLICY), engine, world, Broken)
        after = []
        trainer.add_callback(After(lambda after=after, trainer=trainer: after.append(weights(trainer))))
        message = None
        try:
            trainer.train()
        except NotFiniteError as error:
            message = str(error)
        found[part] = {"messages": gather_object([message]), "before": after[-1], "weights": weights(trainer)}
    save(trainer, found, folder / "broken.pt")


class After(TrainerCallback):
    """Calls a function after each update."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_step_end(self, *args, **kwargs):
        self.function()


def main(models: Path, folder: Path, engines: list[str]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    let_fsdp_run_on_cpus()
    for engine in engines:
        for label in LAUNCHES[engine]:
            make_run(models, folder / engine, label, engine, world)
        make_broken(models, folder / engine, engine, world)
        make_resumed(models, folder / engine, engine, world)
    # While a wrapped model is alive, ending the process group can block for ever
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
