"""What a task is: procedurally generated problems, an exact verifier, and the views that trainers need."""

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from datasets import Dataset, concatenate_datasets

from ..rewards.matching import Completion, completion_text

TEST_SHARE = 5
# Draws after which a split counts as empty
MOST_DRAWS = 10_000


class Task(ABC):
    """
    Problems that are generated on the spot and can be verified exactly.

    A task draws problems and says which completions are right; the three views below give every family of trainers
    the columns it expects.

    Attributes:
        name (`str`):
            Name on the command line.
        measure (`str`):
            What the verifier's mean is called: `accuracy` where it says right or wrong.
        max_new_tokens (`int`):
            Completion tokens that leave room for every answer, with one token per character.
        instruction (`str`):
            One sentence that says what a prompt asks and how the answer is written; empty where prompts say so.
    """

    name: ClassVar[str]
    instruction: str
    measure: ClassVar[str] = "accuracy"
    max_new_tokens: int

    @abstractmethod
    def generate(self, n: int, seed: int, split: str = "train") -> Dataset:
        """
        Draw problems.

        Args:
            n (`int`):
                Number of problems.
            seed (`int`):
                The same seed draws the same problems.
            split (`str`, *optional*, defaults to `"train"`):
                `"train"` or `"test"`, which draw differently; [`splits`] also removes what they share by chance.

        Returns:
            `Dataset`: with columns `prompt`, `answer`, `wrong_answer` (where the task can make one up) and whatever
                the verifier reads.
        """

    def splits(self, train: int, test: int, seed: int) -> tuple[Dataset, Dataset]:
        """
        Draw a train and a test set that share no prompt.

        Raises:
            `ValueError`: if the task has so few problems that the train set leaves none for the test.
        """
        train_set = self.generate(train, seed, "train")
        if test == 0:
            return train_set, train_set.select([])
        seen = set(train_set["prompt"])
        test_set = self.generate(test, seed, "test")
        test_set = test_set.select([i for i, prompt in enumerate(test_set["prompt"]) if prompt not in seen])
        if len(test_set) == 0:
            raise ValueError(
                f"Task '{self.name}': the {train} training problems leave no other problem for the test. Lower "
                "`--task_size`, make the task harder with `--task_kwargs`, or set `--held_out_prompts 0`."
            )
        return train_set, test_set

    @property
    @abstractmethod
    def reward(self) -> Callable:
        """The verifier: a reward function with TRL's signature, 1.0 for a right completion."""

    def supervised(self, problems: Dataset, error_share: float = 0.0, seed: int = 0) -> Dataset:
        """
        The problems as `prompt` and `completion`.

        Args:
            problems (`Dataset`):
                From [`generate`].
            error_share (`float`, *optional*, defaults to `0.0`):
                Share of the completions that are the wrong answer instead.
            seed (`int`, *optional*, defaults to `0`):
                The same seed makes the same labels wrong.

        Raises:
            `ValueError`: if `error_share` is not in [0, 1], or is not zero and the task has no wrong answers.
        """
        check_range(self.name, "error_share", error_share, 0, 1, float)
        completions = list(problems["answer"])
        if error_share > 0:
            self._require_wrong_answers(problems)
            rng = random.Random(seed)
            completions = [
                wrong if rng.random() < error_share else right
                for right, wrong in zip(completions, problems["wrong_answer"], strict=True)
            ]
        return Dataset.from_dict({"prompt": list(problems["prompt"]), "completion": completions})

    def demonstrations(self, n: int, seed: int, error_share: float) -> Dataset:
        """
        Demonstrations of mixed quality, as `prompt` and `completion`, for the embedded start model.

        A model that imitates them errs as often as they do; that is what a policy gradient can put right. A task
        that knows no typical error gives right demonstrations only.

        Args:
            n (`int`):
                Number of demonstrations.
            seed (`int`):
                The same seed draws the same demonstrations.
            error_share (`float`):
                Share of the demonstrations that make the task's typical error.
        """
        return self.supervised(self.generate(n, seed))

    def preference(self, problems: Dataset) -> Dataset:
        """
        The problems as `prompt`, `chosen` and `rejected`.

        Raises:
            `ValueError`: if the task has no wrong answers to reject.
        """
        self._require_wrong_answers(problems)
        renamed = problems.rename_columns({"answer": "chosen", "wrong_answer": "rejected"})
        return renamed.select_columns(["prompt", "chosen", "rejected"])

    def online(self, problems: Dataset) -> Dataset:
        """The problems, with `chosen` and `rejected` where there are wrong answers: prompts for the online loop."""
        if "wrong_answer" not in problems.column_names:
            return problems
        return concatenate_datasets([problems, self.preference(problems).remove_columns("prompt")], axis=1)

    def _require_wrong_answers(self, problems: Dataset) -> None:
        if "wrong_answer" not in problems.column_names:
            raise ValueError(
                f"Task '{self.name}' has no wrong answers, so that it makes neither preference pairs nor wrong "
                "labels. Use a task such as 'addition', a dataset with `chosen` and `rejected`, or a "
                "method of another family."
            )


