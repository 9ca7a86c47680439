"""Parser of the subcommands: errors in one sentence, no abbreviated flags."""

import argparse

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
