"""What a job adds to the files of a run: its command, its recipe, held-out answers."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

from ..core.configuration import field_default
from ..hub.files import COMPLETIONS_FILE, RECIPE_FILE
from ..hub.runfile import NO_CONFIGURATION, plain, write_run
from ..hub.scrubbing import scrub, scrub_command
from .arguments import EMBEDDED_RUN
from .data import JobData, answer_length
from .evaluated import data_of
from .heldout import Answers, Ranking

KEPT_EXAMPLES = 8
PACKAGED_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DROPPED_FLAGS = (
    *NO_CONFIGURATION[:5],
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
    "hub_private_repo",
    "hub_revision",
)


def describe_job(job: Any, command: list[str], data: JobData) -> dict[str, Any]:
    """
    What a job knows of its run beside its trainer.

    Args:
        job ([`~papertrl.job.arguments.Job`]):
            The job.
        command (`list[str]`):
            Arguments of the command line.
        data ([`~papertrl.job.data.JobData`]):
            What it trained and was judged on.
    """
    arguments, name = job.arguments, job.model.model_name_or_path
    described = {
        "command": "papertrl " + shlex.join(scrub_command(command, DROPPED_FLAGS)),
        "measure": data.measure,
        "data": data_of(arguments, answer_length(job, data)),
        "rewards": arguments.reward_funcs or [],
    }
    if arguments.dataset_name is not None:
        described["dataset"] = {
            "id": arguments.dataset_name,
            "local": Path(arguments.dataset_name).exists(),
            "shortened": scrub(arguments.dataset_name) != arguments.dataset_name,
            "split": arguments.dataset_train_split,
        }
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
    embedded = {**EMBEDDED_RUN, **job.trainer_class.family.embedded} if job.embedded else {}
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
    folder: Path,
    job: Any,
    run: dict[str, Any],
    problems: Any,
    before: Answers | Ranking | None,
    after: Answers | Ranking | None,
) -> None:
    """Write `run.json`, `recipe.yaml` and, with held-out answers, `completions.jsonl`."""
    if before is not None:
        run["scores"] = {"measure": run["measure"], "how": after.how, "before": before.mean, "after": after.mean}
    if isinstance(before, Answers):
        rows = scrub(completions(problems, before, after))
        (folder / COMPLETIONS_FILE).write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
        run["scores"]["prompts"] = len(after.scores)
        run["examples"] = rows[:KEPT_EXAMPLES]
    run = write_run(folder, run)
    (folder / RECIPE_FILE).write_text(recipe(job, run), encoding="utf-8")
