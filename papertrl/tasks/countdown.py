"""Reaching a target from numbers, such as `3 5 7>22=` with the answer `3*5+7`."""

import ast
import random
import re
from collections import Counter
from fractions import Fraction
from typing import Any

from .base import VerifiedTask, check_range

LARGEST_TARGET = 999
OPERATORS = {
    ast.Add: lambda x, y: x + y,
    ast.Sub: lambda x, y: x - y,
    ast.Mult: lambda x, y: x * y,
    ast.Div: lambda x, y: x / y,
}
_EXPRESSION = re.compile(r"[0-9+\-*/() ]{1,64}")


class CountdownTask(VerifiedTask):
    """
    Numbers to combine, each exactly once, with `+`, `-`, `*`, `/` and parentheses, so that they make the target.

    Every expression that does so is right; the answer given is the one from which the problem was made. The wrong
    answer changes one of its operators. The typical error of [`demonstrations`] is to add where the first product
    should be.

    Relations: `reasoning_gym:countdown` asks the same in English.

    Args:
        numbers (`int`, *optional*, defaults to `3`):
            Difficulty: how many numbers there are.
        largest (`int`, *optional*, defaults to `9`):
            Difficulty: the largest number.

    Raises:
        `ValueError`: if `numbers` is not in [2, 4], or `largest` not in [2, 99].
    """

    name = "countdown"
    instruction = (
        "Write an expression that uses every number before the > exactly once and whose value is the number after it, "
        "as in 3 5 7>22=3*5+7."
    )

    def __init__(self, numbers: int = 3, largest: int = 9):
        check_range(self.name, "numbers", numbers, 2, 4)
        check_range(self.name, "largest", largest, 2, 99)
        self.numbers = numbers
        self.largest = largest
        self.max_new_tokens = numbers * (len(str(largest)) + 1)

    def problem(self, rng: random.Random) -> dict[str, Any]:
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(self.numbers)]
            operators = rng.choices("+-*", k=self.numbers - 1)
            answer = join(numbers, operators)
            target = evaluate(answer)
            others = [join(numbers, changed) for changed in changes(operators)]
            wrong = [other for other in others if evaluate(other) != target]
            if 0 <= target <= LARGEST_TARGET and wrong:
                break
        return {
            "prompt": f"{' '.join(map(str, sorted(numbers)))}>{target}=",
            "answer": answer,
            "wrong_answer": rng.choice(wrong),
            "difficulty": self.numbers,
        }

    def typical_error(self, row: dict[str, Any], rng: random.Random) -> str:
        return row["answer"].replace("*", "+", 1)

    def score(self, text: str, answer: str) -> float:
        value = evaluate(text)
        return float(value is not None and value == evaluate(answer) and operands(text) == operands(answer))


def join(numbers: list[int], operators: list[str]) -> str:
    """Expression of the numbers in this order with the operators between them."""
    pairs = zip(["", *operators], numbers, strict=True)
    return "".join(f"{operator}{number}" for operator, number in pairs)


def changes(operators: list[str]) -> list[list[str]]:
    """Every list that differs from `operators` in one place."""
    return [
        [*operators[:i], other, *operators[i + 1 :]]
        for i, operator in enumerate(operators)
        for other in "+-*"
        if other != operator
    ]


def operands(expression: str) -> Counter[int]:
    """Numbers in an expression, with how often each occurs."""
    return Counter(map(int, re.findall(r"[0-9]+", expression)))


def evaluate(expression: str) -> Fraction | None:
    """Value of an expression of whole numbers, `+-*/` and parentheses; `None` if it is not one, or divides by zero."""
    if not _EXPRESSION.fullmatch(expression):
        return None
    try:
        return _value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"Neither number nor operation: {ast.dump(node)}.")
