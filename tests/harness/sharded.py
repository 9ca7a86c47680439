"""
Program of the tests of sharded training: short runs, of which gradients, weights and passes go to a folder.

Each run is made by one plain process with TRL's trainer, and by two, over which the model is sharded, with ours.
"""

import gc
import os
import sys
from contextlib import nullcontext
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

from papertrl.core.catalogue import load, load_trainer
from papertrl.core.compose import compose
from papertrl.core.errors import NotFiniteError
from papertrl.core.family import FAMILIES
from papertrl.models.tiny import tiny_model, tiny_tokenizer

from .distributed_policy import keyed_completions
from .pairs import pairs
from .table import active, dataset, digit_parity, history, parents, settings

# AdamW divides by the size of a gradient: where that is next to nothing, rounding would decide
OPTIMIZER = {"optim": "adamw_torch", "adam_epsilon": 1e-4, "learning_rate": 1e-2, "max_grad_norm": 0.3}
# Two updates on the same completions: in the second, the policy is neither that which sampled nor the reference
POLICY = {"max_steps": 2, "num_iterations": 2}
PREFERENCE = {"max_steps": 2}
CHECKPOINTING = {"gradient_checkpointing": True}
# Methods that read hidden states, and the LM head beside the model's own forward
METHODS = {"lp_reg_kappa": 0.02, "lp_reg_rho": 0.9, "oblr_weight": "logit_energy", "snr_lr": False}
ROUNDS = {"online_iterations": 2, "online_num_prompts": 8, "online_num_samples": 3, "online_reference": "initial"}
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
PROMPTS = [{"prompt": text} for text in ("1+1=", "2a", "5+33=", "7b", "40-1=", "12c")]


@dataclass(frozen=True)
class Run:
    """
    A run, by one plain process and by two over which the model is sharded.

    Args:
        family (`str`):
            `"policy"` or `"preference"`.
        values (`dict`, *optional*):
            Settings of both.
        ours (`dict`, *optional*):
            Settings of our trainer alone, which is that of the two processes; that of the one is TRL's.
        methods (`tuple[str, ...]`, *optional*):
            Methods that train. TRL has none, so that the one process then has our trainer as well.
        model (`str`, *optional*, defaults to `"tied"`):
            Name of the folder of the model.
        peft (`bool`, *optional*, defaults to `False`):
            Whether an adapter is trained.
    """

    family: str
    values: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    methods: tuple[str, ...] = ()
    model: str = "tied"
    peft: bool = False


RUNS = {
    "policy": Run("policy", POLICY | {"beta": 0.1}),
    "policy_checkpointing": Run("policy", POLICY | {"beta": 0.1} | CHECKPOINTING),
    "policy_skipping": Run("policy", POLICY, model="untied"),
    "policy_as_trl": Run("policy", POLICY | {"beta": 0.1} | CHECKPOINTING, ours={"share_prompts": False}),
    "policy_lora": Run("policy", POLICY | {"beta": 0.1} | CHECKPOINTING, peft=True),
    "policy_methods": Run("policy", POLICY, ours=METHODS, methods=("lp_reg", "oblr_po", "gain_rl")),
    "preference": Run("preference", PREFERENCE, model="untied"),
    "preference_checkpointing": Run("preference", PREFERENCE | CHECKPOINTING),
    "preference_as_trl": Run("preference", PREFERENCE | CHECKPOINTING, ours={"share_prompts": False}),
    "preference_lora": Run("preference", PREFERENCE | CHECKPOINTING, peft=True),
    "preference_methods": Run("preference", PREFERENCE, ours=ROUNDS, methods=("rlhf_workflow", "hypo")),
}
# By what the model is sharded, and the runs of one launch
LAUNCHES = {
    "fsdp2": ("fsdp2", ["policy_checkpointing", "policy_skipping", "policy_methods", "preference"]),
    "fsdp2_rare": ("fsdp2", [label for label in RUNS if label not in ("policy_skipping", "policy_methods")]),
    "zero2": ("zero2", ["policy_checkpointing", "policy_skipping", "preference"]),
    "zero3": ("zero3", [label for label, run in RUNS.items() if not run.peft]),
}
LAUNCHES["fsdp2_rare"][1].remove("policy_checkpointing")
LAUNCHES["fsdp2_rare"][1].remove("preference")


