"""The training job: from a parsed command line to a trained model with its card, curves, metrics and samples."""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from trl import get_quantization_config

from ..core.errors import Interrupted, JobError, paragraph, tell
from ..core.secrets import redact_command
from ..hub.files import CARD_FILE, CURVES_FILE, METRICS_FILE, RUN_FILE, SAMPLES_FILE
from ..hub.runfile import read_json
from ..hub.scrubbing import shortened
from ..models.declared_size import check_declared_size
from ..tasks import Task
from ..trainers.checkpoints import STATE_FILE, last_complete_checkpoint, read_branch
from ..trainers.description import describe
from .arguments import Job
from .claim import claim_output_dir, resumed_from
from .data import JobData, answer_length, check_reward_columns, dataset_data, task_data, task_of
from .flags import without_flags
from .heldout import Answers, HeldOut, HeldOutPairs, Ranking
from .interrupt import StopOnSignal
from .judges import is_judged, judges_of, named_judges, pairs_online
from .models import adapter_of, check_model_flags, start_model
from .processes import SayProcesses, check_processes
from .record import describe_job, write_job_files
from .reporting import MetricsFile, ProgressBar, draw_curves, read_metrics, write_samples


@dataclass
class Finished:
    """
    A finished job.

    Args:
        output_dir (`Path`):
            Where everything is.
        measure (`str`):
            What was measured on held-out data.
        before (`Answers` or `Ranking`, *optional*), after (`Answers` or `Ranking`, *optional*):
            Of the start model and of the trained one.
    """

    output_dir: Path
    measure: str
    before: Answers | Ranking | None
    after: Answers | Ranking | None


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
    with StopOnSignal() as stop, ExitStack() as held:
        return _run(job, command, stop, held)


def _run(job: Job, command: list[str], stop: StopOnSignal, held: ExitStack) -> Finished:
    check_model_flags(job)
    state = PartialState()
    check_processes(state)
    limit_threads(state, tiny=job.embedded)
    rewards, judge = named_judges(job)
    set_seed(job.training.seed)
    task = task_of(job.arguments)
    output = claim_output_dir(job, state, held)
    model_path, tokenizer = start_model(job, task, output, state)
    check_declared_size(model_path, job.model.model_revision, job.training.model_init_kwargs)
    data = make_data(job, task, tokenizer, rewards)
    judges = judges_of(job, data, rewards, judge)
    trainer, held_out = make_trainer(job, data, judges, model_path, tokenizer, output, stop)
    trainer.check_number_of_rows()
    before = held_out and held_out.look()
    if before and state.is_main_process and not job.training.resume_from_checkpoint:
        add_measured(output / METRICS_FILE, 0, data.measure, before.mean)
    train(trainer, resumed_from(job), output)
    if stop.received:
        raise Interrupted(stop.received, _how_to_resume(stop.received, trainer.state.global_step, output, command))
    if is_complete(trainer, output):
        tell(f"Nothing is left to train: '{output}' holds a finished run of {trainer.state.global_step} steps.")
        return Finished(output, data.measure, before, held_out and held_out.look())
    # First of all, so that nothing that follows can cost it. A call that counts as the user's would publish what is
    # not complete yet
    trainer.save_model(str(output), _internal_call=True)
    after = held_out and held_out.look()
    if after and state.is_main_process:
        add_measured(output / METRICS_FILE, trainer.state.global_step, data.measure, after.mean)
    save(trainer, job, data, output, before, after, command)
    return Finished(output, data.measure, before, after)


def train(trainer: Any, resume_from_checkpoint: str | bool | None, output: Path) -> None:
    """
    Train, or go on.

    Raises:
        [`~papertrl.core.errors.JobError`]: if the machine fails, as by a full disk; it names the checkpoint to go on
            from.
    """
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except OSError as error:
        try:
            last = last_complete_checkpoint(str(output))
        except ValueError:
            raise error from None
        raise JobError(
            f"Training stopped after step {trainer.state.global_step}: {' '.join(str(error).split())}. Once that is "
            f"put right, go on by `--output_dir {output} --resume_from_checkpoint {last}`."
        ) from error


def is_complete(trainer: Any, output: Path) -> bool:
    """Whether nothing was trained, since the folder holds a finished run, down to its card."""
    if not trainer.nothing_left or not list(output.glob("*.safetensors")) or not (output / CARD_FILE).exists():
        return False
    steps = (read_json(output / RUN_FILE) or {}).get("steps")
    last = [folder / STATE_FILE for folder in read_branch(output) or []][-1:]
    # An earlier branch may have come as far
    newer = all(file.stat().st_mtime <= (output / RUN_FILE).stat().st_mtime for file in last)
    return steps == trainer.state.global_step and newer


