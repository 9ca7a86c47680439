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
from .runfile import read_json, read_run
from .scrubbing import TOKEN, scrub, scrub_text

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
# Larger ones are vocabularies
LARGEST_SCRUBBED = 1 << 20


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
        owned (`tuple[str, ...]`, *optional*):
            Names, with wildcards, of files that are removed from the repository if `items` lacks them.
    """

    repo_id: str
    repo_type: str
    items: list[Item]
    skipped: list[str] = field(default_factory=list)
    owned: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = sum(item.size for item in self.items)
        lines = [f"{self.repo_type} {self.repo_id}: {len(self.items)} files, {_bytes(total)}"]
        lines += [f"  {_bytes(item.size):>10}  {item.path}" for item in self.items]
        lines += [f"  left out, since it leads outside the output directory: {name}" for name in self.skipped]
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

    Only names on the list count, so that optimizer state, `.env`, checkpoints and notes stay where they are. Small
    text files are scrubbed of tokens, absolute paths and the machine's name.

    Args:
        folder (`Path`):
            Folder to look in.
        patterns (`tuple[str, ...]`):
            Names, with wildcards.
        prefix (`str`, *optional*):
            Folder of the repository to put them in, with a slash.
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
    if path.suffix not in TEXTS or path.stat().st_size > LARGEST_SCRUBBED or path.name in TOKENIZER:
        return path
    text = path.read_text(errors="surrogateescape", encoding="utf-8")
    if path.suffix == ".json" and path.name in (*WEIGHTS, *CONFIGURATION):
        return _scrubbed_json(path, text)
    # Reports were scrubbed when they were made, except where people or methods put more into them
    clean = scrub_text(text)
    return path if clean == text else clean.encode(errors="surrogateescape")


def _scrubbed_json(path: Path, text: str) -> Path | bytes:
    content = json.loads(text)
    named = {key: content.get(key) for key in ("base_model_name_or_path", "_name_or_path")}
    clean = {key: scrub_text(value) for key, value in named.items() if isinstance(value, str)}
    if all(named[key] == value for key, value in clean.items()):
        return path
    return (json.dumps(content | clean, indent=2) + "\n").encode()


def model_publication(
    folder: Path,
    repo_id: str,
    space_id: str | None = None,
    completions_id: str | None = None,
    rounds_id: str | None = None,
) -> Publication:
    """
    The model's repository: weights or adapter, tokenizer, configuration, card, curves, samples, metrics, recipe.

    A start model that is not on the Hub goes along, since comparing needs it. The card names what else is published.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the folder holds no model, or a text in it holds a token.
    """
    items, skipped = publishable(folder, (*MODEL, *REPORTS))
    if not any(fnmatch.fnmatchcase(item.path, "*model*.safetensors") for item in items):
        raise JobError(
            f"'{folder}' holds no model: neither model.safetensors nor adapter_model.safetensors. Give the output "
            "directory of a finished run; a stopped one can be finished by `--resume_from_checkpoint`."
        )
    run = read_run(folder)
    start = folder / START_MODEL
    if run is not None and run.get("base_model") is None and start.is_dir() and not start.is_symlink():
        own, outside = publishable(start, MODEL, f"{START_MODEL}/")
        items, skipped = items + own, skipped + [f"{START_MODEL}/{name}" for name in outside]
    if run is not None and not any(name == CARD_FILE for name in skipped):
        items = [item for item in items if item.path != CARD_FILE]
        card = card_to_publish(folder, run, repo_id, space_id, completions_id, rounds_id)
        items.append(Item(CARD_FILE, card.encode()))
        items = [_with_base(item, run["base_model"]) if run.get("base_model") else item for item in items]
    items.sort(key=lambda item: item.path)
    check_items(items)
    return Publication(repo_id, "model", items, skipped, WEIGHTS)


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
        [`~papertrl.core.errors.JobError`]: if a text holds a token, or a card's metadata is not valid.
    """
    for item in items:
        if Path(item.path).suffix not in TEXTS or Path(item.path).name in TOKENIZER:
            continue
        content = item.content if isinstance(item.content, bytes) else item.content.read_bytes()
        if TOKEN.search(content.decode(errors="replace")):
            raise JobError(f"'{item.path}' holds what looks like an access token. Remove it, then publish again.")
        if item.path == CARD_FILE:
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
