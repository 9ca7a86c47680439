"""Model cards, made from what `run.json` keeps of a run, so that they can be made again at any time."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import DatasetCardData, EvalResult, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from .files import (
    CARD_FILE,
    COMPLETIONS_FILE,
    CURVES_FILE,
    EVALUATION_FILE,
    EVALUATION_PLOT,
    RECIPE_FILE,
    SAMPLES_FILE,
    START_MODEL,
)
from .runfile import is_repo_id, read_json
from .scrubbing import scrub

SHOWN_EXAMPLES = 3
SHOWN_AUTHORS = 3

TRL_CITATION = """\
@software{vonwerra2020trl,
  title  = {{TRL: Transformers Reinforcement Learning}},
  author = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
            Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallouédec, Quentin},
  url    = {https://github.com/huggingface/trl},
  year   = {2020}
}"""


# --- The model card -------------------------------------------------------------------------------------------------


def model_card(
    run: dict[str, Any],
    folder: Path,
    model_id: str | None = None,
    space_id: str | None = None,
    completions_id: str | None = None,
    rounds_id: str | None = None,
    evaluated: bool = True,
) -> str:
    """
    Text of a model card, with the metadata block that the Hub reads.

    Args:
        run (`dict`):
            Content of `run.json`.
        folder (`Path`):
            Output directory: which files there are decides what the card shows.
        model_id (`str`, *optional*):
            Hub id. Defaults to the folder's name.
        space_id (`str`, *optional*), completions_id (`str`, *optional*), rounds_id (`str`, *optional*):
            Space and datasets that belong to the model.
        evaluated (`bool`, *optional*, defaults to `True`):
            Whether to show what `evaluation.json` says.
    """
    evaluation = evaluation_table(folder, model_id) if evaluated else None
    dataset, link = dataset_of(run)
    examples = run.get("examples", [])
    scores = run.get("scores")
    title = f"{(model_id or folder.resolve().name).split('/')[-1]}"
    data = ModelCardData(
        base_model=run.get("base_model"),
        datasets=[run["dataset"]["id"]] if link else None,
        library_name="peft" if run["adapter"] else "transformers",
        pipeline_tag=pipeline_of(run),
        model_name=title,
        tags=tags_of(run),
        eval_results=eval_results(run, evaluation),
        ignore_metadata_errors=False,
    )
    if run.get("base_model"):
        data.base_model_relation = "adapter" if run["adapter"] else "finetune"
    body = _template("model_card.md.jinja").render(
        title=title,
        model_id=model_id or folder.resolve().name,
        base_model=run.get("base_model"),
        started_here=(folder / START_MODEL).is_dir(),
        adapter=run["adapter"],
        dataset=dataset,
        dataset_link=link,
        methods=run["methods"],
        stages=run.get("stages", {}),
        model_class=run.get("model_class", "AutoModelForCausalLM"),
        pipeline_tag=pipeline_of(run),
        trainer=run["trainer"],
        example_prompt=json.dumps(examples[0]["prompt"] if examples else "Hello", ensure_ascii=False),
        space_id=space_id,
        completions_id=completions_id,
        rounds_id=rounds_id,
        scores=scores,
        evaluation=evaluation,
        has_evaluation_plot=evaluation is not None and (folder / EVALUATION_PLOT).exists(),
        has_curves=(folder / CURVES_FILE).exists(),
        has_samples=(folder / SAMPLES_FILE).exists(),
        has_recipe=(folder / RECIPE_FILE).exists(),
        examples=examples[:SHOWN_EXAMPLES],
        command=run.get("command"),
        seed=run["seed"],
        config=run["config"],
        differing_defaults=run.get("differing_defaults", {}),
        hardware=run["hardware"],
        steps=run["steps"],
        seconds=run.get("seconds"),
        versions=run["versions"],
        trl_citation=TRL_CITATION,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def tags_of(run: dict[str, Any]) -> list[str]:
    """Tags of a card, each once however it is written: those of the run, and the papers'."""
    names = [method["name"] for method in run["methods"]]
    papers = [f"arxiv:{method['paper']['id']}" for method in run["methods"] if method["paper"]]
    return distinct_tags(["trl", "papertrl", *names, *run["tags"], *papers])


