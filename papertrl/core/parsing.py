"""Parser of the subcommands: errors in one sentence, no abbreviated flags; dotted paths among the values."""

import argparse
import os
import sys

from .errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """
    Parser of a subcommand such as `papertrl publish`, whose errors are of [`~papertrl.core.errors.UsageError`].

    Args:
        **settings:
            As for `argparse.ArgumentParser`.
    """

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str):
        raise UsageError(f"{message[0].upper()}{message[1:]}. `{self.prog} --help` shows the usage.")


def find_modules_here() -> None:
    """Let dotted paths name modules of the working directory."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
