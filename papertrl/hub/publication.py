"""What of a run is published: files by name, scrubbed texts, and nothing from outside the output directory."""

import fnmatch
import io
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import JobError
from ..core.secrets import place_of_secret
from .cards import check_card, completions_card, model_card, rounds_card
from .client import Item
from .files import (
    CARD_FILE,
    COMPLETIONS_FILE,
    CURVES_FILE,
    EVALUATION_FILE,
    EVALUATION_PLOT,
    EVALUATION_REPORT,
    METRICS_FILE,
    PROVENANCE,
    RECIPE_FILE,
    ROUNDS,
    RUN_FILE,
    SAMPLES_FILE,
    START_MODEL,
)
from .health import ADAPTER_CONFIG, check_model, missing_reports
from .runfile import is_repo_id, read_json, read_run
from .scrubbing import scrub, scrub_text

WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_config.json",
)
CONFIGURATION = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
REPORTS = (
    CARD_FILE,
    RUN_FILE,
    RECIPE_FILE,
    METRICS_FILE,
    CURVES_FILE,
    SAMPLES_FILE,
    EVALUATION_FILE,
    EVALUATION_REPORT,
    EVALUATION_PLOT,
)
MODEL = (*WEIGHTS, *CONFIGURATION, *TOKENIZER)
TEXTS = (".json", ".jsonl", ".md", ".yaml", ".jinja", ".txt")
# Of a round's folder, in the order in which a card names them
TABLES = ("pairs", "candidates")
# Lists of words, in which a name before a value gives nothing away
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
# In a model's JSON files, where it was loaded from
ORIGINS = ("base_model_name_or_path", "_name_or_path", "name_or_path")


@dataclass
class Publication:
    """
    One repository and what goes into it.

    Args:
        repo_id (`str`):
            Repository, without owner where only the Hub can tell it.
        repo_type (`str`):
            `model`, `dataset` or `space`.
        items (`list[Item]`):
            Files.
        skipped (`list[str]`, *optional*):
            Files that have a name to publish but lie outside the output directory.
        missing (`list[str]`, *optional*):
            Files that the run should have left, and that are not there.
        owned (`tuple[str, ...]`, *optional*):
            Names, with wildcards, of files that are removed from the repository if `items` lacks them.
    """

    repo_id: str
    repo_type: str
    items: list[Item]
    skipped: list[str] = field(default_factory=list)
    owned: tuple[str, ...] = ()
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = sum(item.size for item in self.items)
        lines = [f"{self.repo_type} {self.repo_id}: {len(self.items)} files, {_bytes(total)}"]
        lines += [f"  {_bytes(item.size):>10}  {item.path}" for item in self.items]
        lines += [f"  left out, since it leads outside the output directory: {name}" for name in self.skipped]
        lines += [f"  missing: {name}" for name in self.missing]
        return "\n".join(lines)


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 1000 or unit == "GB":
            break
    return f"{count:.1f} {unit}"


def publishable(folder: Path, patterns: tuple[str, ...], prefix: str = "") -> tuple[list[Item], list[str]]:
    """
    Files directly in `folder` that may be published, and the names of those left out for leading outside it.

    Only names on the list count, so that optimizer state, `.env`, checkpoints and notes stay where they are. Reports
    are scrubbed of secrets, absolute paths and the machine's name. What the model computes with is not changed: a
    secret in it is refused.

    Args:
        folder (`Path`):
            Folder to look in.
        patterns (`tuple[str, ...]`):
            Names, with wildcards.
        prefix (`str`, *optional*):
            Folder of the repository to put them in, with a slash.

    Raises:
        [`~papertrl.core.errors.JobError`]: if a file of the model or its tokenizer holds a secret, naming the place.
    """
    root = folder.resolve()
    items, outside = [], []
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns) or not path.is_file():
            continue
        # A hard link cannot be told from a file of its own; a symbolic one must stay within the folder
        if not path.resolve().is_relative_to(root):
            outside.append(path.name)
        else:
            items.append(Item(prefix + path.name, _content(path)))
    return items, outside


def _content(path: Path) -> Path | bytes:
    if path.name in REPORTS and path.suffix in TEXTS:
        # Scrubbed when they were made, except where people or methods put more into them
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        clean = scrub_text(text)
        return path if clean == text else clean.encode("utf-8", "surrogateescape")
    if path.suffix not in TEXTS and path.name not in VOCABULARIES:
        return path
    refuse_secrets(path.name, path.read_text(encoding="utf-8", errors="replace"))
    return _without_origin(path) if path.suffix == ".json" and path.name not in VOCABULARIES else path


