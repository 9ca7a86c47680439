"""Removes from what is published whatever belongs to the machine or its user: secrets, absolute paths, host names."""

import os
import re
import socket
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..core.secrets import clean_argument, names_a_secret, redact, without_secrets

# Two components at least, so that "6 /2" stays; URLs have a slash or letter before theirs
_POSIX_PATH = re.compile(r"(?<![\w/.~<-])(?:file://)?~?(?:/[\w.@+~-]+){2,}/?")
_ROOTS = "home|root|tmp|var|etc|usr|opt|mnt|srv|data|work|workspace|scratch|Users|content|kaggle"
_SHALLOW_PATH = re.compile(rf"(?<![\w:/.~<-])/(?:{_ROOTS})\b/?")
_FILE_URL = re.compile(r"file://(/[\w.@+~-]+)+/?")
_WINDOWS_PATH = re.compile(r"(?<!\w)(?:[A-Za-z]:\\|\\\\)[\w.@+~$ -]+(?:\\[\w.@+~$-]+)*")
_HOME = re.compile(r"(?:/(?:home|Users)|[A-Za-z]:\\Users)[/\\][^/\\]+[/\\]?$")


def scrub(value: Any) -> Any:
    """
    Copy of a JSON-like value without secrets, absolute paths and the name of this machine.

    A path is shortened to its last component, which is what tells runs apart; a token becomes `<token>`, the machine's
    name `<host>`. Entries of mappings whose key names a secret, such as `hub_token`, are left out.

    Args:
        value (`Any`):
            Mappings, lists, tuples, strings, numbers, booleans, `None`.
    """
    return without_secrets(value, scrub_text)


def scrub_text(text: str) -> str:
    """As [`scrub`], for one text."""
    text = redact(text)
    for host in host_names():
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "<host>", text, flags=re.IGNORECASE)
    text = re.sub(rf"(?<![\w.-]){re.escape(str(Path.home()))}(?=/)", "~", text)
    text = _WINDOWS_PATH.sub(lambda match: _last(match[0], PureWindowsPath), text)
    text = _FILE_URL.sub(lambda match: _last(match[0], PurePosixPath), text)
    text = _POSIX_PATH.sub(lambda match: _last(match[0], PurePosixPath), text)
    return _SHALLOW_PATH.sub(lambda match: PurePosixPath(match[0]).name, text)


def _last(path: str, kind: type[PurePosixPath] | type[PureWindowsPath]) -> str:
    """Last component of a path; that of a home directory is its owner's name."""
    return "~" if _HOME.fullmatch(path.removeprefix("file://")) else kind(path).name or "<path>"


def shortened(name: str) -> str:
    """Name of a dataset or model for others to read: of a local one without the folders above it."""
    return Path(name).resolve().name if Path(name).exists() else scrub_text(name)


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
            kept.append(clean_argument(argument, scrub_text))
    return kept
