"""Instructions to turn into a call, such as `put 37 fig>` with the answer `add(n=37,x=fig)`."""

import random
import re
from typing import Any

from .base import VerifiedTask, check_range

# Each tool answers to its own name and to a second verb
VERBS = {"add": "put", "drop": "cut", "find": "seek", "send": "ship", "buy": "get", "sell": "vend"}
ARGUMENTS = {
    "n": tuple(map(str, range(1, 100))),
    "x": ("fig", "nut", "pear", "kiwi", "lime", "plum"),
    "c": ("red", "blue", "gold", "pink"),
}
_CALL = re.compile(r"(\w+)\(([^()]*)\)")


class ToolCallTask(VerifiedTask):
    """
    Instructions to carry out with a call: `verb number color item` becomes `tool(n=...,x=item,c=color)`.

    Every tool answers to two verbs. The order of arguments does not matter. The wrong answer has a wrong argument or
    the wrong tool; the typical error of [`demonstrations`] is to take a tool's second verb for another tool.

    Args:
        tools (`int`, *optional*, defaults to `4`):
            Difficulty: how many tools there are.
        arguments (`int`, *optional*, defaults to `2`):
            Difficulty: how many arguments a call has: number, item, color.

    Raises:
        `ValueError`: if `tools` is not in [2, 6], or `arguments` not in [1, 3].
    """

    name = "tool_call"
    instruction = (
        "Write the instruction as one call tool(n=number,x=item,c=color) with the arguments it mentions, as in "
        "put 37 fig>add(n=37,x=fig); the tools, with a second verb for each, are {tools}."
    )

    def __init__(self, tools: int = 4, arguments: int = 2):
        check_range(self.name, "tools", tools, 2, len(VERBS))
        check_range(self.name, "arguments", arguments, 1, len(ARGUMENTS))
        self.tools = tuple(VERBS)[:tools]
        self.arguments = tuple(ARGUMENTS)[:arguments]
        self.max_new_tokens = 7 + 7 * arguments
        listed = ", ".join(f"{tool} ({VERBS[tool]})" for tool in self.tools)
        self.instruction = ToolCallTask.instruction.format(tools=listed)

    def problem(self, rng: random.Random) -> dict[str, Any]:
        tool = rng.choice(self.tools)
        values = {argument: rng.choice(ARGUMENTS[argument]) for argument in self.arguments}
        wrong_tool, wrong_values = tool, values
        if rng.random() < 0.5:
            wrong_tool = rng.choice([other for other in self.tools if other != tool])
        else:
            argument = rng.choice(self.arguments)
            value = rng.choice([other for other in ARGUMENTS[argument] if other != values[argument]])
            wrong_values = {**values, argument: value}
        # Colors stand before what they color
        words = [rng.choice((tool, VERBS[tool])), *(values[name] for name in ("n", "c", "x") if name in values)]
        return {
            "prompt": " ".join(words) + ">",
            "answer": call(tool, values),
            "wrong_answer": call(wrong_tool, wrong_values),
            "difficulty": len(self.arguments),
        }

    def typical_error(self, row: dict[str, Any], rng: random.Random) -> str:
        tool, values = parse_call(row["answer"])
        if row["prompt"].startswith(f"{tool} "):
            return row["answer"]
        return call(self.tools[self.tools.index(tool) - 1], values)

    def score(self, text: str, answer: str) -> float:
        parsed = parse_call(text)
        return float(parsed is not None and parsed == parse_call(answer))


def call(tool: str, values: dict[str, str]) -> str:
    """Call of a tool, as text."""
    return f"{tool}({','.join(f'{name}={value}' for name, value in values.items())})"


def parse_call(text: str) -> tuple[str, dict[str, str]] | None:
    """Tool and arguments of a call; `None` if the text is not one, or gives an argument twice."""
    match = _CALL.fullmatch(text.strip())
    if match is None:
        return None
    pairs = [tuple(map(str.strip, pair.split("="))) for pair in match[2].split(",")]
    values = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    return (match[1], values) if len(values) == len(pairs) else None
