"""What a trainer tells of its run: `run.json` and the model card."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from trl.trainer.utils import get_config_model_id

from ..core.configuration import field_default, introduced
from ..core.declaration import Method
from ..core.secrets import names_a_secret
from ..hub.cards import model_card
from ..hub.files import CARD_FILE, RUN_FILE
from ..hub.runfile import NO_CONFIGURATION, hardware, is_repo_id, plain, read_json, versions, write_run
from ..hub.scrubbing import scrub


def create_card(trainer: Any, dataset_name: str | None, tags: str | list[str] | None) -> None:
    """
    Write `run.json` and the card of a trainer into its output directory.

    Args:
        trainer ([`~papertrl.trainers.method.MethodTrainer`]):
            Trainer of one or several methods.
        dataset_name (`str`, *optional*):
            Dataset trained on.
        tags (`str` or `list[str]`, *optional*):
            Tags beside those of TRL, papertrl, the methods and their papers.
    """
    folder = Path(trainer.args.output_dir)
    run = describe(trainer)
    run["tags"] += [tags] if isinstance(tags, str) else list(tags or [])
    if dataset_name is not None:
        run["dataset"] = {"id": dataset_name}
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json(folder / RUN_FILE)
    # What an earlier version wrote says nothing of stages
    known = {"stages": {}} | (earlier or {})
    if earlier is not None and any(known.get(key) != scrub(run[key]) for key in ("methods", "stages", "config")):
        # Scores and examples of another run
        (folder / RUN_FILE).unlink()
    run = write_run(folder, run)
    (folder / CARD_FILE).write_text(model_card(run, folder), encoding="utf-8")


def describe(trainer: Any) -> dict[str, Any]:
    """
    What a trainer alone tells of its run, as JSON-like values without secrets, paths and host names.

    Args:
        trainer ([`~papertrl.trainers.method.MethodTrainer`]):
            Trainer of one or several methods.
    """
    model_id = get_config_model_id(trainer.model.config)
    on_hub = bool(model_id) and is_repo_id(model_id) and not os.path.isdir(model_id)
    runtimes = [line["train_runtime"] for line in trainer.state.log_history if "train_runtime" in line]
    adapter = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    return {
        "format": 1,
        "trainer": trainer._name,
        "family": trainer.family.name,
        "model_class": trainer.family.model_class,
        "pipeline_tag": trainer.family.pipeline_tag,
        "methods": [told(method) for method in trainer.methods],
        "stages": {stage: user.name for stage, user in trainer.user_stages.items()},
        "tags": [*trainer._tag_names, *(method.name for method in trainer.methods)],
        "adapter": adapter,
        "config": scrub(configuration(trainer.args)),
        "differing_defaults": trainer.args.differing_defaults,
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        "seconds": round(runtimes[-1], 1) if runtimes else None,
        "versions": versions(adapter),
        "hardware": hardware(trainer.accelerator.num_processes),
        "hub": {"repo_id": trainer.args.hub_model_id, "private": bool(trainer.args.hub_private_repo)},
    } | ({"base_model": model_id} if on_hub else {})


def told(method: Method) -> dict[str, Any]:
    """What the card tells of a method."""
    paper = method.paper
    return {
        "name": method.name,
        "title": method.title,
        "kind": method.kind,
        "slot": method.slot,
        "summary": method.summary,
        "signal": method.signal,
        "paper": paper
        and {
            "title": paper.title,
            "id": paper.id,
            "year": paper.year,
            "authors": list(paper.authors),
            "citation": paper.citation,
        },
    }


def configuration(args: Any) -> dict[str, Any]:
    """
    Fields of a config that differ from the defaults of its TRL parent, every field of the methods, and those for which
    their defaults differ.
    """
    parent = next(cls for cls in type(args).__mro__ if cls.__module__.startswith("trl."))
    inherited = {f.name: f for f in dataclasses.fields(parent)}
    own = introduced(type(args))
    names = [*own, *(name for name in inherited if name not in own)]
    chosen = {}
    for name in names:
        value = plain(getattr(args, name))
        kept_out = name in NO_CONFIGURATION or name.startswith("hub_") or names_a_secret(name)
        usual = name in inherited and value == plain(field_default(inherited[name]))
        if kept_out or (usual and name not in args.differing_defaults):
            continue
        chosen[name] = value
    return chosen
