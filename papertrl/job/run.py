"""The training job: from a parsed command line to a trained model with its card, curves, metrics and samples."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, set_seed
from trl import get_quantization_config

from ..core.errors import Interrupted
from ..hub.files import CURVES_FILE, METRICS_FILE, SAMPLES_FILE
from ..tasks import Task
from ..trainers.description import describe
from .arguments import Job
from .claim import claim_output_dir, resumed_from
from .data import JobData, check_reward_columns, dataset_data, task_data, task_of
from .heldout import Answers, HeldOut, HeldOutPairs, Ranking
from .interrupt import StopOnSignal
from .judges import is_judged, judges_of, named_judges, pairs_online
from .models import adapter_of, check_model_flags, start_model
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
    with StopOnSignal() as stop:
        return _run(job, command, stop)


def _run(job: Job, command: list[str], stop: StopOnSignal) -> Finished:
    check_model_flags(job)
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
    trainer.check_number_of_rows()
    before = held_out and held_out.look()
    if before and state.is_main_process and not job.training.resume_from_checkpoint:
        MetricsFile(output / METRICS_FILE).write({"step": 0, f"held_out/{data.measure}": before.mean})
    trainer.train(resume_from_checkpoint=resumed_from(job))
    if stop.received:
        raise Interrupted(stop.received, _how_to_resume(stop.received, trainer.state.global_step, output, command))
    after = held_out and held_out.look()
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
        sampled = family.completion_length(job.training)
        length = sampled if family.judged is True else data.max_new_tokens or sampled
        return HeldOut(data.problems, data.judges, data.measure, length, job.arguments.held_out_evaluations)
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
    callbacks = [MetricsFile(output / METRICS_FILE), stop]
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
    kept = [arg for arg in command if arg != "--overwrite_output_dir"]
    again = shlex.join([*kept, "--output_dir", str(output), "--resume_from_checkpoint", str(checkpoint)])
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
    """Write model, card, curves, samples and recipe; publish them if asked."""
    # A call that counts as the user's would publish what is not complete yet
    trainer.save_model(str(output), _internal_call=True)
    if trainer.accelerator.is_main_process:
        title = f"{' + '.join(job.methods)} on {job.arguments.dataset_name or job.arguments.task or 'addition'}"
        signals = {m.name: m.signal for m in trainer.methods}
        draw_curves(read_metrics(output / METRICS_FILE), signals, title, output / CURVES_FILE)
        if isinstance(before, Answers):
            write_samples(data.problems, before, after, output / SAMPLES_FILE)
        described = describe(trainer) | describe_job(job, command, data.measure)
        write_job_files(output, job, described, data.problems, before, after)
        trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    if job.training.push_to_hub:
        trainer.push_to_hub()
