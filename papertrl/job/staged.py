"""Jobs in stages: each starts from the model of the one before, and all are measured on the same held-out prompts."""

import json
import shlex
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache

from ..core.errors import Interrupted, JobError, UsageError
from ..core.secrets import redact_command
from ..hub.runfile import read_json
from ..trainers.checkpoints import last_complete_checkpoint
from .arguments import Choice, Job, parse
from .claim import decided_by_main, free_folder, own, resumed_from
from .flags import without_flags
from .heldout import Answers, Ranking
from .run import run

STAGES_FILE = "stages.json"
TABLE_FILE = "stages.md"
# Numbers of the table, and how they are written
SHOWN = {"score": ".3f", "length": ".1f"}
Row = dict[str, Any]


@dataclass
class FinishedStages:
    """
    Finished stages.

    Args:
        output_dir (`Path`):
            Where the folders of all stages are.
        rows (`list[dict]`):
            For the start model and after each stage: `stage`, `methods`, and on held-out data `measure`, `score` and
            `length` (mean tokens), `None` where nothing was measured.
    """

    output_dir: Path
    rows: list[Row]


def run_stages(choice: Choice, command: list[str]) -> FinishedStages:
    """
    Run the stages of a config file, or those that are left of an earlier run.

    Stage n goes to `stage<n>_<sft, dpo or grpo>` in the output directory. With `resume_from_checkpoint`, stages that
    are finished are kept and the one that was not goes on from its newest checkpoint. A Hub repository receives the
    last stage only.

    Args:
        choice ([`~papertrl.job.arguments.Choice`]):
            What the command line says.
        command (`list[str]`):
            The command line, for the hint how to resume.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if a stage's settings are not accepted; before the first one trains.
        [`~papertrl.core.errors.JobError`], [`~papertrl.core.errors.Interrupted`]: as for a single job.
    """
    # All are read before the first one trains, so that a mistake in the last is found at once
    jobs = [parse(stage) for stage in choice.stages]
    check(jobs)
    with ExitStack() as held:
        return _run_stages(jobs, command, held)


def _run_stages(jobs: list[Job], command: list[str], held: ExitStack) -> FinishedStages:
    state = PartialState()
    root, rows = decided_by_main(state, lambda: claim(jobs, held))
    resumes = resumed_from(jobs[0]) is not None
    folders = [root / f"stage{i}_{job.trainer_class.family.plain}" for i, job in enumerate(jobs, start=1)]
    for i in range(max(0, len(rows) - 1), len(jobs)):
        job = prepare(jobs[i], folders[i], resumes, folders[i - 1] if i else None, last=i == len(jobs) - 1)
        try:
            finished = run(job, command)
        except Interrupted as stopped:
            raise Interrupted(stopped.exit_code - 128, how_to_resume(i, len(jobs), root, command)) from stopped
        if not rows:
            rows = [row("start", [], finished.measure, finished.before)]
        rows.append(row(folders[i].name, job.methods, finished.measure, finished.after))
        if state.is_main_process:
            write(root, rows)
        # The trainer is gone, but for cycles of references
        clear_device_cache(garbage_collection=True)
    return FinishedStages(root, rows)


def check(jobs: list[Job]) -> None:
    """
    Check what stages demand beyond single jobs.

    Raises:
        [`~papertrl.core.errors.UsageError`]: naming the stage and the flag.
    """
    for number, job in enumerate(jobs, start=1):
        if resumed_from(job) not in (None, True):
            raise UsageError(
                "`resume_from_checkpoint` must be True for a job in stages, got "
                f"'{job.training.resume_from_checkpoint}': the stage that was stopped and its newest checkpoint are "
                "found in `output_dir`."
            )
        if job.model.use_peft and number < len(jobs):
            raise UsageError(
                f"`use_peft` in stage {number}: the next stage starts from whole weights, but this one would leave an "
                "adapter. Set it in the last stage only."
            )
        if not job.trainer_class.family.generates and number < len(jobs):
            raise UsageError(
                f"Stage {number} ({job.methods[0]}) trains a model that scores answers, from which no next stage can "
                "start. Put it last."
            )
        if job.model.model_name_or_path != jobs[0].model.model_name_or_path:
            raise UsageError(
                f"`model_name_or_path` in stage {number}: a stage starts from the model of the one before. Set it for "
                "the first stage, or for all."
            )


