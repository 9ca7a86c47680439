"""The command line of a training job: which methods, then every flag of their config."""

import argparse
import importlib
import json
import os
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.catalogue import PLAIN, find_trained
from ..core.configuration import method_field
from ..core.errors import UsageError
from ..core.parsing import CommandParser, find_modules_here
from ..core.ranges import MOST, check_ranges
from ..core.slots import Component, refuse_shared_slots
from .config_file import fit_values, read_config
from .flags import flag_of, has_flag, tell_of_repeated, under_present_names, unknown_flags

DEFAULT_METHOD = "lp_reg"
# Of a task; all are held in memory
MOST_PROBLEMS = 10**6

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


@dataclass
class JobArguments:
    """What a training job takes beside the method's config and TRL's `ModelConfig`."""

    task: str | None = method_field(
        None,
        "Procedural task: `addition` (the default without `dataset_name`), `automaton`, `countdown`, `marker`, "
        "`mixture`, `rewrite`, `sorting`, `tool_call`, or `reasoning_gym:<generator>`.",
    )
    task_kwargs: dict = field(
        default_factory=dict, metadata={"help": "Settings of the task as JSON, such as '{\"digits\": 3}'."}
    )
    task_size: int = method_field(
        4000, "Number of training problems drawn from the task.", ge=1, le=MOST_PROBLEMS, whole=True
    )
    dataset_name: str | None = method_field(
        None, "Dataset instead of a task: Hub id, local folder, or JSON/CSV/Parquet file."
    )
    dataset_config: str | None = method_field(None, "Configuration of the Hub dataset.")
    dataset_train_split: str = method_field("train", "Split to train on.")
    dataset_test_split: str = method_field("test", "Split held out, used where the dataset has it.")
    held_out_share: float = method_field(
        0.0,
        "Share of the training rows to hold out, for a dataset that has no split for it; whole prompts at a time.",
        ge=0,
        lt=1,
    )
    dataset_streaming: bool = method_field(False, "Whether to stream the dataset.")
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards of policy methods and of the online loop of preference methods: `exact_match`, "
            "`last_number_match`, `boxed_match`, `boxed_format`, "
            "`cosine_length:<reward>`, `relative_length:<reward>`, TRL's by name, or dotted paths. Defaults to the "
            "task's verifier."
        },
    )
    reward_model: str | None = method_field(
        None,
        "Reward model that judges sampled completions: id or folder of a sequence classifier with one label. Adds to "
        "`reward_funcs`, and stands in for the task's verifier.",
    )
    judge: str | None = method_field(
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
    gguf_file: str | None = method_field(None, "File name of a GGUF model inside `model_name_or_path`.")
    start_model_steps: int = method_field(
        1600,
        "Supervised warm-up steps of the embedded tiny model, on the task's demonstrations.",
        ge=0,
        le=MOST,
        whole=True,
    )
    start_model_error_share: float = method_field(
        0.6,
        "Share of these demonstrations with the task's typical error: higher leaves less to build on.",
        ge=0,
        le=1,
    )
    held_out_prompts: int = method_field(
        256,
        "Held-out prompts answered greedily before and after training; 0 for none.",
        ge=0,
        le=MOST_PROBLEMS,
        whole=True,
    )
    held_out_evaluations: int = method_field(
        0,
        "How often, evenly spread, held-out prompts are also answered during training.",
        ge=0,
        le=MOST,
        whole=True,
    )
    overwrite_output_dir: bool = method_field(False, "Whether to replace the run that `output_dir` holds.")

    def __post_init__(self):
        check_ranges(self)
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
    list_methods: bool = False
    help: bool = False
    help_all: bool = False
    debug: bool = False
    dry_run: bool = False
    num_processes: int | None = None
    accelerate_config: str | None = None
    stages: list["Choice"] = field(default_factory=list)
    # Methods of the config file in whose place the command line names others
    replaced: list[str] = field(default_factory=list)

    @property
    def use_cpu(self) -> bool:
        """Whether the CPU is asked for."""
        flag = next((arg.partition("=")[2] or "true" for arg in self.rest if flag_of(arg) == "use_cpu"), "false")
        return flag.lower() not in ("false", "0", "no") or self.config.get("use_cpu") is True


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
    parser.add_argument("--help_all", "--help-all", action="store_true")
    parser.add_argument("--dry_run", "--dry-run", action="store_true")
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--accelerate_config", "--accelerate-config")
    known, rest = parser.parse_known_args(argv)
    if known.method and known.methods:
        raise UsageError("`--method` and `--methods` are both given; list all methods after `--methods`.")
    if known.num_processes is not None:
        _check_processes(known.num_processes)
    tell_of_repeated(argv)
    config = {} if known.config is None else read_config(known.config)
    stages = _listed_stages(config.pop("stages")) if "stages" in config else []
    in_config = _named_methods(config)
    on_command_line = known.methods or ([known.method] if known.method else [])
    if stages and (on_command_line or in_config):
        raise UsageError("Each of the config file's `stages` names its own `method`; do not name one for all.")

    def chosen(names: list[str], settings: dict[str, Any]) -> Choice:
        try:
            methods = [name if "." in name else find_trained(name) for name in names or [DEFAULT_METHOD]]
        except ValueError as error:
            raise UsageError(str(error)) from error
        shown = {name: getattr(known, name) for name in ("list_methods", "help", "help_all", "debug", "dry_run")}
        return Choice(
            methods,
            settings,
            rest,
            **shown,
            num_processes=known.num_processes,
            accelerate_config=known.accelerate_config,
        )

    choice = chosen(on_command_line or in_config, config)
    if on_command_line and in_config and choice.methods != in_config:
        choice.replaced = in_config
    for number, stage in enumerate(stages, start=1):
        settings = {**config, **stage}
        names = _named_methods(settings)
        if not names:
            raise UsageError(
                f"Stage {number} of the config file names no `method`; without one, {', '.join(PLAIN)} train as TRL."
            )
        choice.stages.append(chosen(names, settings))
    return choice


def _listed_stages(stages: Any) -> list[dict[str, Any]]:
    if not stages or not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise UsageError(
            "`stages` of the config file must be a list with one mapping of flags to values for each stage, got "
            f"{stages!r:.80}."
        )
    return stages


def _named_methods(config: dict[str, Any]) -> list[str]:
    names = config.pop("methods", None)
    name = config.pop("method", None)
    if name and names:
        raise UsageError("The config file has both `method` and `methods`; list all methods under `methods`.")
    names = names or name or []
    names = names if isinstance(names, list) else [names]
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"`methods` of the config file must be names of methods, got {names}.")
    return names


