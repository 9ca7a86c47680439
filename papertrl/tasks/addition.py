"""The default task: sums of two operands, such as `07+45=` with the answer `052`."""

import random
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..rewards.matching import exact_match
from .base import VerifiedTask, check_range, hash_split


class AdditionTask(VerifiedTask):
    """
    Sums of two operands of up to `digits` digits, padded with zeros to equal width.

    The typical error, of [`demonstrations`] and of `wrong_answer`, is to forget the carries. One fifth of the operand
    pairs, chosen by a hash that ignores the operands' order, is kept for the test split.

    A completion may give workings before the answer: the columns' sums from the right, with carries, as in
    `47+85=` and `12,13;132`. What stands after the last semicolon counts.

    A prompt with a hint goes on with carries that the columns hand on, from the right: `47+85=[1]` or `47+85=[11]`.
    Who makes the typical error does not forget those.

    Relations: `reasoning_gym:basic_arithmetic` and `reasoning_gym:chain_sum` ask sums in English.

    A prompt with feedback goes on with an earlier answer and what its reader says of it, as in `47+85=022 low:`. Who
    answers it makes no error.

    Args:
        digits (`int`, *optional*, defaults to `2`):
            Difficulty: the largest number of digits of an operand.
        min_digits (`int`, *optional*):
            Narrowest operands of a mixture: each problem draws its width between this and `digits`, which the column
            `difficulty` holds. Unset, all problems are `digits` wide.
        workings_share (`float`, *optional*, defaults to `0.0`):
            Share of the demonstrations, and of the right answers of [`supervised`], that give workings.
        workings_error_share (`float`, *optional*, defaults to `0.0`):
            Share of those that forget the carries; the direct ones do so at the `error_share` of [`demonstrations`].
        hint_share (`float`, *optional*, defaults to `0.0`):
            Share of the demonstrations that stand under a prompt with a hint and make no error but to forget further
            carries. If above 0, problems have the columns `hints`, prompts with one carry more each, and `hint`, the
            last of them.
        feedback_share (`float`, *optional*, defaults to `0.0`):
            Share of the demonstrations that stand under a prompt with a wrong answer and feedback. If above 0,
            problems have the column `feedback`: whether the wrong answer is too `low` or too `high`.

    Raises:
        `ValueError`: if `digits` is not in [1, 9], `min_digits` not in [1, `digits`], or a share not in [0, 1].
    """

    name = "addition"
    instruction = "Add the two numbers and write the sum with one digit more than each number, as in 07+45=052."

    def __init__(
        self,
        digits: int = 2,
        min_digits: int | None = None,
        workings_share: float = 0.0,
        workings_error_share: float = 0.0,
        hint_share: float = 0.0,
        feedback_share: float = 0.0,
    ):
        check_range(self.name, "digits", digits, 1, 9)
        if min_digits is not None:
            check_range(self.name, "min_digits", min_digits, 1, digits)
        check_range(self.name, "workings_share", workings_share, 0, 1, float)
        check_range(self.name, "workings_error_share", workings_error_share, 0, 1, float)
        check_range(self.name, "hint_share", hint_share, 0, 1, float)
        check_range(self.name, "feedback_share", feedback_share, 0, 1, float)
        self.digits = digits
        self.min_digits = min_digits
        self.workings_share = workings_share
        self.workings_error_share = workings_error_share
        self.hint_share = hint_share
        self.feedback_share = feedback_share
        self.max_new_tokens = digits + 2 + (3 * digits if workings_share else 0)

    def problem(self, rng: random.Random) -> dict[str, Any]:
        return self._row(*self._operands(rng, self._width(rng)), rng)

    def draw(self, rng: random.Random, split: str) -> dict[str, Any]:
        # The width is not drawn again, so that every split mixes widths evenly
        width = self._width(rng)
        while True:
            a, b, _ = self._operands(rng, width)
            if split_of(a, b) == split:
                return self._row(a, b, width, rng)

    def _width(self, rng: random.Random) -> int:
        return self.digits if self.min_digits is None else rng.randint(self.min_digits, self.digits)

    def _operands(self, rng: random.Random, width: int) -> tuple[int, int, int]:
        return rng.randrange(10**width), rng.randrange(10**width), width

    def _row(self, a: int, b: int, width: int, rng: random.Random) -> dict[str, Any]:
        row = {
            "prompt": f"{a:0{width}}+{b:0{width}}=",
            "answer": f"{a + b:0{width + 1}}",
            "wrong_answer": f"{slip(a, b, rng):0{width + 1}}",
        }
        if self.hint_share > 0:
            row["hints"] = [f"{row['prompt']}[{carries(a, b, width)[:known]}]" for known in range(1, width + 1)]
            row["hint"] = row["hints"][-1]
        if self.feedback_share > 0:
            row["feedback"] = "low" if int(row["wrong_answer"]) < a + b else "high"
        return row if self.min_digits is None else {**row, "difficulty": width}

    def demonstrations(self, n: int, seed: int, error_share: float) -> Dataset:
        examples = super().demonstrations(n, seed, error_share)
        if self.feedback_share > 0:
            rng = random.Random(f"{seed}-feedback")
            examples = Dataset.from_list(
                [
                    after_feedback(problem) if rng.random() < self.feedback_share else example
                    for example, problem in zip(examples, self.generate(n, seed), strict=True)
                ]
            )
        if self.hint_share == 0:
            return examples
        rng = random.Random(f"{seed}-hints")
        rows = []
        for example, problem in zip(examples, self.generate(n, seed), strict=True):
            if rng.random() < self.hint_share:
                known = rng.randint(1, len(problem["hints"]))
                left, _, right = problem["prompt"].removesuffix("=").partition("+")
                answer = f"{without_carry(int(left), int(right), known):0{len(left) + 1}}"
                example = {"prompt": problem["hints"][known - 1], "completion": answer}
            rows.append(example)
        return Dataset.from_list(rows)

    def demonstrate(self, row: dict[str, Any], rng: random.Random, error_share: float) -> str:
        works = self.workings_share > 0 and rng.random() < self.workings_share
        errs = rng.random() < (self.workings_error_share if works else error_share)
        left, right = summands(row["prompt"])
        answer = f"{without_carry(int(left), int(right)):0{len(left) + 1}}" if errs else row["answer"]
        return f"{workings(left, right, carries=not errs)};{answer}" if works else answer

    def supervised(self, problems: Dataset, error_share: float = 0.0, seed: int = 0) -> Dataset:
        """The problems as `prompt` and `completion`; of the right answers, `workings_share` give workings."""
        plain = super().supervised(problems, error_share, seed)
        rng = random.Random(f"workings-{seed}")
        completions = [
            f"{workings(*summands(prompt))};{text}" if text == right and rng.random() < self.workings_share else text
            for prompt, text, right in zip(plain["prompt"], plain["completion"], problems["answer"], strict=True)
        ]
        return Dataset.from_dict({"prompt": list(plain["prompt"]), "completion": completions})

    def score(self, text: str, answer: str) -> float:
        return exact_match([text.rpartition(";")[2]], [answer])[0]

    @property
    def reward(self) -> Callable:
        return super().reward if self.workings_share else exact_match