def distinct_tags(tags: list[str]) -> list[str]:
    """Tags without those that differ from an earlier one in case or dashes alone."""
    kept: dict[str, str] = {}
    for tag in tags:
        kept.setdefault(re.sub(r"[\s_-]", "-", tag.lower()), tag)
    return list(kept.values())


def pipeline_of(run: dict[str, Any]) -> str:
    """What the Hub files the model of a run under."""
    return run.get("pipeline_tag", "text-generation")


def dataset_of(run: dict[str, Any]) -> tuple[str | None, str | None]:
    """How to name what a run trained on, and its page on the Hub, if it has one."""
    dataset = run.get("dataset")
    if dataset is None:
        task = run.get("task")
        return (f"the procedural task `{task['name']}` of papertrl" if task else None), None
    # The folders above a local one are nobody's business
    name = Path(dataset["id"]).name if dataset.get("local") else dataset["id"]
    on_hub = not dataset.get("local") and "/" in name and is_repo_id(name)
    return (name if on_hub else f"`{name}`"), (f"https://huggingface.co/datasets/{name}" if on_hub else None)


def evaluation_table(folder: Path, model_id: str | None) -> dict[str, Any] | None:
    """
    What `papertrl evaluate` measured, as a table: models in columns, metrics in rows, 95 % intervals in brackets.

    Args:
        folder (`Path`):
            Output directory that may hold `evaluation.json`.
        model_id (`str`, *optional*):
            Name to show for the model of this folder.
    """
    content = read_json(folder / EVALUATION_FILE)
    if not content or not content.get("models"):
        return None
    models = content["models"]
    this = next((n for n in models if Path(n).resolve() == folder.resolve() or Path(n).name == folder.name), None)
    shown = {name: (model_id or folder.resolve().name) if name == this else scrub(name) for name in models}
    metrics = list(dict.fromkeys(metric for results in models.values() for metric in results))
    dataset = scrub(content.get("dataset") or {})
    source = dataset.get("id") or dataset.get("name") or dataset.get("task") or "held-out prompts"
    return {
        "caption": f"Measured by `papertrl evaluate` on {source}; in brackets 95 % bootstrap intervals.",
        "source": source,
        "models": [shown[name] for name in models],
        "rows": [{"metric": m, "values": [_measured(results.get(m)) for results in models.values()]} for m in metrics],
        "this": {metric: values["value"] for metric, values in models[this].items()} if this else {},
    }


def _measured(values: dict[str, float] | None) -> str:
    if values is None or values.get("value") is None:
        return ""
    interval = f" [{values['low']:.3f}, {values['high']:.3f}]" if values.get("low") is not None else ""
    return f"{values['value']:.3f}{interval}"


def eval_results(run: dict[str, Any], evaluation: dict[str, Any] | None) -> list[EvalResult] | None:
    """Results for the metadata block, which the Hub shows beside the card."""
    dataset, link = dataset_of(run)
    scores, task = run.get("scores"), pipeline_of(run)
    results = []
    if scores:
        how = "greedy, held-out" if "prompts" in scores else "held-out"
        results.append((dataset or "held-out prompts", scores["measure"], scores["after"], how))
    if evaluation:
        results += [(evaluation["source"], m, value, "papertrl evaluate") for m, value in evaluation["this"].items()]
    return [
        EvalResult(
            task_type=task,
            task_name=task.replace("-", " ").capitalize(),
            dataset_type=run["dataset"]["id"] if link else "papertrl",
            dataset_name=source.replace("`", ""),
            metric_type=metric,
            metric_name=f"{metric} ({how})",
            metric_value=round(float(value), 6),
            verified=False,
        )
        for source, metric, value, how in results
        if value is not None
    ] or None