def _check_processes(asked: int) -> None:
    running = int(os.environ.get("WORLD_SIZE", asked))
    if not 1 <= asked <= 1024 or running != asked:
        there = f"; {running} run already, so leave it out" if running != asked else ""
        raise UsageError(f"`--num_processes` must be an integer in [1, 1024], got {asked}{there}.")


def make_trainer_class(methods: list[str]) -> type:
    """
    Trainer class that runs `methods`.

    Raises:
        [`UsageError`]: if the methods do not combine.
    """
    from ..core.compose import compose

    try:
        return compose(*(_load_class(name) if "." in name else name for name in methods))
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _load_class(path: str) -> type:
    """Trainer or component that a dotted path names, which may lie in the working directory."""
    find_modules_here()
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"`--method`: there is no class '{path}' ({error}). Give a method of `papertrl methods`, or the dotted "
            "path `module.Class` of a trainer or component of yours."
        ) from error
    if not (isinstance(found, type) and (hasattr(found, "family") or issubclass(found, Component))):
        raise UsageError(
            f"`--method`: '{path}' is {found!r:.80}, which must be a subclass of a trainer of papertrl, such as "
            "`PolicyTrainer`, or of `Component`."
        )
    return found


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
    config, argv = under_present_names(choice.config, choice.rest, trainer_class.config_class)
    choice = replace(choice, config=config, rest=argv)
    parser = make_parser(trainer_class)
    flags = list(parser._actions)
    if not torch.accelerator.is_available():
        parser.set_defaults_with_config(bf16=False)
    parser.set_defaults_with_config(lora_task_type=trainer_class.family.lora_task_type)
    embedded = not (choice.config.get("model_name_or_path") or has_flag(choice.rest, "model_name_or_path"))
    if embedded:
        parser.set_defaults_with_config(**EMBEDDED_RUN, **trainer_class.family.embedded)
    unknown = [f"`{key}`" for key in choice.config if key not in {action.dest for action in flags}]
    if unknown and choice.replaced:
        here, there = " ".join(choice.methods), " ".join(choice.replaced)
        raise UsageError(
            f"`--config` holds settings of {there}, in whose place the command line puts {here}, which has no "
            f"{' '.join(unknown)}. Drop `--method` to run the config as it is, name both (`--methods {there} "
            f"{here}`), or drop `--config`."
        )
    if unknown:
        raise UsageError(unknown_flags(unknown, [action.dest for action in flags], "config file"))
    parser.set_defaults_with_config(**fit_values(choice.config, parser.dataclass_types))
    try:
        job, training, model, rest = parser.parse_args_into_dataclasses(
            choice.rest, return_remaining_strings=True, look_for_args_file=False
        )
        check_ranges(model)
        trainer_class.refuse_clashes(training)
        refuse_shared_slots(trainer_class.components, training)
        find_modules_here()
        check_user_stages(trainer_class, training, job.stage)
    except (ValueError, TypeError) as error:
        raise UsageError(_with_remedy(str(error))) from error
    if rest:
        options = [option for action in flags for option in action.option_strings]
        raise UsageError(unknown_flags(rest, options, "command line"))
    given = "output_dir" in choice.config or has_flag(choice.rest, "output_dir")
    return Job(trainer_class, training, model, job, choice.methods, given, embedded)


def _with_remedy(message: str) -> str:
    if "divisible by num_generations" in message:
        return (
            f"{message} Groups must not be split: choose `--num_generations` as a divisor of "
            "`--per_device_train_batch_size` × processes × `--gradient_accumulation_steps`, or change one of these."
        )
    return message
