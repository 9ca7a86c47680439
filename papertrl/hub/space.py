"""`papertrl space`: a ready-to-push folder with a Gradio Space in which a model can be tried beside its base."""

import argparse
import importlib.util
import json
import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import SpaceCardData

from ..core.errors import JobError
from ..core.parsing import CommandParser
from .cards import pipeline_of
from .client import Item
from .files import START_MODEL
from .health import check_model
from .publication import MODEL, REPORTS, publishable
from .runfile import read_run
from .scrubbing import scrub

SPACE_FILE = "space.json"
BUNDLED = "model"
# What the Hub reads of a Space's card, beside what depends on the model
CARD = {
    "emoji": "📄",
    "colorFrom": "green",
    "colorTo": "gray",
    "sdk": "gradio",
    "python_version": "3.11",
    "app_file": "app.py",
    "pinned": False,
}
LONGEST_TITLE = 60


def render_space(model: str, output_dir: Path, run: dict[str, Any] | None, bundle: Path | None = None) -> Path:
    """
    Render the Space of a model into a folder, without network.

    The folder stands alone: it needs the packages of its `requirements.txt`, and not this library.

    Args:
        model (`str`):
            Hub id of the model or adapter.
        output_dir (`Path`):
            Folder to write, made if it does not exist. Files of other names are left alone.
        run (`dict`, *optional*):
            Content of the run's `run.json`, for what the page tells where the model has none.
        bundle (`Path`, *optional*):
            Folder of a model to carry along, instead of reading `model` from the Hub.

    Returns:
        `Path`: the folder.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the folder cannot be written, `bundle` holds no model, or the model
            answers no prompts.
    """
    if run and pipeline_of(run) != "text-generation":
        raise JobError(f"'{model}' scores answers and writes none: there is no Space in which to try such a model.")
    source = Path(importlib.util.find_spec("papertrl.spaces").origin).parent / "demo"
    guidance = importlib.util.find_spec("papertrl.samplers.decoding.guidance").origin
    settings = {"model": BUNDLED if bundle else model} | ({"run": scrub(run)} if run else {})
    carried = _carried(bundle) if bundle else []
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in sorted(source.iterdir()):
            if path.suffix in (".py", ".css"):
                shutil.copyfile(path, output_dir / path.name)
        shutil.copyfile(guidance, output_dir / "papertrl_guidance.py")
        (output_dir / "requirements.txt").write_text(
            requirements((source / "requirements.txt").read_text(encoding="utf-8")), encoding="utf-8"
        )
        (output_dir / "README.md").write_text(card(model, run, bundle is not None), encoding="utf-8")
        (output_dir / SPACE_FILE).write_text(
            json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        for item in carried:
            path = output_dir / BUNDLED / item.path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(item.content) if isinstance(item.content, bytes) else shutil.copyfile(item.content, path)
    except OSError as error:
        raise JobError(f"The Space cannot be written to '{output_dir}' ({error.strerror}).") from error
    return output_dir


def requirements(pinned: str) -> str:
    """The pinned requirements, at the versions that are installed here where they are."""
    lines = []
    for line in pinned.splitlines():
        name, _, number = line.partition("==")
        lines.append(f"{name}=={_installed(name) or number}")
    return "\n".join(lines) + "\n"


def _installed(name: str) -> str | None:
    try:
        # A build for one kind of machine (`2.13.0+cpu`) is not on the package index
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def card(model: str, run: dict[str, Any] | None, bundled: bool) -> str:
    """Text of the Space's card."""
    name = model.rstrip("/").rpartition("/")[2]
    methods = [method["name"] for method in (run or {}).get("methods", [])]
    template = (Path(importlib.util.find_spec("papertrl.spaces").origin).parent / "demo" / "README.md").read_text(
        encoding="utf-8"
    )
    pinned_sdk = re.search(r"^sdk_version: (\S+)$", template, re.MULTILINE).group(1)
    data = SpaceCardData(
        title=f"{name} demo"[:LONGEST_TITLE],
        **CARD,
        sdk_version=_installed("gradio") or pinned_sdk,
        short_description="A trained model beside its base",
        tags=["trl", "papertrl", *methods],
        **({} if bundled else {"models": [model]}),
    )
    where = "in the folder `model`" if bundled else f"[{model}](https://huggingface.co/{model})"
    return f"""---
{data.to_yaml()}
---

# {name}, beside its base

Ask the trained model ({where}) and its base the same thing, turn training up and down with a slider, look at the run's
curves and papers.

`pip install gradio -r requirements.txt` and `python app.py` run the page on your machine. `{SPACE_FILE}` names the
model; a private one needs the secret `HF_TOKEN` of an account that may read it.
"""


def _carried(bundle: Path) -> list[Item]:
    check_model(bundle)
    items, _ = publishable(bundle, (*MODEL, *REPORTS))
    start = bundle / START_MODEL
    if start.is_dir() and not start.is_symlink():
        items += publishable(start, MODEL, f"{START_MODEL}/")[0]
    if not any(item.path.endswith(".safetensors") for item in items):
        raise JobError(
            f"'{bundle}' holds no model: neither model.safetensors nor adapter_model.safetensors. Give the output "
            "directory of a finished run, or the Hub id of a model."
        )
    return items


# --- Command line ---------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Parser of `papertrl space`."""
    parser = CommandParser(
        prog="papertrl space",
        description="Render a Gradio Space in which a model can be tried beside its base, as a ready-to-push folder.",
    )
    parser.add_argument("model", help="Hub id of a model, or a folder, which is then carried along")
    parser.add_argument("--output_dir", type=Path, help="folder to write (default: `<name>-space`)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str]) -> int:
    """
    Run `papertrl space`.

    Args:
        argv (`list[str]`):
            Arguments after `space`.
    """
    args = make_parser().parse_args(argv)
    folder = Path(args.model)
    local = folder.is_dir()
    if not local and (args.model.count("/") > 1 or args.model.startswith((".", "/", "~"))):
        raise JobError(f"There is no folder '{args.model}'. Give a folder, or a Hub id such as `owner/name`.")
    name = folder.resolve().name if local else args.model
    target = args.output_dir or Path(f"{name.rpartition('/')[2]}-space")
    if target.exists() and not (target.is_dir() and (not os.listdir(target) or (target / SPACE_FILE).exists())):
        raise JobError(f"`--output_dir`: '{target}' already holds something that is no Space. Choose another folder.")
    made = render_space(name, target, read_run(folder) if local else None, folder if local else None)
    print(
        f"Space:   {made}\nTry it:  python {made / 'app.py'}\n"
        f"Push it: hf repos create NAME --type space --sdk gradio, then "
        f"hf upload NAME {made} --repo-type space"
    )
    return 0