def check_card(text: str) -> None:
    """
    Check a card's metadata as far as that is possible without the Hub.

    Raises:
        `ValueError`: if the block is missing or is not what the Hub reads.
    """
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0]:
        raise ValueError(f"{CARD_FILE} has no metadata block between two lines of three dashes.")
    try:
        data = yaml.safe_load(parts[1])
        if not isinstance(data, dict) or not all(isinstance(tag, str) for tag in data.get("tags") or []):
            raise ValueError("a mapping with a list of texts as `tags` is expected")
        if "model-index" in data:
            model_index_to_eval_results(data["model-index"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"The metadata block of {CARD_FILE} is not valid: {error}") from error


def completions_card(run: dict[str, Any], rows: int, model_id: str) -> str:
    """Text of the card of the dataset of held-out completions."""
    dataset, _ = dataset_of(run)
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=distinct_tags(["trl", "papertrl", *(method["name"] for method in run["methods"])]),
        configs=[{"config_name": "default", "data_files": COMPLETIONS_FILE}],
    )
    body = _template("completions_card.md.jinja").render(
        model_id=model_id,
        base_model=run.get("base_model"),
        rows=rows,
        dataset=dataset,
        measure=run["scores"]["measure"] if run.get("scores") else "score",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def rounds_card(run: dict[str, Any], rounds: list[dict[str, Any]], model_id: str) -> str:
    """
    Text of the card of the dataset of the online loop's rounds.

    Args:
        run (`dict`):
            Content of `run.json`.
        rounds (`list[dict]`):
            Provenance of each, with its `name` and `tables`.
        model_id (`str`):
            Hub id of the model that was trained on them.
    """
    dataset, _ = dataset_of(run)
    files = {
        table: [{"split": r["name"], "path": f"{r['name']}/{table}.parquet"} for r in rounds if table in r["tables"]]
        for table in ("pairs", "candidates")
    }
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=distinct_tags(["trl", "papertrl", "preference", "synthetic", *(m["name"] for m in run["methods"])]),
        configs=[{"config_name": table, "data_files": split} for table, split in files.items() if split],
    )
    body = _template("rounds_card.md.jinja").render(
        model_id=model_id,
        base_model=run.get("base_model"),
        dataset=dataset,
        methods=run["methods"],
        rounds=rounds,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


# --- Markdown -------------------------------------------------------------------------------------------------------


def fenced(content: Any) -> str:
    """A code block that the text in it cannot leave."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, indent=1)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def sentence(text: str) -> str:
    """A text that ends as a sentence does, once."""
    text = " ".join(text.split())
    return text if re.search(r"[.!?…][\"')\]]*$", text) else f"{text}."


def authors(names: list[str]) -> str:
    """Authors of a paper, the first ones where there are many."""
    if len(names) > SHOWN_AUTHORS + 1:
        return f"{', '.join(names[:SHOWN_AUTHORS])} and {len(names) - SHOWN_AUTHORS} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def cell(content: Any) -> str:
    """A table cell that the text in it cannot leave."""
    text = " ".join(str(content).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def code_span(content: Any) -> str:
    """A value as code within a line, which the text in it cannot leave."""
    text = " ".join((content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)).split())
    ticks = "`"
    while ticks in text:
        ticks += "`"
    pad = " " if "`" in text or not text else ""
    return f"{ticks}{pad}{text}{pad}{ticks}"


def code_cell(content: Any) -> str:
    """A value as code in a table cell."""
    return code_span(content).replace("|", "\\|")


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("papertrl.model_cards", "."),
        undefined=jinja2.StrictUndefined,
        autoescape=False,
        keep_trailing_newline=True,
    )
    # Jinja's own escapes HTML, which code blocks do not undo
    named = (fenced, cell, code_cell, sentence, authors)
    environment.filters |= {filter.__name__: filter for filter in named} | {"tojson": json.dumps}
    return environment.get_template(name)
