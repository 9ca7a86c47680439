"""Several tasks in one dataset, with a controlled share of easy prompts."""

import math
import random
from collections.abc import Callable
from typing import Any

from ..rewards.matching import Completion, completion_text
from .addition import AdditionTask
from .automaton import AutomatonTask
from .base import ProceduralTask, VerifiedTask, check_range
from .countdown import CountdownTask
from .sorting import SortingTask

# Of each domain, the easy and the hard problems
MEMBERS: dict[str, tuple[VerifiedTask, VerifiedTask]] = {
    "addition": (AdditionTask(1), AdditionTask(3, min_digits=2)),
    "sorting": (SortingTask(3), SortingTask(6)),
    "automaton": (AutomatonTask(length=2), AutomatonTask(length=6)),
    "countdown": (CountdownTask(2), CountdownTask(3)),
}
WEIGHTS = {"addition": 1.0, "sorting": 1.0, "automaton": 1.0}
# Share of the typical errors that demonstrations of easy problems make
EASY_ERRORS = 0.1


class MixtureTask(ProceduralTask):
    """
    Problems of several domains, each easy or hard.

    Easy are sums of one digit, sorting three characters, walks of two moves and countdown with two numbers; hard are
    sums of two or three digits, six characters, six moves and three numbers. The columns `domain` and `difficulty` (0
    easy, 1 hard) say which; the verifier judges each completion by its domain's rules. [`demonstrations`] of easy
    problems err a tenth as often as those of hard ones, so that a start model's answers to them are nearly unanimous.

    Relations: the `composite` dataset of reasoning-gym mixes its generators.

    Args:
        weights (`dict[str, float]`, *optional*):
            Relative frequency of each domain: `addition`, `sorting`, `automaton`, `countdown`. Defaults to equal
            shares of the first three.
        easy_share (`float`, *optional*, defaults to `0.5`):
            Difficulty: probability that a problem is easy.

    Raises:
        `ValueError`: if `weights` names an unknown domain, has a negative weight or none above zero, or `easy_share`
            is not in [0, 1].
    """

    name = "mixture"
    instruction = (
        "Two numbers with a plus: add them, one digit more in the sum (47+85=132). Characters alone: sort them "
        "(52914=12459). Numbers before a >: reach the number after it, using each once (3 5 7>22=3*5+7). A state of "
        "the ring 0 to 4, a colon and moves: write the state after each (a: one on; b: s to 4-s; c: b, then a)."
    )

    def __init__(self, weights: dict[str, float] | None = None, easy_share: float = 0.5):
        weights = WEIGHTS if weights is None else weights
        if not _valid(weights):
            raise ValueError(
                f"Task 'mixture': `weights` must map domains, of {', '.join(MEMBERS)}, to numbers of at least 0 that "
                f"are not all 0, got {weights!r}."
            )
        check_range(self.name, "easy_share", easy_share, 0, 1, float)
        self.weights = weights
        self.easy_share = easy_share
        self.max_new_tokens = max(member.max_new_tokens for name in weights for member in MEMBERS[name])

    def problem(self, rng: random.Random) -> dict[str, Any]:
        return self._choose(rng, lambda member: member.problem(rng))

    def draw(self, rng: random.Random, split: str) -> dict[str, Any]:
        return self._choose(rng, lambda member: member.draw(rng, split))

    def _choose(self, rng: random.Random, drawn: Callable[[VerifiedTask], dict[str, Any]]) -> dict[str, Any]:
        domain = rng.choices(list(self.weights), weights=list(self.weights.values()))[0]
        difficulty = int(rng.random() >= self.easy_share)
        return {**drawn(MEMBERS[domain][difficulty]), "domain": domain, "difficulty": difficulty}

    def demonstrate(self, row: dict[str, Any], rng: random.Random, error_share: float) -> str:
        error_share *= 1.0 if row["difficulty"] else EASY_ERRORS
        return MEMBERS[row["domain"]][row["difficulty"]].demonstrate(row, rng, error_share)

    @property
    def reward(self) -> Callable:
        def mixture(completions: list[Completion], answer: list[str], domain: list[str], **kwargs) -> list[float]:
            rows = zip(completions, answer, domain, strict=True)
            return [MEMBERS[name][0].score(completion_text(text), right) for text, right, name in rows]

        return mixture


def _valid(weights: Any) -> bool:
    if not isinstance(weights, dict) or not set(weights) <= set(MEMBERS):
        return False
    numbers = all(isinstance(weight, int | float) and weight >= 0 for weight in weights.values())
    return numbers and 0 < sum(weights.values()) < math.inf
