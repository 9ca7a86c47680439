"""What a checkpoint of a method trainer keeps beside TRL's, and how a run goes on from one."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..core.state import load_state, save_state
from .checkpoints import (
    STATE_FILE,
    add_to_branch,
    begin_branch,
    check_checkpoint,
    could_not_save,
    last_complete_checkpoint,
    tell_what_is_missing,
)


class Resumes:
    """
    Mixin of [`~papertrl.trainers.method.MethodTrainer`]: saves and restores state, and refuses what does not fit.

    Attributes:
        resumed_layout (`dict`):
            [`layout`] of the run that wrote the checkpoint, while its state is restored.
    """

    resumed_layout: dict[str, Any]

    def method_state(self) -> dict[str, Any]:
        """State that is the same on every rank, by method name: plain values and tensors. Extend through `super()`."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what [`method_state`] returned. Extend through `super()`."""

    def rank_state(self) -> dict[str, Any]:
        """State of this rank alone. Extend through `super()`."""
        return {"metrics": {name: [float(v) for v in values] for name, values in self._metrics["train"].items()}}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore what [`rank_state`] returned. Extend through `super()`."""
        self._metrics["train"].update({name: list(values) for name, values in state["metrics"].items()})

    def share_rank_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        """
        State for this rank, from those of another number of ranks. Extend through `super()`.

        Raises:
            `ValueError`: if they cannot be shared out.
        """
        return {"metrics": states[0]["metrics"]}

    def layout(self) -> dict[str, Any]:
        """
        What a resumed run must have in common with the one that wrote its checkpoint: how rows are split (whose
        product counts), and what decides the order of the data. Extend through `super()`.
        """
        args, data = self.args, self.train_dataset
        return {
            "per_device_train_batch_size": args.train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": self.accelerator.num_processes,
            "rows of `train_dataset`": len(data) if hasattr(data, "__len__") else None,
            "seed": args.seed,
            "data_seed": args.data_seed,
        }

    def _save_checkpoint(self, model, trial):
        # Before TRL's part, whose last file marks a checkpoint as complete and which may push the folder to the Hub
        root = Path(self._get_output_dir(trial=trial))
        folder = root / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            if self.args.should_save:
                # Another branch of the run may have left one of this name
                (folder / STATE_FILE).unlink(missing_ok=True)
                # Files of ranks on other machines may lie there
                ranks = 0 if self.args.save_on_each_node else self.accelerator.num_processes
                state = {"methods": [m.name for m in self.methods], "layout": self.layout(), "ranks": ranks}
                state |= {"state": self.method_state(), "components": self.slots.state_dict()}
                save_state(folder / "papertrl", state)
            self.accelerator.wait_for_everyone()
            save_state(folder / f"papertrl_rank{self.accelerator.process_index}", self.rank_state())
            super()._save_checkpoint(model, trial)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise could_not_save(folder, str(root), error) from error
        if self.args.should_save:
            add_to_branch(root, folder)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            saved = load_state(Path(checkpoint) / "papertrl")
            self.resumed_layout = saved["layout"]
            try:
                self.load_method_state(saved["state"])
                self.slots.load_state_dict(saved["components"])
                self.load_rank_state(self._saved_rank_state(Path(checkpoint)))
            except (KeyError, FileNotFoundError) as error:
                raise ValueError(f"`resume_from_checkpoint`: '{checkpoint}' lacks the state {error}.") from error

    def _saved_rank_state(self, folder: Path) -> dict[str, Any]:
        count, rank = self.resumed_layout["processes"], self.accelerator.process_index
        if count == self.accelerator.num_processes:
            return load_state(folder / f"papertrl_rank{rank}")
        return self.share_rank_states([load_state(folder / f"papertrl_rank{i}") for i in range(count)])

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train, or go on from a checkpoint; see [`~transformers.Trainer.train`].

        With `True`, the last *complete* checkpoint of the run in `args.output_dir` is taken: of the branch that was
        trained last, where it went back to an earlier one. A checkpoint that has all steps of this run is loaded, and
        nothing is trained, logged or saved.

        Raises:
            `ValueError`: if the checkpoint does not exist, is damaged, or was written by other methods or under
                another layout.
        """
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            self._check_resumable(Path(resume_from_checkpoint))
            resume_from_checkpoint = str(resume_from_checkpoint)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            begin_branch(self.args.output_dir, resume_from_checkpoint or None)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumable(self, folder: Path) -> None:
        layout, skips_data = self.layout(), not self.args.ignore_data_skip or self.slots.prompts() is not None
        check_checkpoint(folder, [m.name for m in self.methods], layout, skips_data)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            tell_what_is_missing(folder, f"rng_state_{rank}.pth" if ranks > 1 else "rng_state.pth")

    @property
    def nothing_left(self) -> bool:
        """Whether the run went on from a checkpoint that has all of its steps."""
        return 0 < self.state.max_steps <= self._initial_global_step

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # Transformers would train one step more
        self.control.should_training_stop = True
