"""One table over the catalogue: how to run each family, and settings under which each method acts."""

from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from papertrl.core.catalogue import METHODS

PARENTS = {
    "policy": (GRPOTrainer, GRPOConfig),
    "preference": (DPOTrainer, DPOConfig),
    "supervised": (SFTTrainer, SFTConfig),
}

COMMON = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 3,
}
FAMILY = {
    "policy": {"num_generations": 4, "max_completion_length": 8, "check_records": True},
    "preference": {"max_length": 32},
    "supervised": {"max_length": 32},
}

# Settings under which the mechanism acts on the tiny model of the tests
ACTIVE: dict[str, dict[str, Any]] = {
    "lp_reg": {"lp_reg_kappa": 0.2, "lp_reg_rho": 0.6},
    "d3s": {},
    "lite_ppo": {"num_generations": 4},
    "dler": {"dler_truncation_length": 3, "dler_max_resample_batches": 2},
    "gain_rl": {"gain_sigma": 0.2, "gain_step": 0.3, "gain_beta": 0.1},
    "guide_grpo": {"guide_max_resample_batches": 1},
    "scaf_grpo": {"scaf_exempt_ratio": 0.0, "num_generations": 2},
    "constrained_rlhf": {"constraint_thresholds": {"digit_parity": 0.9}},
    "dynamic_reward_weighting": {},
    "oblr_po": {},
    "disco": {},
    "two_stage_math": {},
    "deepsearch": {"tree_width": 4, "tree_max_depth": 4},
    "hpt_upge": {},
    "hapo": {},
    "ln_dpo": {},
    "rpo": {},
    "hypo": {"hypo_kl_coef": 0.1, "hypo_kl_max_new_tokens": 4},
    "drift": {"online_max_new_tokens": 4, "online_num_prompts": 8},
    "rlhf_workflow": {"online_iterations": 2, "online_num_samples": 4, "online_max_new_tokens": 6},
    "xpo": {"online_iterations": 2, "online_max_new_tokens": 6, "xpo_alpha": [0.01, 0.005]},
    "rso": {"online_num_samples": 6, "rso_num_samples": 4, "online_max_new_tokens": 6},
    "irpo": {},
    "srpo": {},
    "upo": {"online_iterations": 1, "online_max_new_tokens": 6, "upo_estimator_learning_rate": 1e-3},
    "sem_dpo": {"sem_encoder": "characters"},
    "ofs_dpo": {"ofs_chasing_interval": 2},
    "asft": {},
    "implicit_reward_sft": {},
}


def digit_parity(completions, **kwargs):
    """Reward 1 for an even number of digits: varied, and exact for any text."""
    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]


def every_fourth(completions, **kwargs):
    """Reward 1 for about a fourth of all texts, so that whole groups fail."""
    return [float(sum(map(ord, text)) % 4 == 0) for text in completions]


# Settings name the reward, whichever it is
every_fourth.__name__ = digit_parity.__name__

# Methods that act on groups that fail
ON_FAILURE = {"guide_grpo", "scaf_grpo", "hpt_upge"}


def reward_of(trainer_class: type):
    return every_fourth if ON_FAILURE & {m.name for m in trainer_class.methods} else digit_parity


def dataset(family: str) -> Dataset:
    numbers = range(16)
    prompts = [f"{i}+{i + 1}=" for i in numbers]
    if family == "policy":
        hints = [[f"{prompt}[1]", f"{prompt}[11]", f"{prompt}[111]"] for prompt in prompts]
        columns = {"hints": hints, "hint": [ladder[-1] for ladder in hints]}
        return Dataset.from_dict({"prompt": prompts, "completion": [f"{2 * i + 1}" for i in numbers]} | columns)
    if family == "preference":
        columns = {"chosen": [f"{2 * i + 1}" for i in numbers], "rejected": [f"{3 * i}" for i in numbers]}
        columns["feedback"] = ["high" if i else "low" for i in numbers]
        lists = {"completions": [[f"{i}", f"{2 * i + 1}", f"{3 * i}"][: 2 + i % 2] for i in numbers]}
        lists["relevance"] = [[1, 2, 0][: 2 + i % 2] for i in numbers]
        return Dataset.from_dict({"prompt": prompts} | columns | lists)
    return Dataset.from_dict({"prompt": prompts, "completion": [f"{2 * i + 1}" for i in numbers]})


# With these off, a trainer makes its parent's passes over its parent's micro-batches, to the bit
PLAIN = {"fast_rollouts": False, "share_prompts": False, "group_batches": False, "skip_zero_rows": False}
PLAIN_OF = {"policy": PLAIN, "preference": {"share_prompts": False}, "supervised": {}}


def settings(family: str, output_dir, **values) -> dict[str, Any]:
    ours = {k: v for k, v in FAMILY[family].items() if k != "check_records"}
    return {"output_dir": str(output_dir), "max_steps": 3} | COMMON | ours | values


# Settings that, unless they are None, need an adapter
NEEDS_ADAPTER = ("ofs_alpha",)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")


def build(trainer_class: type, family: str, model: str, args, **kwargs):
    reward = kwargs.pop("reward", digit_parity)
    # TRL's config leaves a method its default
    defaults = getattr(trainer_class, "config_class", None)
    iterations = getattr(args, "online_iterations", getattr(defaults, "online_iterations", 0))
    if family == "preference" and iterations > 0:
        kwargs["reward_funcs"] = reward
    if any(getattr(args, name, getattr(defaults, name, None)) is not None for name in NEEDS_ADAPTER):
        kwargs.setdefault("peft_config", LORA)
    positional = {"policy": [[reward]], "preference": [None], "supervised": []}[family]
    return trainer_class(model, *positional, args, train_dataset=kwargs.pop("data", dataset(family)), **kwargs)


def active_config(trainer_class: type, names: list[str], output_dir, **values):
    merged = {key: value for name in names for key, value in ACTIVE[name].items()}
    family = trainer_class.family.name
    extra = {"check_records": True} if family == "policy" else {}
    return trainer_class.config_class(**settings(family, output_dir, **(merged | extra | values)))


def model_path(family: str, request) -> str:
    return request.getfixturevalue("policy_path" if family == "policy" else "tiny_path")


def weights(trainer) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def history(trainer) -> list[dict[str, float]]:
    """Logged values without those that measure time."""
    timed = ("time", "runtime", "per_second", "flos")
    return [
        {k: v for k, v in entry.items() if not any(part in k for part in timed)} for entry in trainer.state.log_history
    ]


def methods_of(family: str) -> list[str]:
    return [name for name, f in METHODS.items() if f == family]