def split_of(a: int, b: int) -> str:
    """Split to which the sum of `a` and `b`, in either order, belongs."""
    return hash_split(f"{min(a, b)},{max(a, b)}")


def summands(prompt: str) -> tuple[str, str]:
    """The two numbers of a prompt such as `07+45=`."""
    left, _, right = prompt.removesuffix("=").partition("+")
    return left, right


def workings(left: str, right: str, carries: bool = True) -> str:
    """Sums of the columns of two equally wide numbers, from the right, each with the carry before it: `12,13`."""
    sums = []
    carry = 0
    for x, y in zip(reversed(left), reversed(right), strict=True):
        sums.append(int(x) + int(y) + carry)
        carry = sums[-1] // 10 if carries else 0
    return ",".join(f"{column:02}" for column in sums)


def carries(a: int, b: int, width: int) -> str:
    """What each of the last `width` columns hands on, from the right: `11` for 47 and 85."""
    return "".join(str((a % 10**k + b % 10**k) // 10**k) for k in range(1, width + 1))


def after_feedback(row: dict[str, Any]) -> dict[str, str]:
    """Demonstration that answers a problem anew after feedback on its wrong answer."""
    return {"prompt": f"{row['prompt']}{row['wrong_answer']} {row['feedback']}:", "completion": row["answer"]}


def without_carry(a: int, b: int, known: int = 0) -> int:
    """Sum of `a` and `b` by somebody who forgets to carry, but from the last `known` columns."""
    handed = [0, *(int(c) * (i < known) for i, c in enumerate(carries(a, b, 9)))]
    columns = [(int(x) + int(y) + c) % 10 for x, y, c in zip(f"{a:09}"[::-1], f"{b:09}"[::-1], handed, strict=False)]
    return int("".join(map(str, columns[::-1])))


def slip(a: int, b: int, rng: random.Random) -> int:
    """A wrong sum of `a` and `b`: without its carries where there are any, else with one digit changed."""
    if without_carry(a, b) != a + b:
        return without_carry(a, b)
    digits = list(str(a + b))
    place = rng.randrange(len(digits))
    digits[place] = rng.choice([d for d in "0123456789" if d != digits[place]])
    return int("".join(digits))
