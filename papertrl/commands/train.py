"""`papertrl train`: the job that the flags describe, its help, and its summary."""

import os
import warnings

from ..core.catalogue import DECLARATIONS
from ..job.arguments import Choice, choose, make_parser, make_trainer_class, parse
from ..job.launching import is_launched, start
from .methods import method_list, paper
from .settings import loaded_settings, settings_of

USAGE = """\
usage: papertrl train [--method NAME | --methods A B ...] [--config FILE_OR_RECIPE] [flags]

Train a language model with one or several papers' methods. With no flag: a tiny model learns two-digit sums, in about
two minutes on two CPU cores, without network.

  --method NAME             one method; `papertrl methods` lists them. `grpo`, `dpo`, `sft` and `reward` train without
                            one; `my_module.MyTrainer` is a class of yours
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
  --dry_run                 check everything, show what would be done and how long a step takes, and write nothing
  --num_processes N         as N processes: one per accelerator, or sharing the CPU where there is none
  --accelerate_config NAME  under a configuration of Accelerate: a file, or one of TRL's, such as `zero3`
  --list_methods            print the catalogue
  --debug                   show tracebacks

`--method NAME --help` shows that method's own flags, `--help_all` all flags of the job, of TRL and of the model.
"""


def main(argv: list[str]) -> int:
    """
    Train, or print the help.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl train`.

    Raises:
        [`~papertrl.core.errors.UsageError`]: for a wrong argument.
        [`~papertrl.core.errors.JobError`]: if the job cannot run.
    """
    choice = choose(argv)
    if choice.list_methods:
        print(method_list())
    elif choice.help_all:
        print("\n\n".join(map(all_flags, choice.stages or [choice])))
    elif choice.help:
        named = any(arg.split("=")[0] in ("--method", "--methods", "--config") for arg in argv)
        print("\n\n".join(map(method_help, choice.stages or [choice])) if named else USAGE, end="")
    elif (choice.num_processes or choice.accelerate_config) and not is_launched():
        return start(["train", *argv], choice.num_processes, choice.accelerate_config, choice.use_cpu)
    else:
        _train(choice, ["train", *argv])
    return 0


def _train(choice: Choice, argv: list[str]) -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not choice.debug:
        warnings.simplefilter("ignore")
    from transformers.utils.logging import disable_progress_bar

    from ..job.dry_run import dry_run
    from ..job.processes import join_processes
    from ..job.run import run
    from ..job.staged import run_stages, table

    disable_progress_bar()
    join_processes()
    if choice.dry_run:
        text = "\n\n".join(dry_run(parse(one)) for one in (choice.stages or [choice]))
    elif choice.stages:
        stages = run_stages(choice, argv)
        text = f"{table(stages.rows)}\nstages:     {stages.output_dir}"
    else:
        text = summary(run(parse(choice), argv))
    if os.environ.get("RANK", "0") == "0":
        print(text)


def summary(finished) -> str:
    """What a finished run prints: held-out scores before and after, and where everything is."""
    from ..hub.files import CURVES_FILE, METRICS_FILE, SAMPLES_FILE

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
    """Papers and own flags of the chosen methods. Reads their sources where that will do, which takes no second."""
    parts = []
    for name in choice.methods:
        if "." in name:
            cls = make_trainer_class([name])
            parts.append(f"{name}: {(cls.__doc__ or '').strip().partition(chr(10))[0]}\n")
            parts += map(str, loaded_settings(cls.config_class) if "config_class" in cls.__dict__ else [])
        elif name in DECLARATIONS:
            method = DECLARATIONS[name]
            parts.append(f"{name}: {method.summary}\n{paper(method, '  ')}")
            parts += map(str, settings_of(name))
        else:
            parts.append(f"{name}: as TRL trains, with no method.\n")
    named = " ".join(choice.methods)
    return (
        "\n".join(parts)
        + "\n`papertrl train --help` has the flags of every job. All others, of the job, of TRL and of the model: "
        + f"`papertrl train --method{'s' * (len(choice.methods) > 1)} {named} --help_all`.\n"
    )


def all_flags(choice: Choice) -> str:
    """Help of the chosen methods, then every flag of the job, the trainer's config and the model."""
    return (
        method_help(choice)
        + "\nAll flags of the job, the trainer's config and the model:\n\n"
        + make_parser(make_trainer_class(choice.methods)).format_help()
    )
