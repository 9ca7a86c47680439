"""Talking to the Hub: one atomic commit, repeated where that helps, and errors in words that say what to do."""

import errno
import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile

from ..core.errors import JobError
from .scrubbing import scrub_text

ATTEMPTS = 5
LONGEST_WAIT = 60.0
# A commit that lost a race is made again upon the new head; 412 is how the Hub says so
WORTH_REPEATING = (408, 409, 412, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Item:
    """
    A file to publish.

    Args:
        path (`str`):
            Path in the repository.
        content (`Path` or `bytes`):
            File to read, or the content itself.
    """

    path: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def equals(self, remote: RepoFile) -> bool:
        """Whether the repository already holds this content."""
        if remote.size != self.size:
            return False
        if remote.lfs is not None:
            return self._digest(hashlib.sha256()) == remote.lfs.sha256
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size)) == remote.blob_id

    def _digest(self, digest: Any) -> str:
        if isinstance(self.content, bytes):
            digest.update(self.content)
        else:
            with self.content.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Sent:
    """What a publication came to: the page of the repository, the head commit, and how many files changed."""

    url: str
    commit: str
    changed: int


def with_retries(call: Callable[[], Any], attempts: int = ATTEMPTS) -> Any:
    """
    Call until it succeeds, waiting longer each time and for as long as the Hub asks.

    Args:
        call (`Callable`):
            What to do. Must be safe to repeat.
        attempts (`int`, *optional*, defaults to `5`):
            How often at most.

    Raises:
        [`~papertrl.core.errors.JobError`]: what went wrong and how to put it right, if the last attempt failed or
            repeating would not help.
    """
    for attempt in range(attempts):
        try:
            return call()
        except Exception as error:
            wait = waiting_time(error, attempt)
            if wait is None or attempt + 1 == attempts:
                raise explain(error) from error
            sleep(wait)
    raise ValueError(f"`attempts` must be at least 1, got {attempts}.")


def waiting_time(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before another attempt, or `None` if it would fail just the same."""
    response = response_of(error)
    if response is not None:
        if response.status_code not in WORTH_REPEATING:
            return None
        asked = response.headers.get("Retry-After", "")
        if asked.isdigit():
            return min(float(asked), LONGEST_WAIT) + random.random()
    elif not any(isinstance(cause, httpx2.TransportError) for cause in causes(error)):
        return None
    return min(2.0**attempt, LONGEST_WAIT) * (0.5 + random.random())


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def response_of(error: BaseException) -> Any:
    """Answer of the Hub that caused an error, if there was one."""
    return next((cause.response for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)


def explain(error: BaseException) -> Exception:
    """The error as one paragraph for the person at the command line; unknown ones stay what they are."""
    if isinstance(error, JobError):
        return error
    response = response_of(error)
    if response is not None:
        return JobError(_about(response.status_code, error))
    for cause in causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return JobError(
                "No Hub token was found. Log in by `hf auth login`, or set the environment variable HF_TOKEN to a "
                "token with the permission to write."
            )
        if isinstance(cause, OfflineModeIsEnabled):
            return JobError("The Hub cannot be reached because HF_HUB_OFFLINE is set. Unset it to publish.")
        if isinstance(cause, httpx2.TransportError):
            return JobError(
                f"The Hub cannot be reached ({type(cause).__name__}). Check the network, then publish again: files "
                "that arrived are not sent twice."
            )
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return JobError(
                f"The disk is full ('{cause.filename or 'temporary folder'}'). Free some space, then try again."
            )
    return error if isinstance(error, Exception) else JobError(str(error))


def _about(status: int, error: BaseException) -> str:
    again = "Then publish again: files that arrived are not sent twice."
    known = {
        401: "The Hub does not accept the token (401). Log in by `hf auth login`, or set HF_TOKEN to a valid token.",
        403: "The token may not write there (403). Take a token with the permission to write, and a repository of "
        "yours or of an organization you belong to: `--repo_id OWNER/NAME`.",
        404: "The Hub has no such repository, or the token may not see it (404). Check `--repo_id` and the token.",
        413: f"A file is larger than the Hub accepts (413). {again}",
        429: f"The Hub asks to slow down, still after {ATTEMPTS} attempts (429). Wait some minutes. {again}",
        507: f"The Hub has no storage left for this account (507). Delete something there first. {again}",
    }
    if status in known:
        return known[status]
    if status >= 500:
        return f"The Hub does not work at the moment, still after {ATTEMPTS} attempts ({status}). {again}"
    return f"The Hub refuses the request ({status}): {scrub_text(' '.join(str(error).split()))[:300]}"


def commit(
    api: HfApi,
    repo_id: str,
    items: list[Item],
    message: str,
    repo_type: str = "model",
    revision: str | None = None,
    owned: Callable[[str], bool] = lambda path: False,
) -> Sent:
    """
    Make a repository hold `items`, in one commit; none if it already does.

    Safe to repeat: large files that have arrived are not sent again, and a commit whose confirmation was lost is
    recognized.

    Args:
        api (`HfApi`):
            Client.
        repo_id (`str`):
            Repository, which must exist.
        items (`list[Item]`):
            Files to publish.
        message (`str`):
            Commit message.
        repo_type (`str`, *optional*, defaults to `"model"`):
            `model`, `dataset` or `space`.
        revision (`str`, *optional*):
            Branch. Defaults to the main one.
        owned (`Callable`, *optional*):
            Whether a file of the repository is removed if `items` lacks it, such as a shard of an earlier, larger
            model.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the Hub refuses, or cannot be reached.
    """

    def once() -> Sent:
        info = api.repo_info(repo_id, repo_type=repo_type, revision=revision)
        tree = api.list_repo_tree(repo_id, recursive=True, repo_type=repo_type, revision=revision)
        remote = {file.path: file for file in tree if isinstance(file, RepoFile)}
        changed = [item for item in items if item.path not in remote or not item.equals(remote[item.path])]
        paths = {item.path for item in items}
        stale = [path for path in remote if owned(path) and path not in paths]
        url = f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"
        if not changed and not stale:
            return Sent(url, info.sha, 0)
        operations: list[Any] = [CommitOperationAdd(item.path, item.content) for item in changed]
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        made = api.create_commit(
            repo_id,
            operations,
            commit_message=message,
            repo_type=repo_type,
            revision=revision,
            parent_commit=info.sha,
        )
        return Sent(url, made.oid, len(operations))

    return with_retries(once)
