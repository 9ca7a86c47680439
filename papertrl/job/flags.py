"""Names of flags: earlier ones, misspelt ones, repeated ones."""

import difflib
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..core.configuration import earlier_names, renamed
from ..core.errors import UsageError, tell


def flag_of(arg: str) -> str:
    """Name of a flag as the config's field has it."""
    return arg.partition("=")[0].removeprefix("--").replace("-", "_")


def has_flag(argv: list[str], name: str) -> bool:
    """Whether a flag is among arguments."""
    return any(arg.startswith("--") and flag_of(arg) == name for arg in argv)


def without_flags(argv: list[str], names: Iterable[str]) -> list[str]:
    """Arguments without these flags and their values."""
    names, kept, dropping = set(names), [], False
    for arg in argv:
        if arg.startswith("--"):
            dropping = flag_of(arg) in names
        if not dropping:
            kept.append(arg)
    return kept


def tell_of_repeated(argv: list[str]) -> None:
    """Say which flags are given twice: of the command line's, the last one counts."""
    for name, times in Counter(flag_of(arg) for arg in argv if arg.startswith("--")).items():
        if times > 1:
            tell(f"`--{name}` is given {times} times; the last one counts.")


def under_present_names(
    config: dict[str, Any], argv: list[str], config_class: type
) -> tuple[dict[str, Any], list[str]]:
    """
    Values of a config file and arguments of a command line with fields under their present names.

    Raises:
        [`UsageError`]: if a field is given under both of its names.
    """
    names = earlier_names(config_class)
    flags = names | {f"no_{old}": f"no_{present}" for old, present in names.items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            config = renamed(config, names)
            renamed({flag_of(arg): arg for arg in argv if arg.startswith("--")}, flags)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for warning in told:
        tell(str(warning.message))
    present_argv = []
    for arg in argv:
        present = flags.get(flag_of(arg)) if arg.startswith("--") else None
        present_argv.append(arg if present is None else f"--{present}{''.join(arg.partition('=')[1:])}")
    return config, present_argv


def unknown_flags(unknown: list[str], known: list[str], where: str) -> str:
    """What to say of flags that do not exist."""
    first = unknown[0].split("=")[0]
    near = difflib.get_close_matches(first.strip("`"), known, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"The {where} has what this job does not know: {' '.join(unknown)}.{hint} "
        "`papertrl train --method NAME --help_all` lists all flags of a method."
    )
