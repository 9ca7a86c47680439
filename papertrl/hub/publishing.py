"""`papertrl publish`: a finished run on the Hub, and nothing that does not belong there."""

import argparse
import fnmatch
import os
import re
import tempfile
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import disable_progress_bars, validate_repo_id

from ..core.errors import JobError, UsageError
from ..core.lock import refuse_if_owned
from ..core.parsing import CommandParser
from .client import Item, Sent, commit, with_retries
from .publication import (
    Publication,
    check_items,
    completions_publication,
    model_publication,
    rounds_publication,
)
from .runfile import read_run
from .space import render_space

# --- Publishing -----------------------------------------------------------------------------------------------------


def publish(
    folder: Path,
    repo_id: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    with_space: bool = False,
    with_completions: bool = False,
    with_rounds: bool = False,
    dry_run: bool = False,
    message: str = "Publish the run",
    revision: str | None = None,
    endpoint: str | None = None,
    base_model: str | None = None,
    incomplete: bool = False,
) -> list[tuple[Publication, Sent | None]]:
    """
    Publish a run, as `papertrl publish` does.

    Each repository gets one commit, or none if it already holds the files. Interrupted or failed, it can be repeated.

    Args:
        folder (`Path`):
            Output directory of a finished run.
        repo_id (`str`, *optional*):
            Repository of the model. Defaults to that of the run's config, else to the folder's name.
        private (`bool`, *optional*):
            Whether to make new repositories private. Defaults to what the run's config says.
        token (`str`, *optional*):
            Defaults to that of the login or the environment.
        with_space (`bool`, *optional*, defaults to `False`):
            Whether to publish a Space, `<repo_id>-demo`.
        with_completions (`bool`, *optional*, defaults to `False`):
            Whether to publish a dataset of the held-out completions, `<repo_id>-completions`.
        with_rounds (`bool`, *optional*, defaults to `False`):
            Whether to publish a dataset of what was sampled in training, `<repo_id>-rounds`.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to only list what would be sent, without network.
        message (`str`, *optional*):
            Commit message.
        revision (`str`, *optional*):
            Branch of the model's repository.
        endpoint (`str`, *optional*):
            Address of the Hub.
        base_model (`str`, *optional*), incomplete (`bool`, *optional*, defaults to `False`):
            As in [`~papertrl.hub.publication.model_publication`].

    Returns:
        `list`: what was published, and what it came to; `None` in a dry run.

    Raises:
        [`~papertrl.core.errors.JobError`]: with what to do.
    """
    if not folder.is_dir():
        raise JobError(f"'{folder}' is not a folder. Give the output directory of a finished run.")
    if base_model is not None:
        valid_repo_id(base_model, "--base_model")
    hub = (read_run(folder) or {}).get("hub") or {}
    private = bool(hub.get("private")) if private is None else private
    name = valid_repo_id(repo_id or hub.get("repo_id") or default_name(folder))
    api = HfApi(endpoint=endpoint, token=token)
    if "/" not in name and not dry_run:
        name = f"{with_retries(api.whoami, attempts=2)['name']}/{name}"
    space_id = f"{name}-demo" if with_space else None
    completions_id = f"{name}-completions" if with_completions else None
    rounds_id = f"{name}-rounds" if with_rounds else None
    with tempfile.TemporaryDirectory() as rendered:
        publications = [model_publication(folder, name, space_id, completions_id, rounds_id, base_model, incomplete)]
        if completions_id:
            publications.append(completions_publication(folder, completions_id, name))
        if rounds_id:
            publications.append(rounds_publication(folder, rounds_id, name))
        if space_id:
            publications.append(space_publication(folder, space_id, name, Path(rendered) / "space"))
        if dry_run:
            return [(publication, None) for publication in publications]
        return [(p, send(api, p, private, message, revision)) for p in publications]