def make_models(folder: Path) -> None:
    """Tiny models, of which one has a head of its own, and a reference."""
    tokenizer = tiny_tokenizer()
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"))
    for seed, name in enumerate(("tied", "untied", "reference")):
        torch.manual_seed(seed)
        model = tiny_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
        model.get_output_embeddings().weight.data *= 4
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *letters]
        if name == "untied":
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 10)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


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
    """Settings with which a trainer shards its model by `engine`."""
    if engine is None:
        return {}
    if engine == "fsdp2":
        return {"fsdp": True, "fsdp_config": {"version": 2}}
    # Where its state is not there yet, accelerate takes the backend of an accelerator
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero = {"stage": int(engine.removeprefix("zero"))}
    if engine == "zero3":
        # So tiny a model would be kept whole on every rank
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "deepspeed": dict.fromkeys(auto, "auto") | {"zero_allow_untested_optimizer": True, "zero_optimization": zero},
        "accelerator_config": {"use_configured_state": True},
        "use_cpu": False,
    }


def sharding(trainer, engine: str) -> dict[str, Any]:
    """Who shards, in what form the parameters are, and which share of those that are trained lies on each rank."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    if engine == "fsdp2":
        forms = {f"{type(p).__name__} {p.placements}" for p in trainer.model.parameters()}
        local = sum(p.to_local().numel() for p in parameters)
    elif engine == "zero3":
        forms = {p.ds_status.name for p in trainer.model.parameters()}
        local = sum(p.ds_tensor.ds_numel for p in parameters)
    else:
        forms = {type(trainer.optimizer.optimizer).__name__}
        local = sum(p.numel() for p in trainer.optimizer.optimizer.single_partition_of_fp32_groups)
    share = local / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return {
        "by": trainer.accelerator.distributed_type.value,
        "forms": sorted(forms),
        "shares": gather_object([share]),
    }


def local_part(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank has of a parameter, where it can be written to."""
    if isinstance(parameter, DTensor):
        return parameter.data.to_local()
    return getattr(parameter, "ds_tensor", parameter).data


def whole(value: torch.Tensor) -> torch.Tensor:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def gradients(model) -> dict[str, torch.Tensor]:
    if hasattr(model, "zero_optimization"):
        from deepspeed.utils import safe_get_full_grad

        found = {name: safe_get_full_grad(p) for name, p in model.module.named_parameters() if p.requires_grad}
    else:
        found = {name: p.grad for name, p in model.named_parameters()}
    return {name: whole(gradient) for name, gradient in found.items() if gradient is not None}


def weights(trainer) -> dict[str, torch.Tensor]:
    """All of the weights that are trained."""
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    gathered = nullcontext()
    if any(hasattr(p, "ds_tensor") for p in trained.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(trained.values()))
    with gathered:
        return {name: whole(p) for name, p in trained.items()}


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
            for name in ("old_per_token_logps", "ref_per_token_logps"):
                if output.get(name) is not None:
                    found[name] = output[name][i, : len(key[1])]
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
        [
            tuple(row[kept.bool()].tolist())
            for row, kept in zip(batch[f"{name}_ids"], batch[f"{name}_mask"], strict=True)
        ]
        for name in ("prompt", "completion")
    ]
    return list(zip(*parts, strict=True))


# --- Runs ------------------------------------------------------------------------------------------------------------


