"""Removes from what is published whatever belongs to the machine or its user: tokens, absolute paths, host names."""

import os
import re
import socket
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|api_org_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|github_pat_\w{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{10,})"
)
_PRIVATE_KEY = re.compile(r"token$|secret|password|api_?key|credential", re.IGNORECASE)
_NOT_PRIVATE = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|num|image)_token$", re.IGNORECASE)
# Two components at least, so that "6 /2" stays; URLs have a colon, slash or letter before theirs
_POSIX_PATH = re.compile(r"(?<![\w:/.~<-])(?:file://)?~?(?:/[\w.@+~-]+){2,}/?")
_ROOTS = "home|root|tmp|var|etc|usr|opt|mnt|srv|data|work|workspace|scratch|Users|content|kaggle"
_SHALLOW_PATH = re.compile(rf"(?<![\w:/.~<-])/(?:{_ROOTS})\b/?")
_FILE_URL = re.compile(r"file://(/[\w.@+~-]+)+/?")
_WINDOWS_PATH = re.compile(r"(?<!\w)(?:[A-Za-z]:\\|\\\\)[\w.@+~$ -]+(?:\\[\w.@+~$-]+)*")


def scrub(value: Any) -> Any:
    """
    Copy of a JSON-like value without tokens, absolute paths and the name of this machine.

    A path is shortened to its last component, which is what tells runs apart; a token becomes `<token>`, the machine's
    name `<host>`. Entries of mappings whose key names a secret, such as `hub_token`, are left out.

    Args:
        value (`Any`):
            Mappings, lists, tuples, strings, numbers, booleans, `None`.
    """
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items() if not names_a_secret(str(key))}
    if isinstance(value, (list, tuple)):
        return [scrub(item) for item in value]
    return scrub_text(value) if isinstance(value, str) else value


def names_a_secret(key: str) -> bool:
    """Whether a field of this name holds a secret, as `hub_token` does and `eos_token` does not."""
    return bool(_PRIVATE_KEY.search(key)) and not _NOT_PRIVATE.search(key)


def scrub_text(text: str) -> str:
    """As [`scrub`], for one text."""
    text = TOKEN.sub("<token>", text)
    for host in host_names():
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text, flags=re.IGNORECASE)
    text = _WINDOWS_PATH.sub(lambda match: PureWindowsPath(match[0]).name or "<path>", text)
    text = _FILE_URL.sub(lambda match: PurePosixPath(match[0]).name, text)
    text = _POSIX_PATH.sub(lambda match: PurePosixPath(match[0]).name, text)
    return _SHALLOW_PATH.sub(lambda match: PurePosixPath(match[0]).name, text)


def host_names() -> list[str]:
    """Names of this machine, the longest first; `localhost` is everyone's."""
    full = {socket.gethostname(), os.environ.get("HOSTNAME", "")}
    names = full | {name.split(".")[0] for name in full}
    return sorted((name for name in names if len(name) > 2 and name != "localhost"), key=len, reverse=True)


def scrub_command(arguments: list[str], dropped: tuple[str, ...]) -> list[str]:
    """
    A command line's arguments without those flags that name outputs or secrets, and scrubbed otherwise.

    Args:
        arguments (`list[str]`):
            Arguments as given.
        dropped (`tuple[str, ...]`):
            Flags to leave out with their values, without dashes.
    """
    kept, skipping = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].split("=")[0].replace("-", "_")
            skipping = name in dropped or names_a_secret(name)
        if not skipping:
            kept.append(scrub_text(argument))
    return kept