class ProceduralTask(Task):
    """
    A task that draws one problem at a time.

    A hash of the prompt decides to which split a problem belongs, so that the splits never share one.
    """

    @abstractmethod
    def problem(self, rng: random.Random) -> dict[str, Any]:
        """Any problem: a row with `prompt`, `answer`, `wrong_answer` and mostly `difficulty`, higher for harder."""

    def draw(self, rng: random.Random, split: str) -> dict[str, Any]:
        """
        A problem of the split.

        Raises:
            `ValueError`: if the task's settings leave the split without problems.
        """
        for _ in range(MOST_DRAWS):
            row = self.problem(rng)
            if hash_split(row["prompt"]) == split:
                return row
        raise ValueError(f"Task '{self.name}': so few problems that the split '{split}' is empty. Make it harder.")

    def typical_error(self, row: dict[str, Any], rng: random.Random) -> str:
        """What somebody answers who makes the task's typical error, which need not be wrong on every problem."""
        return row["wrong_answer"]

    def demonstrate(self, row: dict[str, Any], rng: random.Random, error_share: float) -> str:
        """A completion for the problem, with the typical error at a probability of `error_share`."""
        return self.typical_error(row, rng) if rng.random() < error_share else row["answer"]

    def generate(self, n: int, seed: int, split: str = "train") -> Dataset:
        if split not in ("train", "test"):
            raise ValueError(f"Task '{self.name}': `split` must be 'train' or 'test', got '{split}'.")
        rng = random.Random(f"{seed}-{split}")
        return Dataset.from_list([self.draw(rng, split) for _ in range(n)])

    def demonstrations(self, n: int, seed: int, error_share: float) -> Dataset:
        check_range(self.name, "error_share", error_share, 0, 1, float)
        rng = random.Random(seed)
        problems = self.generate(n, seed)
        completions = [self.demonstrate(row, rng, error_share) for row in problems]
        return Dataset.from_dict({"prompt": list(problems["prompt"]), "completion": completions})


class VerifiedTask(ProceduralTask):
    """A procedural task whose verifier needs no more of a problem than its `answer`."""

    @abstractmethod
    def score(self, text: str, answer: str) -> float:
        """1.0 if the completion `text` solves the problem that `answer` solves, else 0.0; never raises."""

    @property
    def reward(self) -> Callable:
        def verified(completions: list[Completion], answer: list[str], **kwargs) -> list[float]:
            return [self.score(completion_text(c), a) for c, a in zip(completions, answer, strict=True)]

        verified.__name__ = self.name
        return verified


def hash_split(key: str) -> str:
    """Split of the problem that `key` identifies: one of `TEST_SHARE` is for the test."""
    digest = hashlib.sha256(key.encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def check_range(task: str, field: str, value: Any, low: float, high: float, kind: type = int) -> None:
    """
    Check a setting of a task.

    Raises:
        `ValueError`: if `value` is no number, not whole where `kind` is `int`, or outside [`low`, `high`].
    """
    kinds = (int, float) if kind is float else int
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        whole = " and whole" if isinstance(value, float) and kind is int else ""
        raise ValueError(f"Task '{task}': `{field}` must be in [{low}, {high}]{whole}, got {value!r}.")


def check_choice(task: str, field: str, value: Any, choices: tuple[str, ...]) -> None:
    """
    Check a setting of a task that names one of several possibilities.

    Raises:
        `ValueError`: if `value` is none of `choices`.
    """
    if value not in choices:
        names = " or ".join(f"'{choice}'" for choice in choices)
        raise ValueError(f"Task '{task}': `{field}` must be {names}, got {value!r}.")
