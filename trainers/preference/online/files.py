"""The folder of rounds: what was sampled, scored and paired in each iteration, and how it came about."""

import datetime
import json
import shutil
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from trl.trainer.utils import get_config_model_id

from ....hub.files import PROVENANCE, ROUNDS
from ...checkpoints import STATE_FILE
from .candidates import Group, candidates_table


class RoundFiles:
    """
    Rounds in `rounds/round_<iteration>` of an output directory, each complete or not there at all.

    Args:
        output_dir (`str`):
            Of the run.
    """

    def __init__(self, output_dir: str):
        self.root = Path(output_dir) / ROUNDS

    def folder(self, iteration: int) -> Path:
        """Where the round of an iteration stands."""
        return self.root / f"round_{iteration}"

    def written(self, iteration: int) -> bool:
        """Whether there is a round of this iteration."""
        return (self.folder(iteration) / PROVENANCE).is_file()

    def write(self, iteration: int, groups: list[Group], pairs: Dataset | None, provenance: dict[str, Any]) -> None:
        """
        Write a round.

        Args:
            iteration (`int`):
                Its number.
            groups (`list[Group]`):
                All prompts with all candidates.
            pairs (`Dataset`, *optional*):
                Those to train on, if there is one.
            provenance (`dict[str, Any]`):
                From [`provenance_of`].
        """
        folder = self.folder(iteration)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pq.write_table(candidates_table(groups, iteration), partial / "candidates.parquet")
        if pairs is not None:
            pq.write_table(pairs.data.table, partial / "pairs.parquet")
        (partial / PROVENANCE).write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
        # Complete or not there at all, whenever the run is killed
        partial.rename(folder)

    def read(self, iteration: int) -> tuple[Dataset | None, dict[str, Any]]:
        """Pairs of a round, or `None` if it made none, and its provenance."""
        folder = self.folder(iteration)
        file = folder / "pairs.parquet"
        pairs = Dataset(pq.read_table(file)) if file.exists() else None
        return pairs, json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))

    def take_over(self, checkpoint: str | Path) -> None:
        """
        Take the rounds of the run that a checkpoint is of, unless there are some here, and drop later ones: the run
        may not come to the same weights again.
        """
        theirs = Path(checkpoint).parent / ROUNDS
        if theirs.is_dir() and not self.root.exists():
            shutil.copytree(theirs, self.root)
        # One that is damaged is refused later
        with suppress(OSError, ValueError, KeyError):
            step = json.loads((Path(checkpoint) / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
            for file in self.root.glob(f"round_*/{PROVENANCE}"):
                if json.loads(file.read_text(encoding="utf-8"))["step"] > step:
                    shutil.rmtree(file.parent)

    def check_new(self) -> None:
        """
        Check that no earlier run has left rounds here.

        Raises:
            `ValueError`: naming the folder and what to do.
        """
        if self.root.exists():
            raise ValueError(
                f"`output_dir`: '{self.root}' holds what an earlier run sampled. Go on with that run by "
                "`resume_from_checkpoint`, remove the folder, or choose another `output_dir`."
            )


def provenance_of(
    trainer: Any, groups: list[Group], pairs: Dataset | None, metrics: dict[str, float]
) -> dict[str, Any]:
    """
    How the round of the trainer's present iteration came about.

    Args:
        trainer ([`~papertrl.PreferenceTrainer`]):
            Its model, methods, settings and judges.
        groups (`list[Group]`), pairs (`Dataset`, *optional*):
            What the round made.
        metrics (`dict[str, float]`):
            What it logged.
    """
    args, scorer, judge = trainer.args, trainer.scorer, trainer.judge_func
    candidates = [candidate for group in groups for candidate in group.candidates]
    return {
        "iteration": trainer.iteration,
        "step": trainer.state.global_step,
        "model": get_config_model_id(trainer.accelerator.unwrap_model(trainer.model).config),
        "methods": [m.name for m in trainer.methods],
        "reference": args.online_reference,
        "seed": args.seed,
        "sampling": {
            name: getattr(args, f"online_{name}")
            for name in ("num_samples", "max_new_tokens", "temperature", "top_p", "top_k")
        },
        "rewards": None if scorer is None else dict(zip(scorer.names, scorer.weights, strict=True)),
        "judge": None if judge is None else getattr(judge, "__name__", type(judge).__name__),
        "prompts": len(groups),
        "candidates": len(candidates),
        "tokens": sum(len(candidate.completion_ids) for candidate in candidates),
        "pairs": 0 if pairs is None else len(pairs),
        "metrics": metrics,
        "papertrl": version("papertrl"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
