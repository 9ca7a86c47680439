"""What is measured of a model on held-out data: prompts that it answers, or pairs that it ranks."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import TrainerCallback

from ..core.errors import JobError
from ..data.messages import as_completion
from ..rewards import call_rewards
from ..rewards.checked import reward_name

BATCH_SIZE = 64
PAIRS_MEASURE = "pair_accuracy"


@dataclass
class Answers:
    """
    A model's greedy answers to the held-out prompts, the same on every rank.

    Args:
        texts (`list[str]`):
            Completions without special tokens.
        scores (`list[float | None]`):
            What the judges gave each, averaged over the judges that apply; `None` where none does.
        lengths (`list[int]`):
            Tokens of each, the end included.
    """

    texts: list[str]
    scores: list[float | None]
    lengths: list[int]

    @property
    def mean(self) -> float:
        """Mean score of the answers that a judge applies to."""
        scores = [score for score in self.scores if score is not None]
        return fmean(scores) if scores else math.nan

    @property
    def how(self) -> str:
        """How it was measured, and on how much."""
        return f"greedy, {len(self.scores)} prompts"

    @property
    def mean_length(self) -> float:
        """Mean number of tokens."""
        return fmean(self.lengths)


@dataclass(frozen=True)
class Ranking:
    """
    How a model that scores ranks the held-out pairs, the same on every rank.

    Args:
        mean (`float`):
            Share of pairs whose chosen completion scores higher, by TRL's evaluation.
        pairs (`int`):
            How many there are.
    """

    mean: float
    pairs: int
    # It writes nothing
    mean_length: ClassVar[None] = None

    @property
    def how(self) -> str:
        """How it was measured, and on how much."""
        return f"{self.pairs} pairs"


class HeldOutPairs:
    """Ranks the evaluation pairs by the scores of a trainer's model; in training, TRL's `eval_strategy` does."""

    def __init__(self):
        self.trainer = None

    def look(self) -> Ranking:
        """Let the trainer's current model score the pairs."""
        # A loader draws a random number; looking must not change the run
        with torch.random.fork_rng(devices=[]):
            accuracy = self.trainer.evaluate()["eval_accuracy"]
        return Ranking(accuracy, len(self.trainer.eval_dataset))


class HeldOut(TrainerCallback):
    """
    Answers the held-out prompts during training and logs the mean score as `held_out/<measure>`.

    Prompts, end tokens, options and rewards are those of training; only the draw is not. Greedy decoding draws no
    random numbers, so that looking does not change the run.

    Args:
        problems (`Dataset`):
            Column `prompt`, text or messages, and whatever the judges read.
        judges (`list` of `Callable`):
            Reward functions.
        measure (`str`):
            What the mean score is called.
        max_new_tokens (`int`):
            Longest answer.
        evaluations (`int`):
            How often to look during training, evenly spread; the last step included.
    """

    def __init__(self, problems: Dataset, judges: list[Callable], measure: str, max_new_tokens: int, evaluations: int):
        self.problems = problems
        self.judges = judges
        self.measure = measure
        self.max_new_tokens = max_new_tokens
        self.evaluations = evaluations
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if not self.evaluations:
            return
        every = max(1, state.max_steps // self.evaluations)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.trainer.log_metric(f"held_out/{self.measure}", self.look().mean)
            control.should_log = True

    def look(self) -> Answers:
        """
        Let the trainer's current model answer; every rank takes an equal share of the prompts.

        Raises:
            [`~papertrl.core.errors.JobError`]: before training, if no judge gives a number to any answer.
        """
        trainer = self.trainer
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        # Every rank generates as often as the others, which sharded models need
        share = -(-len(self.problems) // ranks)
        rows = self.problems.select([(rank * share + i) % len(self.problems) for i in range(share)])
        was_training = trainer.model.training
        trainer.model.eval()
        ids = [
            tokens
            for start in range(0, share, BATCH_SIZE)
            for tokens in trainer.answer(
                list(rows.select(range(start, min(start + BATCH_SIZE, share)))), self.max_new_tokens
            )
        ]
        trainer.model.train(was_training)
        texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        scores = self._judge(rows, texts, ids)
        answers = gather_object(list(zip(texts, scores, map(len, ids), strict=True)))[: len(self.problems)]
        answers = Answers(*map(list, zip(*answers, strict=True)))
        if trainer.state.global_step == 0 and all(score is None for score in answers.scores):
            names = ", ".join(map(reward_name, self.judges))
            raise JobError(
                f"`reward_funcs`: {names} returned `None` for all {len(answers.scores)} held-out answers, so that "
                "nothing is measured. Choose a reward that applies to the data, or set `--held_out_prompts 0`."
            )
        return answers

    def _judge(self, rows: Dataset, texts: list[str], ids: list[list[int]]) -> list[float | None]:
        columns = {name: list(rows[name]) for name in rows.column_names}
        prompts = columns["prompt"]
        completions = list(map(as_completion, prompts, texts))
        by_judge = call_rewards(self.judges, prompts, completions, ids, columns, self.trainer.state)
        applying = [[score for score in row if score is not None] for row in zip(*by_judge, strict=True)]
        return [fmean(scores) if scores else None for scores in applying]
