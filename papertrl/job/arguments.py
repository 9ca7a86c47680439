"""The command line of a training job: which methods, then every flag of their config."""

import argparse
import difflib
import importlib.util
import json
import os
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..core.catalogue import PLAIN, find_trained
from ..core.configuration import earlier_names, renamed
from ..core.errors import UsageError, tell
from ..core.parsing import CommandParser, find_modules_here
from ..core.slots import refuse_shared_slots

DEFAULT_METHOD = "lp_reg"

# Settings of a run of the embedded task and tiny model, beside those of its family. Config files and flags override
# them.
EMBEDDED_RUN = {
    "held_out_evaluations": 10,
    "logging_steps": 5,
    "save_steps": 200,
    "save_total_limit": 2,
    "report_to": ["none"],
    "gradient_checkpointing": False,
    "bf16": False,
}


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class JobArguments:
    """What a training job takes beside the method's config and TRL's `ModelConfig`."""

    task: str | None = _flag(
        None,
        "Procedural task: `addition` (the default without `dataset_name`), `automaton`, `countdown`, `marker`, "
        "`mixture`, `rewrite`, `sorting`, `tool_call`, or `reasoning_gym:<generator>`.",
    )
    task_kwargs: dict = field(
        default_factory=dict, metadata={"help": "Settings of the task as JSON, such as '{\"digits\": 3}'."}
    )
    task_size: int = _flag(4000, "Number of training problems drawn from the task.")
    dataset_name: str | None = _flag(
        None, "Dataset instead of a task: Hub id, local folder, or JSON/CSV/Parquet file."
    )
    dataset_config: str | None = _flag(None, "Configuration of the Hub dataset.")
    dataset_train_split: str = _flag("train", "Split to train on.")
    dataset_test_split: str = _flag("test", "Split held out, used where the dataset has it.")
    held_out_share: float = _flag(
        0.0, "Share of the training rows to hold out, for a dataset that has no split for it; whole prompts at a time."
    )
    dataset_streaming: bool = _flag(False, "Whether to stream the dataset.")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards of policy methods and of the online loop of preference methods: `exact_match`, "
            "`last_number_match`, `boxed_match`, `boxed_format`, "
            "`cosine_length:<reward>`, `relative_length:<reward>`, TRL's by name, or dotted paths. Defaults to the "
            "task's verifier."
        },
    )
    reward_model: str | None = _flag(
        None,
        "Reward model that judges sampled completions: id or folder of a sequence classifier with one label. Adds to "
        "`reward_funcs`, and stands in for the task's verifier.",
    )
    judge: str | None = _flag(
        None,
        "Pairwise judge of the online loop of preference methods, instead of rewards: id or folder of a language "
        "model as `papertrl.rewards.pairwise` trains it, or the dotted path of a function.",
    )
    stage: list[str] | None = field(
        default=None,
        metadata={
            "help": "Functions of yours that act in stages of the trainer, as `NAME=module.function`, such as "
            "`scale=my_module.my_scale`; docs/stages.md lists the stages. A config file has a mapping."
        },
    )
    gguf_file: str | None = _flag(None, "File name of a GGUF model inside `model_name_or_path`.")
    start_model_steps: int = _flag(
        1600, "Supervised warm-up steps of the embedded tiny model, on the task's demonstrations."
    )
    start_model_error_share: float = _flag(
        0.6, "Share of these demonstrations with the task's typical error: higher leaves less to build on."
    )
    held_out_prompts: int = _flag(256, "Held-out prompts answered greedily before and after training; 0 for none.")
    held_out_evaluations: int = _flag(
        0, "How often, evenly spread, held-out prompts are also answered during training."
    )
    overwrite_output_dir: bool = _flag(False, "Whether to replace the run that `output_dir` holds.")

    def __post_init__(self):
        if self.stage is not None:
            self.stage = _functions_by_stage(self.stage)


def _functions_by_stage(given: Any) -> dict[str, str]:
    """Dotted paths of functions by stage, of `NAME=PATH` texts or of a config file's mapping."""
    pairs = list(given.items()) if isinstance(given, dict) else [str(text).split("=", 1) for text in given]
    for pair in pairs:
        if len(pair) < 2 or not all(isinstance(part, str) and part for part in pair):
            raise ValueError(
                f"`stage` must be of the form NAME=module.function, such as `scale=my_module.my_scale`, got {pair}."
            )
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"`stage` names a stage twice, in {given}: one function acts in each.")
    return dict(pairs)


