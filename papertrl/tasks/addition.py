"""The default task: sums of two operands, such as `07+45=` with the answer `052`."""

import hashlib
import random
from collections.abc import Callable

from datasets import Dataset

from ..rewards.matching import exact_match
from .base import Task

TEST_SHARE = 5


class AdditionTask(Task):
    """
    Sums of two operands of up to `digits` digits, padded with zeros to equal width.

    The typical error, of [`demonstrations`] and of `wrong_answer`, is to forget the carries. One fifth of the operand
    pairs, chosen by a hash that ignores the operands' order, is kept for the test split.

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
                width = self.digits
                rows.append(
                    {
                        "prompt": f"{a:0{width}}+{b:0{width}}=",
                        "answer": f"{a + b:0{width + 1}}",
                        "wrong_answer": f"{slip(a, b, rng):0{width + 1}}",
                    }
                )
        return Dataset.from_list(rows)

    def demonstrations(self, n: int, seed: int, error_share: float) -> Dataset:
        rng = random.Random(seed)
        problems = self.generate(n, seed)
        completions = []
        for prompt, answer in zip(problems["prompt"], problems["answer"], strict=True):
            a, b = map(int, prompt.removesuffix("=").split("+"))
            forgets = rng.random() < error_share
            completions.append(f"{without_carry(a, b):0{self.digits + 1}}" if forgets else answer)
        return Dataset.from_dict({"prompt": list(problems["prompt"]), "completion": completions})

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


def slip(a: int, b: int, rng: random.Random) -> int:
    """A wrong sum of `a` and `b`: without its carries where there are any, else with one digit changed."""
    if without_carry(a, b) != a + b:
        return without_carry(a, b)
    digits = list(str(a + b))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "0123456789" if d != digits[place]])
    return int("".join(digits))
