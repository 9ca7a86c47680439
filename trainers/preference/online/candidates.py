"""What the online loop passes on: prompts with candidate completions, and pairs of them."""

import math
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from datasets import Dataset

Completion = str | list[dict[str, Any]]
# Columns of a round's pairs that are not a method's
PAIR_COLUMNS = (
    "prompt",
    "chosen",
    "rejected",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "chosen_score",
    "rejected_score",
    "chosen_source",
    "rejected_source",
    "row",
    "iteration",
)


@dataclass
class Candidate:
    """
    A completion.

    Args:
        completion (`str` or `list[dict]`):
            Text, or messages where the prompt is messages; without special tokens.
        completion_ids (`list[int]`):
            Its tokens, with the end-of-sequence token if it ended.
        finished (`bool`):
            Whether it ended before the longest length.
        source (`str`):
            Who wrote it: `"policy"`, `"reference"`, `"dataset"` or a method's word for it.
        score (`float`):
            How good it is; NaN where nobody could say.
        rewards (`dict[str, float]`):
            What each reward function gave.
        logged (`dict[str, str]`):
            What reward functions noted of it, by `log_extra`.
        extras (`dict`):
            For the method that made it.
    """

    completion: Completion
    completion_ids: list[int]
    finished: bool
    source: str = "policy"
    score: float = math.nan
    rewards: dict[str, float] = field(default_factory=dict)
    logged: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class Group:
    """
    A prompt and its candidates.

    Args:
        row (`dict`):
            Row of the training dataset.
        index (`int`):
            Its number.
        prompt_ids (`list[int]`):
            Tokens of its prompt, as the policy sees it.
        candidates (`list[Candidate]`):
            Completions, in the order in which they were proposed.
    """

    row: dict[str, Any]
    index: int
    prompt_ids: list[int]
    candidates: list[Candidate] = field(default_factory=list)

    def scored(self) -> list[Candidate]:
        """Candidates whose score is a number."""
        return [candidate for candidate in self.candidates if not math.isnan(candidate.score)]


@dataclass
class Pair:
    """
    Two completions of a prompt, one preferred.

    Args:
        group ([`Group`]):
            The prompt.
        chosen ([`Candidate`]), rejected ([`Candidate`]):
            The completions.
        extras (`dict`):
            Columns of a method; the same names in all pairs of a round.
    """

    group: Group
    chosen: Candidate
    rejected: Candidate
    extras: dict[str, Any] = field(default_factory=dict)


def best_against_worst(groups: list[Group]) -> list[Pair]:
    """Best and worst candidate of each group, the first of equals; none where all scores are equal or NaN."""
    pairs = []
    for group in groups:
        scored = group.scored()
        if scored:
            best = max(scored, key=lambda candidate: candidate.score)
            worst = min(scored, key=lambda candidate: candidate.score)
            if best.score > worst.score:
                pairs.append(Pair(group, best, worst))
    return pairs


def pairs_dataset(pairs: list[Pair], iteration: int) -> Dataset:
    """
    The pairs as rows.

    Raises:
        `ValueError`: if their `extras` have different names, or a name that a column has already.
    """
    names = pairs[0].extras.keys()
    for pair in pairs:
        if pair.extras.keys() != names or names & set(PAIR_COLUMNS):
            raise ValueError(
                f"`extras` of pairs must have the same names in all of them, and none of {list(PAIR_COLUMNS)}; got "
                f"{sorted(pair.extras)} beside {sorted(names)}."
            )
    return Dataset.from_list(
        [
            {
                "prompt": pair.group.row["prompt"],
                "chosen": pair.chosen.completion,
                "rejected": pair.rejected.completion,
                "prompt_ids": pair.group.prompt_ids,
                "chosen_ids": pair.chosen.completion_ids,
                "rejected_ids": pair.rejected.completion_ids,
                "chosen_score": pair.chosen.score,
                "rejected_score": pair.rejected.score,
                "chosen_source": pair.chosen.source,
                "rejected_source": pair.rejected.source,
                "row": pair.group.index,
                "iteration": iteration,
                **pair.extras,
            }
            for pair in pairs
        ]
    )


def candidates_table(groups: list[Group], iteration: int) -> pa.Table:
    """The groups as rows, one list per property of their candidates."""
    rewards = sorted({name for group in groups for candidate in group.candidates for name in candidate.rewards})
    logged = sorted({name for group in groups for candidate in group.candidates for name in candidate.logged})
    rows = []
    for group in groups:
        rows.append(
            {
                "prompt": group.row["prompt"],
                "completions": [candidate.completion for candidate in group.candidates],
                "scores": [candidate.score for candidate in group.candidates],
                "sources": [candidate.source for candidate in group.candidates],
                "finished": [candidate.finished for candidate in group.candidates],
                "lengths": [len(candidate.completion_ids) for candidate in group.candidates],
                "row": group.index,
                "iteration": iteration,
            }
            | {
                f"reward_{name}": [candidate.rewards.get(name, math.nan) for candidate in group.candidates]
                for name in rewards
            }
            | {f"extra_{name}": [candidate.logged.get(name) for candidate in group.candidates] for name in logged}
        )
    return pa.Table.from_pylist(rows)
