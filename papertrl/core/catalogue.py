"""The catalogue: every method of the library, by short name. Adding a method adds one line to `METHODS`."""

import difflib
import importlib

METHODS: dict[str, str] = {
    "lp_reg": "policy",
    "d3s": "policy",
    "lite_ppo": "policy",
    "dler": "policy",
    "gain_rl": "policy",
    "guide_grpo": "policy",
    "scaf_grpo": "policy",
    "constrained_rlhf": "policy",
    "dynamic_reward_weighting": "policy",
    "oblr_po": "policy",
    "disco": "policy",
    "two_stage_math": "policy",
    "deepsearch": "policy",
    "hpt_upge": "policy",
    "hapo": "policy",
    "ln_dpo": "preference",
    "rpo": "preference",
    "hypo": "preference",
    "drift": "preference",
    "rlhf_workflow": "preference",
    "xpo": "preference",
    "rso": "preference",
    "irpo": "preference",
    "srpo": "preference",
    "upo": "preference",
    "sem_dpo": "preference",
    "ofs_dpo": "preference",
    "asft": "supervised",
    "implicit_reward_sft": "supervised",
}

# Methods that go together, with a recipe and a claim of their own
COMBINATIONS: dict[str, tuple[str, ...]] = {
    "hpt_scaf": ("hpt_upge", "scaf_grpo"),
    "guide_lp_reg_dler": ("guide_grpo", "lp_reg", "dler"),
    "gain_rl_d3s_hapo": ("gain_rl", "d3s", "hapo"),
}

SUFFIXES = {"policy": "GRPO", "preference": "DPO", "supervised": "SFT"}
# The trainers without a method, which train as TRL's do, by the name under which a job asks for them
PLAIN = {suffix.lower(): family for family, suffix in SUFFIXES.items()}
BASES = {"policy": "PolicyTrainer", "preference": "PreferenceTrainer", "supervised": "SupervisedTrainer"}


def class_stem(name: str) -> str:
    """
    What the method's classes are called before `Trainer` and `Config`: the short name in camel case and TRL's suffix.

    ```python
    >>> class_stem("lp_reg"), class_stem("ln_dpo")
    ('LpRegGRPO', 'LnDPO')
    ```
    """
    suffix = SUFFIXES[METHODS[name]]
    return "".join(part.capitalize() for part in name.removesuffix("_" + suffix.lower()).split("_")) + suffix


def find(name: str) -> str:
    """
    Check a method's short name, or `grpo`, `dpo` or `sft` for none; hyphens and capitals do not matter.

    Raises:
        `ValueError`: if there is no such method; the message suggests the nearest names.
    """
    key = name.lower().replace("-", "_")
    if key not in METHODS and key not in PLAIN:
        near = difflib.get_close_matches(key, METHODS, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        raise ValueError(
            f"Unknown method '{name}'. {hint}Methods are: {', '.join(METHODS)}; without a method: {', '.join(PLAIN)}."
        )
    return key


def load_trainer(name: str) -> type:
    """Trainer class of the method with this short name, or the base of a family."""
    key = find(name)
    if key in PLAIN:
        family = PLAIN[key]
        return getattr(importlib.import_module(f"papertrl.trainers.{family}.base"), BASES[family])
    return getattr(importlib.import_module(f"papertrl.trainers.{METHODS[key]}.{key}"), class_stem(key) + "Trainer")


def exports() -> dict[str, str]:
    """Public names of the package and the module that defines each."""
    names = {"compose": "papertrl.trainers.method", "METHODS": "papertrl.core.catalogue"}
    names["revise"] = "papertrl.evaluation.revision"
    for family, base in BASES.items():
        module = f"papertrl.trainers.{family}.base"
        names |= {base: module, base.replace("Trainer", "Config"): module}
    for method, family in METHODS.items():
        module = f"papertrl.trainers.{family}.{method}"
        names |= {class_stem(method) + kind: module for kind in ("Trainer", "Config")}
    return names


def method_table() -> str:
    """Markdown table of the catalogue, as README and the method index show it."""
    rows = ["| method | trainer | what it does | paper |", "|---|---|---|---|"]
    for name in METHODS:
        trainer = load_trainer(name)
        paper = trainer._paper
        rows.append(
            f"| `{name}` | `{trainer.__name__}` | {trainer.method.summary} "
            f"| [{paper['title']}](https://arxiv.org/abs/{paper['id']}) |"
        )
    return "\n".join(rows)