def add_measured(file: Path, step: int, measure: str, value: float) -> None:
    """Add what was measured on held-out data to the metrics, unless it was measured at this step during training."""
    key = f"held_out/{measure}"
    lines = read_metrics(file) if file.exists() else []
    if not any(line["step"] == step and key in line for line in lines):
        MetricsFile(file).write({"step": step, key: value})


def limit_threads(state: PartialState, tiny: bool) -> None:
    """
    Share the CPU's cores among the processes on this machine, where there is no accelerator.

    The embedded tiny model takes one: its matrices are so small that threads wait for each other most of the time.
    """
    if state.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(1 if tiny else max(1, len(os.sched_getaffinity(0)) // processes))


# --- Model, data, trainer -------------------------------------------------------------------------------------------


def make_data(job: Job, task: Task | None, tokenizer: PreTrainedTokenizerBase, rewards: list[Callable]) -> JobData:
    """Training rows, held-out rows and judges of the job."""
    family = job.trainer_class.family
    if task is None:
        formats = job.trainer_class.dataset_formats(job.training)
        eval_formats = ("pairs",) if pairs_online(job) else formats
        data = dataset_data(family, job.arguments, rewards, formats, eval_formats if is_evaluated(job) else ())
    else:
        chat = tokenizer.chat_template is not None
        data = task_data(task, family, job.arguments, job.training.seed, chat, pairs_online(job))
    if is_judged(job):
        check_reward_columns(rewards, data.train, job.arguments.dataset_name or task.name)
    return data


def is_evaluated(job: Job) -> bool:
    """Whether the trainer evaluates held-out rows: by TRL's settings, or since there are no answers to measure."""
    return job.training.eval_strategy != "no" or not job.trainer_class.family.generates


def held_out_of(job: Job, data: JobData) -> HeldOut | HeldOutPairs | None:
    """What measures the model on held-out data, or `None` where there is none."""
    family = job.trainer_class.family
    if data.problems is not None:
        length, evaluations = answer_length(job, data), job.arguments.held_out_evaluations
        return HeldOut(data.problems, data.judges, data.measure, length, evaluations)
    ranks = not family.generates and job.arguments.held_out_prompts and isinstance(data.eval, Dataset)
    return HeldOutPairs() if ranks else None


def make_trainer(
    job: Job,
    data: JobData,
    judges: dict[str, Any],
    model_path: str,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    stop: StopOnSignal,
) -> tuple[Any, HeldOut | HeldOutPairs | None]:
    """The trainer with the callbacks that report, and what measures its model on held-out data."""
    callbacks = [MetricsFile(output / METRICS_FILE), stop, SayProcesses()]
    held_out = held_out_of(job, data)
    if isinstance(held_out, HeldOut):
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
        eval_dataset=data.eval if is_evaluated(job) else None,
        processing_class=tokenizer,
        peft_config=adapter_of(job),
        quantization_config=get_quantization_config(job.model),
        callbacks=callbacks,
        stages=job.arguments.stage,
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


# --- Results --------------------------------------------------------------------------------------------------------


def _how_to_resume(signum: int, step: int, output: Path, command: list[str]) -> str:
    checkpoint = output / f"checkpoint-{step}"
    kept = without_flags(command, ("overwrite_output_dir", "output_dir", "resume_from_checkpoint"))
    again = shlex.join(
        [*redact_command(kept), "--output_dir", str(output), "--resume_from_checkpoint", str(checkpoint)]
    )
    return (
        f"Stopped by signal {signum} after step {step}; checkpoint saved in '{checkpoint}'. Go on with the same "
        f"command and the checkpoint: papertrl {again}"
    )


def save(
    trainer: Any,
    job: Job,
    data: JobData,
    output: Path,
    before: Answers | Ranking | None,
    after: Answers | Ranking | None,
    command: list[str],
) -> None:
    """Write card, curves, samples and recipe, each whatever becomes of the others; publish all if asked."""
    if trainer.accelerator.is_main_process:
        source = shortened(job.arguments.dataset_name or job.arguments.task or "addition")
        title = f"{' + '.join(job.methods)} on {source}"
        signals = {m.name: m.signal for m in trainer.methods}
        with reported(output / CURVES_FILE):
            draw_curves(read_metrics(output / METRICS_FILE), signals, title, output / CURVES_FILE)
        with reported(output / SAMPLES_FILE):
            if isinstance(before, Answers):
                write_samples(data.problems, before, after, output / SAMPLES_FILE)
        with reported(output / RUN_FILE):
            described = describe(trainer) | describe_job(job, command, data)
            write_job_files(output, job, described, data.problems, before, after)
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    if job.training.push_to_hub:
        trainer.push_to_hub()


@contextmanager
def reported(file: Path) -> Iterator[None]:
    """Tell of an error in writing a report instead of failing for it: the model is saved, and others may follow."""
    try:
        yield
    except Exception as error:
        tell(f"'{file}' could not be written, the model is saved: {paragraph(error)}")