@dataclass
class Job:
    """A parsed command line: trainer class, its config, and what else the job takes."""

    trainer_class: type
    training: Any
    model: Any
    arguments: JobArguments
    methods: list[str]
    output_dir_given: bool
    # Whether it starts from the embedded tiny model, which decides defaults
    embedded: bool


@dataclass
class Choice:
    """What the command line says before any method is loaded: of one job, or of `stages` that follow each other."""

    methods: list[str]
    config: dict[str, Any]
    rest: list[str]
    list_methods: bool
    help: bool
    debug: bool
    stages: list["Choice"] = field(default_factory=list)


def choose(argv: list[str]) -> Choice:
    """
    Read the flags that decide which methods are loaded. Imports no deep-learning library.

    Raises:
        [`UsageError`]: if a method or config file does not exist, or both `--method` and `--methods` are given.
    """
    parser = CommandParser(prog="papertrl train", add_help=False)
    parser.add_argument("--method")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--config")
    parser.add_argument("--list_methods", "--list-methods", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    known, rest = parser.parse_known_args(argv)
    if known.method and known.methods:
        raise UsageError("`--method` and `--methods` are both given; list all methods after `--methods`.")
    config = read_config(known.config) if known.config else {}
    stages = config.pop("stages", [])
    in_config = _named_methods(config)
    on_command_line = known.methods or ([known.method] if known.method else [])
    if stages and (on_command_line or in_config):
        raise UsageError("Each of the config file's `stages` names its own `method`; do not name one for all.")

    def chosen(names: list[str], settings: dict[str, Any]) -> Choice:
        try:
            methods = [find_trained(name) for name in names or [DEFAULT_METHOD]]
        except ValueError as error:
            raise UsageError(str(error)) from error
        return Choice(methods, settings, rest, known.list_methods, known.help, known.debug)

    choice = chosen(on_command_line or in_config, config)
    for number, stage in enumerate(_listed_stages(stages), start=1):
        settings = {**config, **stage}
        names = _named_methods(settings)
        if not names:
            raise UsageError(
                f"Stage {number} of the config file names no `method`; without one, {', '.join(PLAIN)} train as TRL."
            )
        choice.stages.append(chosen(names, settings))
    return choice


def _listed_stages(stages: Any) -> list[dict[str, Any]]:
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(
            "`stages` of the config file must be a list with one mapping of flags to values for each stage."
        )
    return stages


def _named_methods(config: dict[str, Any]) -> list[str]:
    names = config.pop("methods", None)
    name = config.pop("method", None)
    if name and names:
        raise UsageError("The config file has both `method` and `methods`; list all methods under `methods`.")
    names = names or name or []
    return [names] if isinstance(names, str) else list(names)


def read_config(name: str) -> dict[str, Any]:
    """
    Read a YAML file, or the recipe of this name.

    Raises:
        [`UsageError`]: if there is no such file or recipe, or it holds no mapping.
    """
    path = Path(name)
    if not path.is_file():
        recipes = Path(importlib.util.find_spec("papertrl.recipes").origin).parent
        path = recipes / f"{path.name.removesuffix('.yaml').replace('-', '_')}.yaml"
        if not path.is_file() or Path(name).parent.name not in ("", "recipes"):
            known = sorted(recipe.stem for recipe in recipes.glob("*.yaml"))
            near = difflib.get_close_matches(Path(name).stem, known, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise UsageError(f"`--config`: '{name}' is no file and no recipe. {hint}Recipes are: {', '.join(known)}.")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"`--config`: '{path}' is not valid YAML: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(
            f"`--config`: '{path}' must hold a mapping of flags to values, as in `learning_rate: 1.0e-6`."
        )
    for key, value in config.pop("env", {}).items():
        os.environ[key] = str(value)
    return config


def make_trainer_class(methods: list[str]) -> type:
    """
    Trainer class that runs `methods`.

    Raises:
        [`UsageError`]: if the methods do not combine.
    """
    from ..core.compose import compose

    try:
        return compose(*methods)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def make_parser(trainer_class: type) -> Any:
    """Parser of every flag of the trainer's config, of TRL's `ModelConfig` and of [`JobArguments`]."""
    from trl import ModelConfig, TrlParser
    from trl.scripts._hf_argparser import string_to_bool

    class Parser(TrlParser):
        error = CommandParser.error

    parser = Parser(
        [JobArguments, trainer_class.config_class, ModelConfig],
        prog="papertrl train",
        allow_abbrev=False,
        add_help=False,
    )
    for action in parser._actions:
        # Without this, `--disable_tqdm` and the other flags that default to `None` would need a value
        if action.type is string_to_bool and action.nargs is None:
            action.nargs, action.const = "?", True
        if action.dest == "task_kwargs":
            action.type = json_object
    return parser


def json_object(text: str) -> dict[str, Any]:
    """Settings that a flag holds as JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        value = error
    if not isinstance(value, dict):
        why = f" ({value})" if isinstance(value, ValueError) else ""
        raise argparse.ArgumentTypeError(
            f"must be a JSON object with names in double quotes, such as '{{\"digits\": 3}}', got {text!r}{why}."
        )
    return value


def parse(choice: Choice) -> Job:
    """
    Build the job that the command line describes.

    A value is taken from the first of: command line, config file, settings of the embedded task (if no model is
    given), the method's defaults. Fields may have their earlier names, with a line on stderr.

    Raises:
        [`UsageError`]: if a flag does not exist, or a value is not accepted.
    """
    import torch

    from ..trainers.user_stages import check_user_stages

    trainer_class = make_trainer_class(choice.methods)
    choice = _under_present_names(choice, trainer_class.config_class)
    parser = make_parser(trainer_class)
    flags = list(parser._actions)
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(bf16=False)
    parser.set_defaults_with_config(lora_task_type=trainer_class.family.lora_task_type)
    embedded = not (choice.config.get("model_name_or_path") or _has_flag(choice.rest, "model_name_or_path"))
    if embedded:
        parser.set_defaults_with_config(**EMBEDDED_RUN, **trainer_class.family.embedded)
    unknown = [f"`{key}`" for key in choice.config if key not in {action.dest for action in flags}]
    if unknown:
        raise UsageError(_unknown_flags(unknown, [action.dest for action in flags], "config file"))
    parser.set_defaults_with_config(**choice.config)
    try:
        job, training, model, rest = parser.parse_args_into_dataclasses(
            choice.rest, return_remaining_strings=True, look_for_args_file=False
        )
        trainer_class.refuse_clashes(training)
        refuse_shared_slots(trainer_class.components, training)
        find_modules_here()
        check_user_stages(trainer_class, training, job.stage)
    except (ValueError, TypeError) as error:
        raise UsageError(_with_remedy(str(error))) from error
    if rest:
        options = [option for action in flags for option in action.option_strings]
        raise UsageError(_unknown_flags(rest, options, "command line"))
    given = "output_dir" in choice.config or _has_flag(choice.rest, "output_dir")
    return Job(trainer_class, training, model, job, choice.methods, given, embedded)


def _under_present_names(choice: Choice, config_class: type) -> Choice:
    """
    The choice with fields under their present names.

    Raises:
        [`UsageError`]: if a field is given under both of its names.
    """
    names = earlier_names(config_class)
    flags = names | {f"no_{old}": f"no_{present}" for old, present in names.items()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            config = renamed(choice.config, names)
            renamed({_flag_of(arg): arg for arg in choice.rest if arg.startswith("--")}, flags)
        except ValueError as error:
            raise UsageError(str(error)) from error
    for warning in told:
        tell(str(warning.message))
    argv = []
    for arg in choice.rest:
        present = flags.get(_flag_of(arg)) if arg.startswith("--") else None
        argv.append(arg if present is None else f"--{present}{''.join(arg.partition('=')[1:])}")
    return replace(choice, config=config, rest=argv)


def _flag_of(arg: str) -> str:
    """Name of a flag as the config's field has it."""
    return arg.partition("=")[0].removeprefix("--").replace("-", "_")


def _has_flag(argv: list[str], name: str) -> bool:
    return any(arg.startswith("--") and _flag_of(arg) == name for arg in argv)


def _unknown_flags(unknown: list[str], known: list[str], where: str) -> str:
    first = unknown[0].split("=")[0]
    near = difflib.get_close_matches(first.strip("`"), known, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return (
        f"The {where} has what this job does not know: {' '.join(unknown)}.{hint} "
        "`papertrl train --method NAME --help` lists all flags of a method."
    )


def _with_remedy(message: str) -> str:
    if "divisible by num_generations" in message:
        return (
            f"{message} Groups must not be split: choose `--num_generations` as a divisor of "
            "`--per_device_train_batch_size` × processes × `--gradient_accumulation_steps`, or change one of these."
        )
    return message