def refuse_secrets(name: str, text: str) -> None:
    """
    Check that a text which is sent as it is holds no secret.

    Raises:
        [`~papertrl.core.errors.JobError`]: naming file, line and column.
    """
    place = place_of_secret(text, names=Path(name).name not in VOCABULARIES)
    if place is not None:
        line, column = place
        raise JobError(
            f"'{name}' holds what looks like a secret, in line {line} at column {column}. Remove it, then publish "
            "again; if it was a real one, revoke it."
        )


def _without_origin(path: Path) -> Path | bytes:
    content = read_json(path) or {}
    named = {key: content[key] for key in ORIGINS if isinstance(content.get(key), str)}
    clean = {key: scrub_text(value) for key, value in named.items()}
    return path if clean == named else (json.dumps(content | clean, indent=2) + "\n").encode()


def model_publication(
    folder: Path,
    repo_id: str,
    space_id: str | None = None,
    completions_id: str | None = None,
    rounds_id: str | None = None,
    base_model: str | None = None,
    incomplete: bool = False,
) -> Publication:
    """
    The model's repository: weights or adapter, tokenizer, configuration, card, curves, samples, metrics, recipe.

    A start model that is not on the Hub goes along, since comparing needs it. The card names what else is published.

    Args:
        folder (`Path`):
            Output directory.
        repo_id (`str`):
            Hub id of the model.
        space_id (`str`, *optional*), completions_id (`str`, *optional*), rounds_id (`str`, *optional*):
            What else is published.
        base_model (`str`, *optional*):
            Hub id of the base model. Defaults to what the run says.
        incomplete (`bool`, *optional*, defaults to `False`):
            Whether to publish although the run's reports are not all there.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the folder holds no model or a damaged one, lacks reports, or could not
            be loaded by others, or if a file of the model holds a secret.
    """
    check_model(folder)
    missing = missing_reports(folder)
    items, skipped = publishable(folder, (*MODEL, *REPORTS))
    if not any(fnmatch.fnmatchcase(item.path, "*model*.safetensors") for item in items):
        raise JobError(
            f"'{folder}' holds no model: neither model.safetensors nor adapter_model.safetensors. Give the output "
            "directory of a finished run; a stopped one can be finished by `--resume_from_checkpoint`."
        )
    if missing and missing != [RUN_FILE] and not incomplete:
        raise JobError(
            f"'{folder}' lacks {', '.join(missing)}, which the run leaves at its end. Restore what was moved, or "
            "publish without by `--incomplete`."
        )
    run = read_run(folder)
    if run is not None and base_model is not None:
        run["base_model"] = base_model
    base_model = base_model or (run or {}).get("base_model")
    start = folder / START_MODEL
    if base_model is None and start.is_dir() and not start.is_symlink():
        check_model(start)
        own, outside = publishable(start, MODEL, f"{START_MODEL}/")
        items, skipped = items + own, skipped + [f"{START_MODEL}/{name}" for name in outside]
    elif base_model is None and not any(fnmatch.fnmatchcase(item.path, "model*.safetensors") for item in items):
        _check_base_is_on_hub(folder, run)
    if run is not None and not any(name == CARD_FILE for name in skipped):
        items = [item for item in items if item.path != CARD_FILE]
        card = card_to_publish(folder, run, repo_id, space_id, completions_id, rounds_id)
        items.append(Item(CARD_FILE, card.encode()))
    if base_model is not None:
        items = [_with_base(item, base_model) for item in items]
    items.sort(key=lambda item: item.path)
    check_items(items)
    return Publication(repo_id, "model", items, skipped, WEIGHTS, missing)


def _check_base_is_on_hub(folder: Path, run: dict[str, Any] | None) -> None:
    """An adapter is of use to those only who can load its base, too."""
    base = (read_json(folder / ADAPTER_CONFIG) or {}).get("base_model_name_or_path") or ""
    # Of a run, its description would know
    if run is None and is_repo_id(base) and not Path(base).exists():
        return
    raise JobError(
        f"'{folder}' holds an adapter of the local model '{base}', without which nobody can load it. Publish that "
        "model and name it by `--base_model OWNER/NAME`, or merge the two and publish the result: "
        f"`papertrl merge {folder}`."
    )


def _with_base(item: Item, base_model: str) -> Item:
    """An adapter's configuration names the folder that the base model was loaded from; others need its Hub id."""
    if item.path != "adapter_config.json":
        return item
    content = json.loads(item.content if isinstance(item.content, bytes) else item.content.read_bytes())
    return Item(item.path, (json.dumps(content | {"base_model_name_or_path": base_model}, indent=2) + "\n").encode())


