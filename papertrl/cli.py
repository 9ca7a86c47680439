"""The command line `papertrl`: finds the command, and tells people of errors in a sentence."""

import difflib
import logging
import os
import signal
import sys
import traceback
import warnings
from importlib import import_module

from .core.catalogue import BROKEN
from .core.errors import JobError, UsageError, paragraph, tell, tell_failure
from .core.secrets import RedactedRecord, redact
from .core.streams import forgiving_streams

# Modules whose `main` runs a command, loaded when it is called
COMMANDS = {
    "train": "papertrl.commands.train",
    "methods": "papertrl.commands.methods",
    "evaluate": "papertrl.job.evaluate",
    "chat": "papertrl.commands.chat",
    "merge": "papertrl.commands.merge",
    "publish": "papertrl.hub.publishing",
    "space": "papertrl.hub.space",
    "claims": "papertrl.evidence.command",
    "overoptimization": "papertrl.evidence.overoptimization",
    "env": "papertrl.commands.env",
}
# These set up their warnings and progress bars, or need none, and load little
LIGHT = ("train", "methods", "env")

USAGE = """\
usage: papertrl COMMAND [--help]

  train                  train with one or several methods; with no flag, a tiny model learns sums in two minutes
  methods [NAME ...]     the catalogue, or all there is to know of one method
  evaluate MODEL ...     measure models, and draw them side by side
  chat MODEL             talk to a trained model in the terminal
  merge ADAPTER          save a LoRA adapter and its base as one model
  publish OUTPUT_DIR     put a finished run on the Hub
  space MODEL            a Space that shows base and trained model side by side
  claims [METHOD ...]    run the experiments that show whether a paper's claim holds here
  overoptimization       true reward against divergence, for the preference methods
  env                    versions and devices, for reports of bugs

  --version              version of papertrl
"""


@forgiving_streams()
def main(argv: list[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        argv (`list[str]`, *optional*):
            Arguments without the program's name. Defaults to those of the process.

    Returns:
        `int`: exit code: 0, 2 for a wrong command line, 128 plus the signal's number if stopped by one, 1 otherwise.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    # Plots go to files only, and a value that matplotlib does not know would end its import
    os.environ["MPLBACKEND"] = "agg"
    logging.setLogRecordFactory(RedactedRecord)
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        where = " before training began; nothing was saved" if argv[0] == "train" else ""
        tell(f"Stopped by SIGINT{where}.")
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as by `papertrl methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        tell_failure(error, paragraph(error))
        return error.exit_code if isinstance(error, JobError) else 1


def _dispatch(argv: list[str]) -> int:
    for sentence in BROKEN.values():
        tell(sentence)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(USAGE, end="", flush=True)
        return 0
    if command == "--version":
        from . import __version__

        print(__version__)
        return 0
    if command not in COMMANDS:
        raise UsageError(_unknown(command, rest))
    if command not in LIGHT:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        warnings.simplefilter("ignore")
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    try:
        code = import_module(COMMANDS[command]).main(rest)
    except SystemExit:  # argparse has printed the help
        code = 0
    sys.stdout.flush()
    return code


def _unknown(command: str, rest: list[str]) -> str:
    if command.startswith("-"):
        known = f"`papertrl train {command}{' ...' if rest else ''}` trains."
        return f"'{command}' is a flag, before which a command must stand: {known}"
    near = difflib.get_close_matches(command.lower(), COMMANDS, n=1)
    hint = f"Did you mean `papertrl {near[0]}`? " if near else ""
    return f"Unknown command '{command}'. {hint}Commands are: {', '.join(COMMANDS)}."


if __name__ == "__main__":
    sys.exit(main())
