"""What a run was: `run.json` and `recipe.yaml`, from which cards are made and runs repeated."""

import dataclasses
import enum
import json
import os
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from trl.trainer.utils import get_config_model_id

from .arguments import EMBEDDED, EMBEDDED_RUN
from .configuration import field_default, own_fields
from .heldout import Answers
from .scrubbing import names_a_secret, scrub, scrub_command

RUN_FILE = "run.json"
# Folder of a start model that was made for the run, or unpacked
START_MODEL = "start_model"
RECIPE_FILE = "recipe.yaml"
COMPLETIONS_FILE = "completions.jsonl"
# What `papertrl evaluate` leaves beside a run
EVALUATION_FILE, EVALUATION_REPORT, EVALUATION_PLOT = "evaluation.json", "evaluation.md", "evaluation.png"
EVALUATION_COMPLETIONS = "evaluation_completions"
KEPT_EXAMPLES = 8
PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Where a run goes, where it reports to and which machine it may use are no part of what it computes
NO_CONFIGURATION = (
    "output_dir",
    "overwrite_output_dir",
    "logging_dir",
    "run_name",
    "resume_from_checkpoint",
    "push_to_hub",
    "report_to",
    "disable_tqdm",
    "project",
    "trackio_space_id",
    "local_rank",
    "ddp_backend",
    "deepspeed",
    "accelerator_config",
    "model_init_kwargs",
    "vllm_server_host",
    "vllm_server_base_url",
    "dataset_num_proc",
    # Derived by the config from other fields
    "generation_batch_size",
    "activation_checkpointing",
    "debug",
)
DROPPED_FLAGS = (
    *NO_CONFIGURATION[:5],
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_revision",
)


def describe(trainer: Any) -> dict[str, Any]:
    """
    What a trainer alone tells of its run, as JSON-like values without secrets, paths and host names.

    Args:
        trainer ([`~papertrl.trainers.method.MethodTrainer`]):
            Trainer of one or several methods.
    """
    owners = [cls for cls in type(trainer).__mro__ if cls.__dict__.get("method") is not None]
    model_id = get_config_model_id(trainer.model.config)
    on_hub = bool(model_id) and is_repo_id(model_id) and not os.path.isdir(model_id)
    runtimes = [line["train_runtime"] for line in trainer.state.log_history if "train_runtime" in line]
    adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    return {
        "format": 1,
        "trainer": trainer._name,
        "family": trainer.family,
        "methods": [
            {
                "name": owner.method.name,
                "title": owner._name,
                "summary": owner.method.summary,
                "signal": owner.method.signal,
                "paper": {key: owner._paper[key].strip() for key in ("title", "id", "citation")},
            }
            for owner in owners
        ],
        "tags": [*trainer._tag_names, *(owner.method.name for owner in owners)],
        "adapter": adapter,
        "config": scrub(configuration(trainer.args)),
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "seconds": round(runtimes[-1], 1) if runtimes else None,
        "versions": versions(adapter),
        "hardware": hardware(trainer.accelerator.num_processes),
        "hub": {"repo_id": trainer.args.hub_model_id, "private": bool(trainer.args.hub_private_repo)},
    } | ({"base_model": model_id} if on_hub else {})


def configuration(args: Any) -> dict[str, Any]:
    """Fields of a config that differ from the defaults of its TRL parent, and every field of the methods."""
    parent = next(cls for cls in type(args).__mro__ if cls.__module__.startswith("trl."))
    inherited = {f.name: f for f in dataclasses.fields(parent)}
    own = [
        f.name
        for cls in reversed(type(args).__mro__)
        if cls.__module__.startswith("papertrl") and dataclasses.is_dataclass(cls) and "__annotations__" in vars(cls)
        for f in own_fields(cls)
    ]
    names = [*own, *(name for name in inherited if name not in own)]
    chosen = {}
    for name in names:
        value = plain(getattr(args, name))
        kept_out = name in NO_CONFIGURATION or name.startswith("hub_") or names_a_secret(name)
        if kept_out or (name in inherited and value == plain(field_default(inherited[name]))):
            continue
        chosen[name] = value
    return chosen


