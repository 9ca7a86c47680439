"""The command line `papertrl` with its subcommands; the scripts of the same names run them as well."""

import os
import signal
import sys
import traceback
import warnings
from importlib import import_module

from .core.catalogue import BROKEN, DECLARATIONS, chapters
from .core.declaration import Method
from .core.errors import JobError, UsageError, paragraph, tell, tell_failure
from .core.streams import forgiving_streams
from .job.arguments import Choice, choose, make_parser, make_trainer_class, parse

# Modules whose `main` runs a subcommand, loaded when it is called
SUBCOMMANDS = {
    "claims": "papertrl.evidence.command",
    "evaluate": "papertrl.job.evaluate",
    "overoptimization": "papertrl.evidence.overoptimization",
    "publish": "papertrl.hub.publishing",
    "space": "papertrl.hub.space",
}

USAGE = """\
usage: papertrl train [--method NAME | --methods A B ...] [--config FILE_OR_RECIPE] [flags]
       papertrl methods
       papertrl claims [METHOD ...] [--help]
       papertrl overoptimization [METHOD ...] [--help]
       papertrl evaluate MODEL [MODEL ...] [--help]
       papertrl publish OUTPUT_DIR [--help]
       papertrl space MODEL [--help]

Train a language model with one or several papers' methods. With no flag: a tiny model learns two-digit sums, in about
two minutes on two CPU cores, without network.

  --method NAME             one method; `papertrl methods` lists them. `grpo`, `dpo`, `sft` and `reward` train without
                            one
  --methods A B ...         several, combined: objectives of one family, and components
  --stage NAME=PATH ...     functions of yours in stages, such as `scale=my_module.my_scale`: docs/stages.md
  --config NAME             YAML file, or the recipe of a method, such as `lp_reg`; one with `stages`, such as
                            `two_stage_math`, runs several jobs, each on the model of the one before
  --model_name_or_path ID   Hub id or folder; `smollm2` for the packaged SmolLM2-135M-Instruct
  --task NAME               `addition`, `automaton`, `countdown`, `marker`, `mixture`, `rewrite`, `sorting`,
                            `tool_call`, or `reasoning_gym:<generator>`
  --dataset_name ID         Hub id, folder, or .json/.jsonl/.csv/.tsv/.parquet file
  --reward_funcs A B ...    rewards of this library or of TRL, or dotted paths
  --output_dir DIR          where the run goes (default: a new folder below `runs/`)
  --resume_from_checkpoint DIR|True
  --use_peft                train a LoRA adapter; further flags as in TRL
  --push_to_hub             publish model and card
  --list_methods            print the catalogue
  --debug                   show tracebacks

`papertrl train --method NAME --help` shows that method's own flags, then all others.
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
    try:
        return _dispatch(argv)
    except KeyboardInterrupt:
        tell("Stopped by SIGINT before training began; nothing was saved.")
        return 128 + signal.SIGINT
    except Exception as error:
        if debug:
            traceback.print_exc()
        tell_failure(error, paragraph(error))
        return error.exit_code if isinstance(error, JobError) else 1


def _show(text: str) -> int:
    try:
        print(text.rstrip(), flush=True)
    except BrokenPipeError:  # as by `papertrl methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _dispatch(argv: list[str]) -> int:
    for sentence in BROKEN.values():
        tell(sentence)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h"):
        return _show(USAGE)
    if command == "methods":
        return _show(method_list())
    if command in SUBCOMMANDS:
        return _subcommand(SUBCOMMANDS[command], rest)
    if command != "train":
        known = ", ".join(("train", "methods", *SUBCOMMANDS))
        raise UsageError(f"Unknown command '{command}'. Commands are: {known}.")
    choice = choose(rest)
    if choice.list_methods:
        return _show(method_list())
    if choice.help:
        named = any(arg.split("=")[0] in ("--method", "--methods", "--config") for arg in rest)
        return _show("\n\n".join(map(method_help, choice.stages or [choice])) if named else USAGE)
    return _train(choice, argv)


def _subcommand(module: str, argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        return import_module(module).main(argv)
    except SystemExit:  # argparse has printed the help
        return 0


def _train(choice: Choice, argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not choice.debug:
        warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    from .job.processes import join_processes
    from .job.run import run
    from .job.staged import run_stages, table

    disable_progress_bar()
    join_processes()
    if choice.stages:
        stages = run_stages(choice, argv)
        text = f"{table(stages.rows)}\nstages:     {stages.output_dir}"
    else:
        text = summary(run(parse(choice), argv))
    if os.environ.get("RANK", "0") == "0":
        print(text)
    return 0


def summary(finished) -> str:
    """What a finished run prints: held-out scores before and after, and where everything is."""
    from .hub.files import CURVES_FILE, METRICS_FILE, SAMPLES_FILE

    output = finished.output_dir
    lines = []
    if finished.before is not None:
        measure, how = finished.measure.replace("_", " "), finished.after.how
        before, after = finished.before.mean, finished.after.mean
        lines.append(f"Held-out {measure} ({how}): {before:.3f} before, {after:.3f} after training")
    weights = sorted(output.glob("*.safetensors"))
    files = [
        ("model", weights[0] if weights else output),
        ("model card", output / "README.md"),
        ("metrics", output / METRICS_FILE),
        ("curves", output / CURVES_FILE),
        ("samples", output / SAMPLES_FILE),
    ]
    lines += [f"{name + ':':<12}{path}" for name, path in files if path.exists()]
    return "\n".join(lines)


def method_help(choice: Choice) -> str:
    """Help of the chosen methods: their papers and own flags first, then every other flag."""
    from .core.configuration import field_default, own_fields

    trainer_class = make_trainer_class(choice.methods)
    parts = []
    for owner in (*trainer_class.owners(), *trainer_class.components):
        parts.append(f"{owner.method.name}: {owner.method.summary}\n" + _paper(owner.method, "  "))
        for f in own_fields(owner.config_class):
            valid = f.metadata.get("valid")
            limits = f" Valid: {valid}." if valid else ""
            parts.append(f"  --{f.name} (default: {field_default(f)!r})\n      {f.metadata['help']}{limits}\n")
    return (
        "\n".join(parts)
        + "\nAll flags of the job, the trainer's config and the model:\n\n"
        + make_parser(trainer_class).format_help()
    )


def method_list() -> str:
    """The catalogue as text, from the declarations: importing the methods would take seconds."""
    width = max(map(len, DECLARATIONS)) + 2
    parts = []
    for heading, methods in chapters().items():
        lines = [f"{m.name:<{width}}{m.summary}\n{_paper(m, ' ' * width)}".rstrip() for m in methods]
        parts.append("\n".join([heading, *(f"  {line}".replace("\n", "\n  ") for line in lines)]))
    return "\n\n".join(parts)


def _paper(method: Method, indent: str) -> str:
    return f"{indent}{method.paper.title}, arXiv:{method.paper.id}\n" if method.paper else ""


if __name__ == "__main__":
    sys.exit(main())
