"""`papertrl train --dry_run`: everything a job does up to the end of its first step, and nothing that stays."""

import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl.data_utils import maybe_apply_chat_template

from ..core.errors import JobError
from ..models.declared_size import check_declared_size
from .arguments import Job
from .claim import RUN_FILES, decided_by_main, numbered_folders
from .data import JobData, task_of
from .interrupt import StopOnSignal
from .judges import is_judged, judges_of, named_judges
from .models import start_model
from .run import limit_threads, make_data, make_trainer

# Rows that are shown, and rows whose tokens are counted
SHOWN_ROWS, COUNTED_ROWS = 3, 1000
# Of each text of a row
SHOWN_CHARACTERS = 600
# The embedded model need not know anything to take a step
START_MODEL_STEPS = 10


class FirstStep(TrainerCallback):
    """Stops training after the first step, and takes its time."""

    seconds = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, and training."""
        self.seconds = time.perf_counter() - self.begun
        control.should_training_stop = True


def dry_run(job: Job) -> str:
    """
    Load and check everything that a job needs, take its first step, and forget it.

    Args:
        job ([`~papertrl.job.arguments.Job`]):
            What to train, and how.

    Returns:
        `str`: what would be done, for people.

    Raises:
        [`~papertrl.core.errors.JobError`]: as the job itself would.
    """
    output = _output_dir(job)
    job.training.push_to_hub, job.training.report_to = False, []
    job.training.save_strategy = job.training.eval_strategy = "no"
    job.training.load_best_model_at_end, job.training.disable_tqdm = False, True
    job.arguments.held_out_evaluations = 0
    job.arguments.start_model_steps = min(START_MODEL_STEPS, job.arguments.start_model_steps)
    state = PartialState()
    limit_threads(state, tiny=job.embedded)
    with tempfile.TemporaryDirectory() as here, StopOnSignal() as stop:
        scratch = Path(decided_by_main(state, lambda: here))
        job.training.output_dir = str(scratch)
        rewards, judge = named_judges(job)
        set_seed(job.training.seed)
        task = task_of(job.arguments)
        path, tokenizer = start_model(job, task, scratch, state)
        check_declared_size(path, job.model.model_revision, job.training.model_init_kwargs)
        data = make_data(job, task, tokenizer, rewards)
        trainer, _ = make_trainer(job, data, judges_of(job, data, rewards, judge), path, tokenizer, scratch, stop)
        first = FirstStep()
        trainer.add_callback(first)
        trainer.train()
        state.wait_for_everyone()
        return "\n".join([*_plan(job, trainer, data, tokenizer, output, first.seconds), *_rows(data.train, tokenizer)])


def _output_dir(job: Job) -> Path:
    free = (folder for folder in numbered_folders(job, job.methods) if not folder.exists())
    output = Path(job.training.output_dir) if job.output_dir_given else next(free)
    if output.exists() and not output.is_dir():
        raise JobError(f"`output_dir`: '{output}' is a file. Choose a folder.")
    held = [name for name in RUN_FILES if (output / name).exists()]
    if held and not job.training.resume_from_checkpoint and not job.arguments.overwrite_output_dir:
        raise JobError(
            f"`output_dir`: '{output}' already holds a run ({', '.join(held[:3])}). Go on with it by "
            "`--resume_from_checkpoint True`, replace it by `--overwrite_output_dir`, or choose another folder."
        )
    return output


def _plan(
    job: Job, trainer: Any, data: JobData, tokenizer: PreTrainedTokenizerBase, output: Path, seconds: float
) -> list[str]:
    args, model, steps = job.training, trainer.accelerator.unwrap_model(trainer.model), trainer.state.max_steps
    processes, family = trainer.accelerator.num_processes, job.trainer_class.family
    all_weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    rows = f"{len(data.train)} rows" if isinstance(data.train, Dataset) else "a stream of rows"
    held_out = data.problems if data.problems is not None else data.eval
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    name = job.model.model_name_or_path or "the embedded tiny model"
    lines = {
        "methods": f"{', '.join(job.methods)} ({job.trainer_class.__name__})",
        "model": f"{name}, {all_weights:,} weights, {trained:,} of them trained, {args.device}"
        + (f"; context of {context} tokens" if context else ""),
        "data": f"{rows} of {job.arguments.dataset_name or job.arguments.task or 'addition'}, "
        + (f"{len(held_out)} held out" if isinstance(held_out, Dataset) else "none held out"),
        "tokens": _tokens(data.train, tokenizer),
        "steps": f"{steps} of {batch} rows: {args.per_device_train_batch_size} per pass × "
        f"{args.gradient_accumulation_steps} accumulated × {processes} process{'es' * (processes > 1)}",
    }
    length = family.completion_length(args)
    if length and family.judged is True:
        lines["generation"] = (
            f"{args.generation_batch_size // args.num_generations} prompts × {args.num_generations} completions of up "
            f"to {length} tokens, every {args.steps_per_generation * args.num_iterations} passes"
        )
    elif length:
        lines["generation"] = f"completions of up to {length} tokens, in each iteration"
    if is_judged(job):
        judges = [getattr(r, "__name__", type(r).__name__) for r in getattr(trainer, "reward_funcs", None) or []]
        lines["judged by"] = ", ".join(judges) or "a judge"
    lines["first step"] = f"{seconds:.2g} s; {_duration(seconds * steps)} for all {steps} if the others are like it"
    lines["output"] = f"would go to '{output}'; nothing was written"
    return ["Dry run", *(f"{name + ':':<12}{text}" for name, text in lines.items())]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {seconds:.0f} seconds"


def _texts(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Texts of a row as the model reads them, by column: messages with the chat template."""
    rendered = maybe_apply_chat_template(dict(row), tokenizer)
    columns = ("prompt", "completion", "chosen", "rejected", "text")
    return {name: rendered[name] for name in columns if isinstance(rendered.get(name), str)}


def _tokens(train: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    counts: dict[str, list[int]] = {}
    for row in _first(train, COUNTED_ROWS):
        for name, text in _texts(row, tokenizer).items():
            counts.setdefault(name, []).append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    told = [f"{name} {min(of)} to {max(of)}, mean {sum(of) / len(of):.0f}" for name, of in counts.items()]
    return f"{'; '.join(told) or 'no texts'} (first {len(_first(train, COUNTED_ROWS))} rows)"


def _first(train: Any, count: int) -> list[dict[str, Any]]:
    return list(train.select(range(min(count, len(train)))) if isinstance(train, Dataset) else train.take(count))


def _rows(train: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    lines = []
    for number, row in enumerate(_first(train, SHOWN_ROWS), start=1):
        lines.append(f"\nRow {number}")
        for name, text in _texts(row, tokenizer).items():
            cut = text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"
            lines.append(f"  {name}: {cut!r}")
    return lines
