"""One table over the catalogue: how to run each family, and settings under which each method acts."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import trl
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from papertrl.core.catalogue import DECLARATIONS, load
from papertrl.core.compose import compose
from papertrl.core.family import FAMILIES, Family

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
    "policy": {"num_generations": 4, "max_completion_length": 8},
    "preference": {"max_length": 32},
    "supervised": {"max_length": 32},
    "reward": {"max_length": 32},
}
# Settings that, unless they are None, need an adapter
NEEDS_ADAPTER = ("ofs_alpha",)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")
# Classifies a whole text, so that the head is trained as well
REWARD_LORA = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights="gaussian")
# Methods that act on groups that fail
ON_FAILURE = {"guide_grpo", "scaf_grpo", "hpt_upge"}
# Methods that look for rows that repeat
REPEATED = {"dedup"}
CHECKED = ("policy", "preference")
# What the mechanisms of methods work on where they run at their default settings
MATTER = {
    # Answers that are cut
    "dler": {"max_completion_length": 3},
    "soft_overlong": {"max_completion_length": 3},
    # Tokens that are rare, but no noise
    "lp_reg": {"per_device_train_batch_size": 16, "num_generations": 8, "top_k": 8},
    # Groups that fail, with a hint that helps
    "scaf_grpo": {"num_generations": 2},
    # Completions of some length: the gradient grows with its square
    "hypo": {"hypo_kl_max_new_tokens": 12},
    # Temperatures that differ so little that only some tokens are drawn otherwise
    "entropy_temperature": {"max_steps": 6},
}
# Methods that do nothing at their default settings, and those of which a part does not, with the remedy that they name
INERT = {"constrained_rlhf": "constraint_thresholds", "rlg": "rlg_train", "update_sparsity": "update_sparsity_every"}
INERT_IN_PART = {"disco": "num_iterations", "hapo": "num_iterations", "gain_rl": "gain_sigma"}
# Methods that, at their default settings, are a choice among TRL's fields, as their docstrings say
CHOICE_OF_TRL = {"lite_ppo"}


@dataclass(frozen=True)
class Case:
    """A method on a family: every objective on its own, every component on each that it serves."""

    method: str
    family: str

    @property
    def trainer(self) -> type:
        return trainer_of(self.method, self.family)

    @property
    def declaration(self):
        return DECLARATIONS[self.method]

    def __str__(self) -> str:
        objective = self.declaration.kind == "objective"
        return self.method if objective else f"{self.method}-{self.family}"


@cache
def trainer_of(method: str, family: str) -> type:
    part = load(method)
    return part if DECLARATIONS[method].kind == "objective" else compose(FAMILIES[family].plain, part)


def families_of(method: str) -> list[str]:
    """Families that a method serves: its own, or of a component that names none, all."""
    declaration = DECLARATIONS[method]
    return [declaration.family] if declaration.family else list(FAMILIES)


OURS = {name: declaration for name, declaration in DECLARATIONS.items() if declaration.entry is None}
OBJECTIVES = [name for name, declaration in OURS.items() if declaration.kind == "objective"]
COMPONENTS = [name for name, declaration in OURS.items() if declaration.kind == "component"]
CASES = [Case(name, family) for name in (*OBJECTIVES, *COMPONENTS) for family in families_of(name)]


def objectives_of(family: str) -> list[str]:
    return [name for name in OBJECTIVES if DECLARATIONS[name].family == family]


def parents(family: Family | str) -> tuple[type, type]:
    """TRL's trainer and config of a family."""
    parent = FAMILIES[str(family)].parent
    return getattr(trl, parent), getattr(trl, parent.removesuffix("Trainer") + "Config")


def digit_parity(completions, **kwargs):
    """Reward 1 for an even number of digits: varied, and exact for any text."""
    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]


def every_fourth(completions, **kwargs):
    """Reward 1 for about a fourth of all texts, so that whole groups fail."""
    return [float(sum(map(ord, text)) % 4 == 0) for text in completions]


# Settings name the reward, whichever it is
every_fourth.__name__ = digit_parity.__name__


def reward_of(trainer_class: type):
    return every_fourth if ON_FAILURE & {m.name for m in trainer_class.methods} else digit_parity


def dataset(family: Family | str) -> Dataset:
    numbers = range(16)
    prompts = [f"{i}+{i + 1}=" for i in numbers]
    right, wrong = [f"{2 * i + 1}" for i in numbers], [f"{3 * i}" for i in numbers]
    if str(family) == "policy":
        hints = [[f"{prompt}[1]", f"{prompt}[11]", f"{prompt}[111]"] for prompt in prompts]
        columns = {"hints": hints, "hint": [ladder[-1] for ladder in hints]}
        return Dataset.from_dict({"prompt": prompts, "completion": right} | columns)
    if str(family) in ("preference", "reward"):
        columns = {"chosen": right, "rejected": wrong}
        columns["feedback"] = ["high" if i else "low" for i in numbers]
        lists = {"completions": [[f"{i}", f"{2 * i + 1}", f"{3 * i}"][: 2 + i % 2] for i in numbers]}
        lists["relevance"] = [[1, 2, 0][: 2 + i % 2] for i in numbers]
        return Dataset.from_dict({"prompt": prompts} | columns | (lists if str(family) == "preference" else {}))
    return Dataset.from_dict({"prompt": prompts, "completion": right})


def settings(family: Family | str, output_dir, **values) -> dict[str, Any]:
    return {"output_dir": str(output_dir), "max_steps": 3} | COMMON | FAMILY[str(family)] | values


def build(trainer_class: type, family: Family | str, model: str, args, **kwargs):
    family = FAMILIES[str(family)]
    reward = kwargs.pop("reward", digit_parity)
    # TRL's config leaves a method its default
    defaults = getattr(trainer_class, "config_class", None)
    iterations = getattr(args, "online_iterations", getattr(defaults, "online_iterations", 0))
    if family.judged is True or (family.judged and iterations):
        kwargs["reward_funcs"] = reward
    if any(getattr(args, name, getattr(defaults, name, None)) is not None for name in NEEDS_ADAPTER):
        kwargs.setdefault("peft_config", LORA)
    data = kwargs.pop("data", None)
    if data is None:
        data = dataset(family)
        if REPEATED & {m.name for m in getattr(trainer_class, "methods", ())}:
            data = concatenate_datasets([data, data])
    return trainer_class(model, args=args, train_dataset=data, **kwargs)


def active(names, trainer_class: type) -> dict[str, Any]:
    """Settings under which all of `names` act."""
    merged = {key: value for name in sorted(names) for key, value in DECLARATIONS[name].active.items()}
    return merged | ({"check_records": True} if trainer_class.family.name in CHECKED else {})


def active_config(trainer_class: type, names, output_dir, **values):
    return trainer_class.config_class(
        **settings(trainer_class.family, output_dir, **active(names, trainer_class) | values)
    )


def model_path(family: Family | str, request) -> str:
    return request.getfixturevalue("policy_path" if str(family) == "policy" else "tiny_path")


def adapter(family: Family | str) -> LoraConfig:
    return REWARD_LORA if str(family) == "reward" else LORA


def weights(trainer) -> dict[str, Any]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def history(trainer) -> list[dict[str, float]]:
    """Logged values without those that measure time."""
    timed = ("time", "runtime", "per_second", "flos")
    return [
        {k: v for k, v in entry.items() if not any(part in k for part in timed)} for entry in trainer.state.log_history
    ]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if entry.get(name) is not None]