def claim(jobs: list[Job], held: ExitStack) -> tuple[Path, list[Row]]:
    """
    Settle and own the folder of all stages, and what an earlier run has finished in it. For the main process.

    Raises:
        [`~papertrl.core.errors.JobError`]: if it holds another run, or there is nothing to resume.
    """
    first = jobs[0]
    methods = list(dict.fromkeys(name for job in jobs for name in job.methods))
    root = Path(first.training.output_dir) if first.output_dir_given else free_folder(first, methods)
    record = root / STAGES_FILE
    begun = root.is_dir() and any(root.glob("stage[0-9]*_*"))
    if resumed_from(first):
        if not begun:
            raise JobError(f"`resume_from_checkpoint`: '{root}' holds no stage of an earlier run.")
        own(root, held)
        return root, (read_json(record) or {"rows": []})["rows"]
    if begun and not first.arguments.overwrite_output_dir:
        raise JobError(
            f"`output_dir`: '{root}' already holds a run in stages. Go on with it by `--resume_from_checkpoint True`, "
            "replace it by `--overwrite_output_dir`, or choose another folder."
        )
    own(root, held)
    for folder in root.glob("stage[0-9]*_*"):
        shutil.rmtree(folder)
    record.unlink(missing_ok=True)
    return root, []


def prepare(job: Job, folder: Path, resumes: bool, previous: Path | None, last: bool) -> Job:
    """The job of one stage, in its folder, on the previous stage's model, and on from a checkpoint if there is one."""
    if previous is not None:
        job.model.model_name_or_path = str(previous)
        job.model.model_revision = "main"
        job.arguments.gguf_file = None
    job.training.output_dir, job.output_dir_given = str(folder), True
    job.training.push_to_hub = job.training.push_to_hub and last
    if resumes:
        try:
            last_complete_checkpoint(str(folder))
        except ValueError:
            # Stopped before its first checkpoint, or not begun
            job.training.resume_from_checkpoint = None
            job.arguments.overwrite_output_dir = True
    return job


def how_to_resume(stage: int, stages: int, root: Path, command: list[str]) -> str:
    """What to tell somebody who stopped a stage, counted from 0."""
    kept = without_flags(command, ("overwrite_output_dir", "output_dir", "resume_from_checkpoint"))
    again = shlex.join([*redact_command(kept), "--output_dir", str(root), "--resume_from_checkpoint", "True"])
    return (
        f"Stopped in stage {stage + 1} of {stages}; what is finished and the newest checkpoint are below '{root}'. "
        f"Go on with the same command, which finds them: papertrl {again}"
    )


# --- The table ------------------------------------------------------------------------------------------------------


def row(stage: str, methods: list[str], measure: str, answers: Answers | Ranking | None) -> Row:
    """Line of the table for a model and its held-out answers."""
    return {
        "stage": stage,
        "methods": methods,
        "measure": measure,
        "score": answers and answers.mean,
        "length": answers and answers.mean_length,
    }


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    measure = next((r["measure"] for r in rows if r["score"] is not None), rows[0]["measure"])
    lines = [f"| after | methods | held-out {measure} | mean tokens |", "|---|---|---|---|"]
    for r in rows:
        score, length = ("-" if r[key] is None else format(r[key], digits) for key, digits in SHOWN.items())
        if r["measure"] != measure and r["score"] is not None:
            score += f" ({r['measure'].replace('_', ' ')})"
        lines.append(f"| {r['stage']} | {' + '.join(r['methods']) or '-'} | {score} | {length} |")
    return "\n".join(lines)


def write(root: Path, rows: list[Row]) -> None:
    """Write what is finished, for people and for a resumed run."""
    (root / TABLE_FILE).write_text("# Held-out prompts, answered greedily\n\n" + table(rows) + "\n", encoding="utf-8")
    partial = root / f"{STAGES_FILE}.partial"
    partial.write_text(json.dumps({"rows": rows}, indent=1) + "\n", encoding="utf-8")
    partial.replace(root / STAGES_FILE)
