"""Sorting characters, such as `52914=` with the answer `12459`."""

import random
import string
from typing import Any

from .base import VerifiedTask, check_choice, check_range

ALPHABETS = {"digits": string.digits, "letters": string.ascii_lowercase}


class SortingTask(VerifiedTask):
    """
    Characters to put in ascending order.

    The wrong answer swaps two neighbours of the right one, so that the two share most of their tokens. The typical
    error of [`demonstrations`] is to stop a bubble sort at half the sweeps it may need.

    Relations: `reasoning_gym:number_sorting` asks the same in English.

    Args:
        length (`int`, *optional*, defaults to `5`):
            Difficulty: the number of characters.
        alphabet (`str`, *optional*, defaults to `"digits"`):
            `"digits"`, or the harder `"letters"`.

    Raises:
        `ValueError`: if `length` is not in [3, 20], or `alphabet` is unknown.
    """

    name = "sorting"
    instruction = "Write the characters before the equals sign in ascending order, without spaces, as in 52914=12459."

    def __init__(self, length: int = 5, alphabet: str = "digits"):
        check_range(self.name, "length", length, 3, 20)
        check_choice(self.name, "alphabet", alphabet, tuple(ALPHABETS))
        self.length = length
        self.alphabet = ALPHABETS[alphabet]
        self.max_new_tokens = length + 1

    def problem(self, rng: random.Random) -> dict[str, Any]:
        characters = rng.choices(self.alphabet, k=self.length)
        while len(set(characters)) == 1:
            characters = rng.choices(self.alphabet, k=self.length)
        answer = sorted(characters)
        place = rng.choice([i for i in range(self.length - 1) if answer[i] != answer[i + 1]])
        wrong = [*answer[:place], answer[place + 1], answer[place], *answer[place + 2 :]]
        return {
            "prompt": "".join(characters) + "=",
            "answer": "".join(answer),
            "wrong_answer": "".join(wrong),
            "difficulty": self.length,
        }

    def typical_error(self, row: dict[str, Any], rng: random.Random) -> str:
        characters = row["prompt"].removesuffix("=")
        return bubble_sorted(characters, (len(characters) - 1) // 2)

    def score(self, text: str, answer: str) -> float:
        return float(text.strip() == answer)


def bubble_sorted(text: str, sweeps: int) -> str:
    """The characters of `text` after so many sweeps of a bubble sort from the left."""
    characters = list(text)
    for _ in range(sweeps):
        for i in range(len(characters) - 1):
            if characters[i] > characters[i + 1]:
                characters[i], characters[i + 1] = characters[i + 1], characters[i]
    return "".join(characters)
