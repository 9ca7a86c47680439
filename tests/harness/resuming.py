"""A run that is killed and resumed, against one that is not."""

import torch
from transformers import TrainerCallback

from .table import history, weights


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends the run, as if from outside, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}


def assert_resumes(make, folder, at: int = 2, but: str | None = None) -> None:
    """
    Check that a run that is killed after step `at`, and resumed by a new trainer, ends as one that is not.

    Args:
        make (`Callable`):
            Makes the trainer that writes to a folder, under the settings `SAVING`.
        folder (`Path`):
            For both runs.
        at (`int`, *optional*, defaults to 2):
            Last step whose checkpoint is complete.
        but (`str`, *optional*):
            A metric that may differ.
    """
    whole = make(folder / "whole")
    whole.train()
    killed = make(folder / "killed")
    killed.add_callback(Kill(at))
    try:
        killed.train()
    except Killed:
        pass
    else:
        raise AssertionError("The run was not killed.")
    # Like a fresh process: nothing is left but the files
    torch.manual_seed(12345)
    again = make(folder / "killed")
    again.train(resume_from_checkpoint=str(folder / "killed" / f"checkpoint-{at}"))
    expected = weights(whole)
    for name, value in weights(again).items():
        assert torch.equal(value, expected[name]), name
    steps, found = (
        [{name: value for name, value in entry.items() if name != but} for entry in history(run) if "loss" in entry]
        for run in (whole, again)
    )
    assert found == steps and len(steps) == 4