def send(api: HfApi, publication: Publication, private: bool, message: str, revision: str | None = None) -> Sent:
    """Create the repository if it does not exist, and commit."""
    is_model = publication.repo_type == "model"
    create_repo(api, publication.repo_id, private, publication.repo_type)
    if is_model and revision is not None:
        with_retries(lambda: api.create_branch(publication.repo_id, branch=revision, exist_ok=True))
    return commit(
        api,
        publication.repo_id,
        publication.items,
        message,
        publication.repo_type,
        revision if is_model else None,
        lambda path: any(fnmatch.fnmatchcase(path, pattern) for pattern in publication.owned),
    )


def space_publication(folder: Path, repo_id: str, model_id: str, rendered: Path) -> Publication:
    """The Space that lets people try the model, rendered into the folder `rendered`."""
    made = Path(render_space(model_id, rendered, read_run(folder)))
    files = sorted(path for path in made.rglob("*") if path.is_file() and not path.is_symlink())
    kept = [path for path in files if not any(part.startswith((".", "__")) for part in path.relative_to(made).parts)]
    # What was rendered may be gone when it is listed or sent
    items = [Item(path.relative_to(made).as_posix(), path.read_bytes()) for path in kept]
    check_items(items)
    return Publication(repo_id, "space", items)


def create_repo(api: HfApi, repo_id: str, private: bool, repo_type: str = "model") -> str:
    """Create a repository unless it exists; returns its full id."""
    sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
    make = lambda: api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type, **sdk)  # noqa: E731
    return with_retries(make).repo_id


def default_name(folder: Path) -> str:
    """Name of a repository made from that of the folder, in the characters that the Hub allows."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)
    return re.sub(r"([.-]){2,}", r"\1", name).strip(".-")[:90] or "papertrl-run"


def valid_repo_id(name: str, flag: str = "--repo_id") -> str:
    """
    Check the form of a Hub id.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if it is no Hub id.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"`{flag}`: {' '.join(str(error).split())}") from error
    return name


# --- Command line ---------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """Parser of `papertrl publish`."""
    parser = CommandParser(
        prog="papertrl publish",
        description="Publish a finished run on the Hub: model or adapter, card, curves, samples, metrics and recipe, "
        "in one commit. Can be repeated: what is there already is not sent again.",
    )
    parser.add_argument("output_dir", type=Path, help="output directory of a finished run")
    parser.add_argument("--repo_id", help="OWNER/NAME; without it, that of the run's config or the folder's name")
    parser.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether new repositories are private (default: as the run's config says)",
    )
    parser.add_argument("--token", help="Hub token; better set HF_TOKEN or log in by `hf auth login`")
    parser.add_argument("--revision", help="branch of the model's repository")
    parser.add_argument("--with_space", action="store_true", help="also publish a Space to try the model")
    parser.add_argument("--with_completions", action="store_true", help="also publish the held-out completions")
    parser.add_argument(
        "--with_rounds", action="store_true", help="also publish what a preference method sampled in training"
    )
    parser.add_argument("--base_model", help="Hub id of the model that an adapter belongs to, if it was a local one")
    parser.add_argument("--incomplete", action="store_true", help="publish although reports of the run are missing")
    parser.add_argument("--dry_run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def main(argv: list[str]) -> int:
    """
    Run `papertrl publish`.

    Args:
        argv (`list[str]`):
            Arguments after `publish`.
    """
    args = make_parser().parse_args(argv)
    refuse_if_owned(Path(args.output_dir), "Publish when it has ended, or a folder `checkpoint-*` in it.")
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS") is None and not os.isatty(2):
        disable_progress_bars()
    published = publish(
        args.output_dir,
        args.repo_id,
        args.private,
        args.token,
        args.with_space,
        args.with_completions,
        args.with_rounds,
        args.dry_run,
        revision=args.revision,
        base_model=args.base_model,
        incomplete=args.incomplete,
    )
    for publication, sent in published:
        if sent is None:
            print(f"Would publish {publication}")
        elif sent.changed:
            print(f"Published {publication}\n  {sent.url} at {sent.commit[:12]}")
        else:
            print(f"Nothing to send, {publication.repo_type} {publication.repo_id} is up to date: {sent.url}")
    return 0
