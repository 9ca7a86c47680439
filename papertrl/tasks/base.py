"""What a task is: procedurally generated problems, an exact verifier, and the views that trainers need."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from datasets import Dataset


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
            Completion tokens that leave room for every answer.
    """

    name: ClassVar[str]
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

    def supervised(self, problems: Dataset) -> Dataset:
        """The problems as `prompt` and `completion`."""
        return problems.rename_column("answer", "completion").select_columns(["prompt", "completion"])

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
        if "wrong_answer" not in problems.column_names:
            raise ValueError(
                f"Task '{self.name}' has no wrong answers, so that it makes no preference pairs. Use the task "
                "'addition', a dataset with `chosen` and `rejected`, or a method of another family."
            )
        renamed = problems.rename_columns({"answer": "chosen", "wrong_answer": "rejected"})
        return renamed.select_columns(["prompt", "chosen", "rejected"])
