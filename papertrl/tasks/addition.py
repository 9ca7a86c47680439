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
                rows.append({"prompt": f"{a}+{b}=", "answer": str(a + b), "wrong_answer": slip(a, b, rng)})
        return Dataset.from_list(rows)

    @property
    def reward(self) -> Callable:
        return exact_match


def split_of(a: int, b: int) -> str:
    """Split to which the sum of `a` and `b`, in either order, belongs."""
    digest = hashlib.sha256(f"{min(a, b)},{max(a, b)}".encode()).digest()
    return "test" if digest[0] % TEST_SHARE == 0 else "train"


def without_carry(a: int, b: int) -> int:
    """Sum of `a` and `b` by somebody who forgets to carry: each column's sum modulo ten."""
    columns = [(int(x) + int(y)) % 10 for x, y in zip(str(a).zfill(9), str(b).zfill(9), strict=True)]
    return int("".join(map(str, columns)))


def slip(a: int, b: int, rng: random.Random) -> str:
    """A wrong sum of `a` and `b`: without its carries where there are any, else with one digit changed."""
    if without_carry(a, b) != a + b:
        return str(without_carry(a, b))
    total = str(a + b)
    place = rng.randrange(len(total))
    digit = rng.choice([d for d in "0123456789" if d != total[place]])
    return total[:place] + digit + total[place + 1 :]
