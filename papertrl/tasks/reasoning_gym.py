"""Tasks of the `reasoning-gym` package: a hundred procedural problem generators, each with a verifier."""

import difflib
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from datasets import Dataset

from ..rewards.matching import Completion, completion_text
from .base import Task

# Problem `i` of a generator is drawn from `seed + i`, so that the splits' seeds must be far apart
_SPLIT_SEEDS = {"train": 0, "test": 1_000_000_000}


class ReasoningGymTask(Task):
    """
    One generator of `reasoning-gym`, named `reasoning_gym:<generator>` on the command line.

    Its verifier scores the part of a completion inside `<answer>` tags, or else all of it.

    Args:
        generator (`str`):
            Name in `reasoning_gym.factory.DATASETS`, such as `chain_sum`.
        max_new_tokens (`int`, *optional*, defaults to `64`):
            Completion tokens that leave room for every answer.
        **config:
            Settings of the generator, such as `min_terms`.

    Raises:
        `ImportError`: if `reasoning-gym` is not installed.
        `ValueError`: if there is no such generator, or it refuses `config`.
    """

    name = "reasoning_gym"
    instruction = ""
    # Generators give partial credit
    measure = "score"

    def __init__(self, generator: str, max_new_tokens: int = 64, **config):
        gym = _import_reasoning_gym()
        known = sorted(gym.factory.DATASETS)
        if generator not in known:
            near = difflib.get_close_matches(generator, known, n=3)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(
                f"reasoning-gym has no task '{generator}'. {hint}It has {len(known)}, among them "
                f"{', '.join(known[:5])}; `reasoning_gym.factory.DATASETS` lists them."
            )
        self.generator = generator
        self.max_new_tokens = max_new_tokens
        self.config = config
        try:
            self._sources = {split: gym.create_dataset(generator, seed=0, size=1, **config) for split in _SPLIT_SEEDS}
        except (TypeError, AssertionError) as error:
            raise ValueError(
                f"Task 'reasoning_gym:{generator}' does not accept the settings {config}: {error}"
            ) from error
        self._gym = gym

    def _source(self, seed: int, n: int) -> Any:
        return self._gym.create_dataset(self.generator, seed=seed, size=n, **self.config)

    def generate(self, n: int, seed: int, split: str = "train") -> Dataset:
        start = _SPLIT_SEEDS[split] + seed * 1_000_003
        entries = list(self._source(start, n))
        return Dataset.from_list(
            [
                {"prompt": entry["question"], "answer": str(entry["answer"]), "entry_seed": start + i}
                for i, entry in enumerate(entries)
            ]
        )

    @property
    def reward(self) -> Callable:
        def verified(completions: list[Completion], entry_seed: list[int], **kwargs) -> list[float]:
            return [self._score(completion_text(c), entry) for c, entry in zip(completions, entry_seed, strict=True)]

        verified.__name__ = self.generator
        return verified

    def _score(self, text: str, entry_seed: int) -> float:
        source = self._source(entry_seed, 1)
        answer = self._gym.utils.extract_answer(text) or text
        return float(source.score_answer(answer.strip(), source[0]))


def _import_reasoning_gym() -> ModuleType:
    try:
        gym = importlib.import_module("reasoning_gym")
        importlib.import_module("reasoning_gym.factory")
        importlib.import_module("reasoning_gym.utils")
    except ImportError as error:
        raise ImportError(
            "Tasks `reasoning_gym:<name>` need the package `reasoning-gym`. Install it with "
            "`pip install reasoning-gym`."
        ) from error
    return gym
