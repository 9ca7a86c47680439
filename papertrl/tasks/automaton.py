"""Walks on a small automaton, such as `2:abcab=` with the chain of states `31404`."""

import random
from typing import Any

from .base import VerifiedTask, check_range

MOVES = "abc"
# The typical error happens among the first moves, so that all that follows is wrong
EARLY = 2


class AutomatonTask(VerifiedTask):
    """
    States to follow through a walk: the answer is the chain of states after each move, and its last one counts.

    Of n states in a ring, move `a` goes one on, `b` mirrors (state s to n-1-s), and `c` mirrors and goes one on. Every
    move permutes the states, so that one wrong transition makes the final state wrong however well the rest is
    followed. The wrong answer has one wrong transition, anywhere; the typical error of [`demonstrations`] is to take
    the first `c` among the first two moves for a `b`.

    Relations: `reasoning_gym:self_reference` and `reasoning_gym:rotten_oranges` also need many steps, in English.

    Args:
        states (`int`, *optional*, defaults to `5`):
            Number of states.
        length (`int`, *optional*, defaults to `6`):
            Difficulty: the largest number of moves.
        min_length (`int`, *optional*):
            Fewest moves of a mixture: each problem draws its number of moves, which the column `difficulty` holds,
            between this and `length`. Unset, all have `length`.

    Raises:
        `ValueError`: if `states` is not in [3, 10], `length` not in [2, 20], or `min_length` not in [2, `length`].
    """

    name = "automaton"
    instruction = (
        "States 0 to {last} form a ring; from the state before the colon, make every move (a: one on; b: state s to "
        "{last}-s; c: b, then a) and write the state after each, without spaces, as in 2:abc={example}."
    )

    def __init__(self, states: int = 5, length: int = 6, min_length: int | None = None):
        check_range(self.name, "states", states, 3, 10)
        check_range(self.name, "length", length, 2, 20)
        if min_length is not None:
            check_range(self.name, "min_length", min_length, 2, length)
        self.states = states
        self.length = length
        self.min_length = min_length
        self.max_new_tokens = length + 1
        example = "".join(map(str, self.walk(2, "abc")))
        self.instruction = AutomatonTask.instruction.format(last=states - 1, example=example)

    def step(self, state: int, move: str) -> int:
        """State after one move."""
        if move == "a":
            return (state + 1) % self.states
        mirrored = self.states - 1 - state
        return mirrored if move == "b" else (mirrored + 1) % self.states

    def walk(self, state: int, moves: str) -> list[int]:
        """States after each of the moves."""
        chain = []
        for move in moves:
            state = self.step(state, move)
            chain.append(state)
        return chain

    def problem(self, rng: random.Random) -> dict[str, Any]:
        length = self.length if self.min_length is None else rng.randint(self.min_length, self.length)
        start = rng.randrange(self.states)
        moves = "".join(rng.choices(MOVES, k=length))
        chain = self.walk(start, moves)
        place = rng.randrange(length)
        slipped = rng.choice([state for state in range(self.states) if state != chain[place]])
        wrong = [*chain[:place], slipped, *self.walk(slipped, moves[place + 1 :])]
        return {
            "prompt": f"{start}:{moves}=",
            "answer": "".join(map(str, chain)),
            "wrong_answer": "".join(map(str, wrong)),
            "difficulty": length,
        }

    def typical_error(self, row: dict[str, Any], rng: random.Random) -> str:
        start, _, moves = row["prompt"].removesuffix("=").partition(":")
        misread = moves[:EARLY].replace("c", "b", 1) + moves[EARLY:]
        return "".join(map(str, self.walk(int(start), misread)))

    def score(self, text: str, answer: str) -> float:
        chain = text.strip()
        return float(chain.isdecimal() and chain[-1] == answer[-1])
