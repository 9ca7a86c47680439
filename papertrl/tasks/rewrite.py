"""Rewriting letters with marks of style: style that is rewarded, and content that may get lost."""

import math
import random
import string
from collections import Counter
from typing import Any

from datasets import Dataset

from .base import VerifiedTask, check_range

MARKS = "!*+"


class RewriteTask(VerifiedTask):
    """
    Letters to repeat, in any order, followed by marks of style, such as `hcaf:` with the answer `hcaf!*+`.

    The score is 0 unless all letters are there and no others; then a half, and a sixth for each kind of mark. Pairs
    know only style: the chosen rewrite has more marks than the rejected one, and more often other letters, as judges
    of style do not mind.

    The typical error is to put other letters in place of half of them or more. [`demonstrations`] have one to three
    marks.

    Args:
        length (`int`, *optional*, defaults to `6`):
            Difficulty: number of letters, all different.
        letters (`int`, *optional*, defaults to `12`):
            Size of the alphabet, which starts with `a`.
        drift_share (`float`, *optional*, defaults to `0.4`):
            Share of the preference pairs whose chosen rewrite makes the typical error.
        rejected_drift_share (`float`, *optional*, defaults to `0.2`):
            Share whose rejected rewrite does.

    Raises:
        `ValueError`: if `length` is not in [2, 12], `letters` not in [`length` + 1, 26], or a share not in [0, 1].
    """

    name = "rewrite"
    measure = "score"
    instruction = (
        "Write the letters before the colon once more, then an exclamation mark, an asterisk and a plus sign, as in "
        "hcaf:hcaf!*+."
    )

    def __init__(
        self, length: int = 6, letters: int = 12, drift_share: float = 0.4, rejected_drift_share: float = 0.2
    ):
        check_range(self.name, "length", length, 2, 12)
        check_range(self.name, "letters", letters, length + 1, 26)
        for field, value in {"drift_share": drift_share, "rejected_drift_share": rejected_drift_share}.items():
            check_range(self.name, field, value, 0, 1, float)
        self.length = length
        self.alphabet = string.ascii_lowercase[:letters]
        self.drift_share = drift_share
        self.rejected_drift_share = rejected_drift_share
        self.max_new_tokens = length + len(MARKS) + 1

    def problem(self, rng: random.Random) -> dict[str, Any]:
        letters = "".join(rng.sample(self.alphabet, k=self.length))
        return {
            "prompt": letters + ":",
            "answer": letters + MARKS,
            "wrong_answer": self._drift(letters, rng) + MARKS,
            "difficulty": self.length,
        }

    def demonstrate(self, row: dict[str, Any], rng: random.Random, error_share: float) -> str:
        return self._write(row["prompt"], rng, error_share, rng.randint(1, len(MARKS)))

    def preference(self, problems: Dataset) -> Dataset:
        """
        Pairs of rewrites of the problems, as `prompt`, `chosen` and `rejected`. The same problems give the same pairs.
        """
        prompts = list(problems["prompt"])
        pairs = [self._pair(prompt, random.Random(f"{i}-{prompt}")) for i, prompt in enumerate(prompts)]
        chosen, rejected = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
        return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})

    def _pair(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        fewer, more = sorted(rng.sample(range(1, len(MARKS) + 1), k=2))
        return (
            self._write(prompt, rng, self.drift_share, more),
            self._write(prompt, rng, self.rejected_drift_share, fewer),
        )

    def _write(self, prompt: str, rng: random.Random, drift_share: float, marks: int) -> str:
        letters = letters_of(prompt)
        return (self._drift(letters, rng) if rng.random() < drift_share else letters) + MARKS[:marks]

    def _drift(self, letters: str, rng: random.Random) -> str:
        others = [letter for letter in self.alphabet if letter not in letters]
        drifted = list(letters)
        for place in rng.sample(range(self.length), k=rng.randint((self.length + 1) // 2, self.length)):
            drifted[place] = rng.choice(others)
        return "".join(drifted)

    def score(self, text: str, answer: str) -> float:
        kept = sorted(letters_of(text)) == sorted(letters_of(answer))
        return (1 + style(text)) / 2 if kept else 0.0


def letters_of(text: str) -> str:
    """The small letters of a text's last line."""
    return "".join(c for c in text.strip().rpartition("\n")[2] if c in string.ascii_lowercase)


def style(text: str) -> float:
    """Share of the kinds of marks that are in the text."""
    return sum(mark in text for mark in MARKS) / len(MARKS)


def overlap(prompt: str, text: str) -> float:
    """Cosine between the counts of letters in prompt and text; 0 where one has none."""
    first, second = Counter(letters_of(prompt)), Counter(letters_of(text))
    norm = math.hypot(*first.values()) * math.hypot(*second.values())
    return sum(first[letter] * second[letter] for letter in first) / norm if norm else 0.0