def plain(value: Any) -> Any:
    """`value` as JSON has it: enums by value, tuples as lists, other objects by name."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return getattr(value, "__name__", type(value).__name__)


def is_repo_id(name: str) -> bool:
    """Whether `name` has the form of a Hub id, `owner/name` or an old one without owner."""
    return 1 <= len(parts := name.split("/")) <= 2 and all(parts) and not name.startswith((".", "/", "~"))


def versions(adapter: bool) -> dict[str, str]:
    """Versions of Python and of the packages that a run computes with."""
    packages = ["papertrl", "trl", "transformers", "torch", "accelerate", "datasets", *(["peft"] if adapter else [])]
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def hardware(processes: int) -> str:
    """One line about the machine; nothing that tells which one it is."""
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        device = f"{torch.cuda.get_device_name(0)} ({memory:.0f} GiB)"
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
        device = f"CPU {model or platform.machine()}, {os.cpu_count()} cores"
    return f"{processes} process{'es' if processes > 1 else ''} on {device}, {platform.system()}"


def write_run(folder: Path, run: dict[str, Any]) -> dict[str, Any]:
    """
    Write `run.json`, and return it whole: what an earlier call wrote and `run` does not have is kept.

    Args:
        folder (`Path`):
            Output directory of the run.
        run (`dict`):
            What [`describe`] gives, or what a job adds to it.
    """
    run = (read_run(folder) or {}) | scrub(run)
    partial = folder / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    partial.replace(folder / RUN_FILE)
    return run


def read_run(folder: Path) -> dict[str, Any] | None:
    """Content of `run.json`, or `None` where there is none that can be read."""
    return read_json(folder / RUN_FILE)


def read_json(path: Path) -> dict[str, Any] | None:
    """The mapping that a JSON file holds, or `None` where there is none that can be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) else None


# --- What a job adds ------------------------------------------------------------------------------------------------


def describe_job(job: Any, command: list[str], measure: str) -> dict[str, Any]:
    """
    What a job knows of its run beside its trainer.

    Args:
        job ([`~papertrl.arguments.Job`]):
            The job.
        command (`list[str]`):
            Arguments of the command line.
        measure (`str`):
            What was measured on held-out prompts.
    """
    arguments, name = job.arguments, job.model.model_name_or_path
    described = {
        "command": "papertrl " + shlex.join(scrub_command(command, DROPPED_FLAGS)),
        "measure": measure,
        "rewards": arguments.reward_funcs or [],
    }
    if arguments.dataset_name is not None:
        local = Path(arguments.dataset_name).exists()
        described["dataset"] = {"id": arguments.dataset_name, "local": local, "split": arguments.dataset_train_split}
    else:
        described["task"] = {"name": arguments.task or "addition", "kwargs": arguments.task_kwargs}
    if name == "smollm2":
        described["base_model"] = PACKAGED_MODEL
    elif name is None or Path(name).exists():
        described["base_model"] = None
    else:
        described["base_model"] = name
    return described


def recipe(job: Any, run: dict[str, Any]) -> str:
    """The job as YAML that `papertrl train --config` reads; local paths are shortened to their last component."""
    own = {f.name: plain(getattr(job.arguments, f.name)) for f in dataclasses.fields(job.arguments)}
    defaults = {f.name: plain(field_default(f)) for f in dataclasses.fields(job.arguments)}
    model = {f.name: plain(getattr(job.model, f.name)) for f in dataclasses.fields(job.model)}
    model_defaults = {f.name: plain(field_default(f)) for f in dataclasses.fields(job.model)}
    changed = {key: value for key, value in own.items() if value != defaults[key] and key != "overwrite_output_dir"}
    changed_model = {key: value for key, value in model.items() if value != model_defaults[key]}
    # Defaults of a job without model are not TRL's; a value that equals TRL's must be told as well
    embedded = {**EMBEDDED_RUN, **EMBEDDED[job.trainer_class.family]} if job.embedded else {}
    told = {key: plain(getattr(job.training, key)) for key in embedded if hasattr(job.training, key)}
    told = {key: value for key, value in told.items() if key not in NO_CONFIGURATION}
    content = {"methods": job.methods} | scrub(changed_model | changed) | told | run["config"]
    return "# How to repeat this run: papertrl train --config recipe.yaml\n" + yaml.safe_dump(content, sort_keys=False)


def completions(problems: Any, before: Answers, after: Answers) -> list[dict[str, Any]]:
    """Held-out prompts with the answers of the start model and of the trained one, and their scores."""
    answers = problems["answer"] if "answer" in problems.column_names else [None] * len(problems)
    return [
        {
            "prompt": prompt,
            "answer": None if answer is None else str(answer),
            "before": before.texts[i],
            "after": after.texts[i],
            "before_score": before.scores[i],
            "after_score": after.scores[i],
        }
        for i, (prompt, answer) in enumerate(zip(problems["prompt"], answers, strict=True))
    ]


def write_job_files(
    folder: Path, job: Any, run: dict[str, Any], problems: Any, before: Answers | None, after: Answers | None
) -> None:
    """Write `run.json`, `recipe.yaml` and, with held-out answers, `completions.jsonl`."""
    if before is not None and after is not None:
        rows = scrub(completions(problems, before, after))
        (folder / COMPLETIONS_FILE).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        run["scores"] = {
            "measure": run["measure"],
            "prompts": len(after.scores),
            "before": before.mean,
            "after": after.mean,
        }
        run["examples"] = rows[:KEPT_EXAMPLES]
    run = write_run(folder, run)
    (folder / RECIPE_FILE).write_text(recipe(job, run))
