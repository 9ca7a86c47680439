"""The default task: sums of two operands, such as `37+45=`."""

import hashlib
import random
from collections.abc import Callable

from datasets import Dataset

from ..rewards.matching import exact_match
from .base import Task

TEST_SHARE = 5


class AdditionTask(Task):
    """
    Sums of two operands of up to `digits` digits.

    One fifth of the operand pairs, chosen by a hash that ignores the operands' order, is kept for the test split.

    Args:
        digits (`int`, *optional*, defaults to `2`):
            Difficulty: the largest number of digits of an operand.

    Raises:
        `ValueError`: if `digits` is not in [1, 9].
    """

    name = "addition"

    def __init__(self, digits: int = 2):
        if not 1 <= digits <= 9:
            raise ValueError(f"Task 'addition': `digits` must be in [1, 9], got {digits}.")
        self.digits = digits
        self.max_new_tokens = digits + 2

    def generate(self, n: int, seed: int, split: str = "train") -> Dataset:
        if split not in ("train", "test"):
            raise ValueError(f"Task 'addition': `split` must be 'train' or 'test', got '{split}'.")
        rng = random.Random(f"{seed}-{split}")
        rows = []
        while len(rows) < n:
            a, b = rng.randrange(10**self.digits), rng.randrange(10**self.digits)
            if split_of(a, b) == split:
                total = str(a + b)
                rows.append({"prompt": f"{a}+{b}=", "answer": total, "wrong_answer": _one_digit_off(total, rng)})
        return Dataset.from_list(rows)

    @property
    def reward(self) -> Callable:
        return exact_match


def split_of(a: int, b: int) -> str:
    """Split to which the sum of `a` and `b`, in either order, belongs."""
    digest = hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def _one_digit_off(total: str, rng: random.Random) -> str:
    place = rng.randrange(len(total))
    digit = rng.choice([d for d in "0123456789" if d != total[place]])
    return total[:place] + digit + total[place + 1 :]