def card_to_publish(
    folder: Path,
    run: dict[str, Any],
    repo_id: str,
    space_id: str | None,
    completions_id: str | None,
    rounds_id: str | None,
) -> str:
    """The card, made anew with the repository's name and the newest evaluation, unless someone edited it."""
    path = folder / CARD_FILE
    made = [model_card(run, folder, evaluated=evaluated) for evaluated in (True, False)]
    if path.exists() and path.read_text(encoding="utf-8") not in made:
        return scrub_text(path.read_text(encoding="utf-8"))
    return model_card(run, folder, repo_id, space_id, completions_id, rounds_id)


def check_items(items: list[Item]) -> None:
    """
    Check what is about to be sent.

    Raises:
        [`~papertrl.core.errors.JobError`]: if a text holds a secret, or a card's metadata is not valid.
    """
    for item in items:
        # Files that are sent as they are were checked when they were read
        if isinstance(item.content, bytes) and Path(item.path).suffix in TEXTS:
            refuse_secrets(item.path, item.content.decode(errors="replace"))
        if item.path == CARD_FILE:
            content = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
            try:
                check_card(content.decode())
            except ValueError as error:
                raise JobError(f"{error} Mend it, or delete {CARD_FILE} to have it made anew.") from error


def completions_publication(folder: Path, repo_id: str, model_id: str) -> Publication:
    """
    The dataset of held-out completions, with its own card.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the run kept none.
    """
    run, path = read_run(folder), folder / COMPLETIONS_FILE
    if run is None or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise JobError(
            f"'{folder}' holds no {COMPLETIONS_FILE}, which a run with held-out prompts writes; leave out "
            "`--with_completions`."
        )
    text = scrub_text(path.read_text(encoding="utf-8"))
    card = completions_card(run, len(text.splitlines()), model_id)
    items = [Item(CARD_FILE, card.encode()), Item(COMPLETIONS_FILE, text.encode())]
    check_items(items)
    return Publication(repo_id, "dataset", items)


def rounds_publication(folder: Path, repo_id: str, model_id: str) -> Publication:
    """
    The dataset of the online loop's rounds: pairs and candidates of each, how they came about, and a card.

    Texts are scrubbed. Tokens of a text that was are left out, since they would give it away.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the run has no finished round.
    """
    run, root = read_run(folder), folder / ROUNDS
    found = {int(m[1]): path for path in root.glob("round_*") if (m := re.fullmatch(r"round_(\d+)", path.name))}
    finished = [path for _, path in sorted(found.items()) if read_json(path / PROVENANCE) is not None]
    if run is None or not finished:
        raise JobError(
            f"'{folder}' holds no {ROUNDS}, which a preference run with `--online_iterations` writes; leave out "
            "`--with_rounds`."
        )
    items, rounds, skipped = [], [], []
    for path in finished:
        names = [f"{table}.parquet" for table in TABLES if (path / f"{table}.parquet").is_file()]
        outside = [n for n in (PROVENANCE, *names) if not (path / n).resolve().is_relative_to(folder.resolve())]
        skipped += [f"{ROUNDS}/{path.name}/{name}" for name in outside]
        if outside:
            continue
        provenance = scrub(read_json(path / PROVENANCE))
        rounds.append({**provenance, "name": path.name, "tables": [Path(name).stem for name in names]})
        text = json.dumps(provenance, indent=1, ensure_ascii=False) + "\n"
        items.append(Item(f"{path.name}/{PROVENANCE}", text.encode()))
        items += [Item(f"{path.name}/{name}", _scrubbed_table(path / name)) for name in names]
    items.insert(0, Item(CARD_FILE, rounds_card(run, rounds, model_id).encode()))
    check_items(items)
    return Publication(repo_id, "dataset", items, skipped, ("round_*/*",))


def _scrubbed_table(path: Path) -> Path | bytes:
    table = pq.read_table(path)
    rows = table.to_pylist()
    clean = [_scrubbed_row(row) for row in rows]
    if clean == rows:
        return path
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(clean, schema=table.schema), buffer)
    return buffer.getvalue()


def _scrubbed_row(row: dict[str, Any]) -> dict[str, Any]:
    # Keys are columns: names such as `feedback_token` hold no secret, and none may be missing
    clean = {key: scrub(value) for key, value in row.items()}
    if any(isinstance(value, (str, list)) and clean[key] != value for key, value in row.items()):
        clean |= {key: None for key in row if key.endswith("_ids")}
    return clean