def make_trainer(models: Path, folder: Path, run: Run, engine: str | None, world: int, *mixins: type, **values):
    """The trainer of a run: ours where its model is sharded or methods train, else TRL's."""
    parent, config_class = parents(run.family)
    values = settings(run.family, folder, **OPTIMIZER, per_device_train_batch_size=8 // world) | run.values | values
    if engine or run.methods:
        parent = compose(*map(load_trainer, run.methods)) if run.methods else load(FAMILIES[run.family].plain)
        config_class = parent.config_class
        values |= active(run.methods, parent) | engine_settings(engine) | run.ours
    args = config_class(**values)
    trainer_class = type(parent.__name__, (*mixins, Recorded, parent), {})
    # Every rank draws the adapter for itself
    torch.manual_seed(0)
    options = {"peft_config": LORA} if run.peft else {}
    if run.family == "policy":
        trainer = trainer_class(
            str(models / run.model), digit_parity, args, train_dataset=dataset("policy"), **options
        )
        trainer._generate_single_turn = partial(keyed_completions, trainer)
        return trainer
    if not run.peft:
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(models / "reference")
    if run.methods:
        options["reward_funcs"] = varied
    return trainer_class(str(models / run.model), args=args, train_dataset=pairs(), **options)


def varied(completions, **kwargs):
    return [sum(map(ord, text)) % 7 for text in completions]


def make_run(models: Path, folder: Path, label: str, engine: str | None = None, world: int = 1) -> None:
    """Make a run and keep what it leaves behind."""
    run = RUNS[label]
    reading = (Reading,) if engine and run.family == "policy" and "beta" in run.values else ()
    trainer = make_trainer(models, folder / label, run, engine, world, *reading)
    trainer.train()
    found = {
        "history": history(trainer),
        "gradients": trainer.gradients,
        "weights": weights(trainer),
        "rows": dict(row for rows in gather_object([trainer.rows]) for row in rows.items()),
        "checkpointing": trainer.model.is_activation_checkpointing,
    }
    if engine:
        assert trainer.accelerator.num_processes == world
        found |= {"sharding": sharding(trainer, engine), "shares": trainer.sharing is not None}
        # As in training, and ranks need different numbers of steps
        vars(trainer).pop("_generate_single_turn", None)
        found["answers"] = gather_object(trainer.answer(PROMPTS[trainer.accelerator.process_index :: world], 6))
        trainer.save_model(str(folder / f"{label}_saved"))
        found["complaints"] = gather_object([complaint_of_a_broken_weight(trainer)])
    save(trainer, found, folder / f"{label}.pt")


def complaint_of_a_broken_weight(trainer) -> str | None:
    """What is said of a weight that one rank alone has, and that is not finite."""
    if trainer.accelerator.process_index == 1:
        local_part(next(p for p in trainer.model.parameters() if p.requires_grad)).view(-1)[3] = torch.nan
    try:
        trainer.check_weights()
    except NotFiniteError as error:
        return str(error)


def make_broken(models: Path, folder: Path, engine: str, world: int) -> None:
    """Runs of which one rank has a loss, or a gradient, that is not finite in the second step."""
    for part in ("loss", "gradient"):

        class Broken:
            def compute_loss(self, *args, part=part, **kwargs):
                loss = super().compute_loss(*args, **kwargs)
                if self.state.global_step == 0 or self.accelerator.process_index == 0:
                    return loss
                if part == "gradient":
                    loss.register_hook(lambda gradient: gradient * torch.inf)
                    return loss
                return loss * torch.nan

        trainer = make_trainer(models, folder / part, Run("policy", POLICY), engine, world, Broken)
        keeper = Keeper(trainer)
        trainer.add_callback(keeper)
        complaint = None
        try:
            trainer.train()
        except NotFiniteError as error:
            complaint = str(error)
        found = {"complaints": gather_object([complaint]), "before": keeper.weights, "weights": weights(trainer)}
        save(trainer, found, folder / f"broken_{part}.pt")


class Keeper(TrainerCallback):
    """Keeps the weights after the last update that was made."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, *args, **kwargs):
        self.weights = weights(self.trainer)


def make_resumed(models: Path, folder: Path, engine: str, world: int, **ours) -> None:
    """A run that goes on from its third step, in the middle of a generation batch, and one that is not interrupted."""
    saving = {"max_steps": 4, "num_iterations": 4, "save_strategy": "steps", "save_steps": 3}
    run = Run("policy", saving, ours)
    for name, checkpoint in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-3"))):
        trainer = make_trainer(models, folder / name, run, engine, world)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model(str(folder / f"{name}_saved"))
        found = {"history": history(trainer), "weights": weights(trainer), "state": trainer.method_state()}
        save(trainer, found, folder / f"{name}.pt")


def save(trainer, found: dict[str, Any], file: Path) -> None:
    if trainer.accelerator.is_main_process:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)


def main(models: Path, folder: Path, launches: list[str]) -> None:
    torch.set_num_threads(1)
    world = int(os.environ["WORLD_SIZE"])
    let_fsdp_run_on_cpus()
    for launch in launches:
        engine, labels = LAUNCHES[launch]
        for label in labels:
            make_run(models, folder / launch, label, engine, world)
        if launch == "fsdp2_rare":
            sharded_checkpoints = {"fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
            make_resumed(models, folder / launch, engine, world, **sharded_checkpoints)
            continue
        make_resumed(models, folder / launch, engine, world)
        make_broken(models, folder / launch, engine, world)
    # While a wrapped model is alive, ending the process group can block for ever
    gc.collect()
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
