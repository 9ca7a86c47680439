"""Rows of all ranks between sampling and training: what is repaired, filtered and refilled."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .record import Generation, ScoredBatch, Source

# Fields of a scored batch that belong to single rows and move with them
_PER_ROW = ("rewards", "raw_rewards", "prompt_indices", "lengths", "truncated", "source", "off_prompt")


@dataclass
class Draft:
    """
    All rows of all ranks of one round of generation, in rank order; the same on every rank.

    Args:
        rows (`list[dict]`):
            One dictionary per row, as [`Generation.rows`] gives it.
        scored ([`ScoredBatch`]):
            What was scored of them.
    """

    rows: list[dict[str, Any]]
    scored: ScoredBatch

    @cached_property
    def _group_of_place(self) -> list[int]:
        return self.scored.group_ids.tolist()

    def places(self, group: int) -> list[int]:
        """Places of a group's rows."""
        return [place for place, of in enumerate(self._group_of_place) if of == group]

    def take(self, place: int, other: "Draft", index: int, scored_under: list[int] | None = None) -> None:
        """
        Put row `index` of `other` at `place`.

        Args:
            place (`int`):
                Row that is replaced.
            other ([`Draft`]), index (`int`):
                What [`~PolicyTrainer.reroll`] gave, and which of its rows.
            scored_under (`list[int]`, *optional*):
                Tokens of the prompt under which the completion is scored, if not the one it was sampled under.
        """
        row = dict(other.rows[index])
        if scored_under is not None:
            row |= {"sampled_prompt_ids": row["prompt_ids"], "prompt_ids": scored_under}
            row["prompts"] = self.rows[place]["prompts"]
        self.rows[place] = row
        for name in set(_PER_ROW) - {"prompt_indices"}:
            getattr(self.scored, name)[place] = getattr(other.scored, name)[index]
        self.scored.source[place] = Source.HINTED
        self.scored.off_prompt[place] = scored_under is not None

    def demonstrate(self, place: int, completion: Any, completion_ids: list[int], truncated: bool) -> None:
        """
        Put a demonstration at `place`, under the prompt of the row that stood there. Its rewards are NaN.

        Args:
            place (`int`):
                Row that is replaced.
            completion (`str` or `list[dict]`):
                The demonstration as text or messages.
            completion_ids (`list[int]`):
                Its tokens, the end token included.
            truncated (`bool`):
                Whether it was cut, so that the end token is missing.
        """
        row = self.rows[place] | {"completion_ids": completion_ids, "completions": completion}
        if "tool_mask" in row:
            row["tool_mask"] = [1] * len(completion_ids)
        if "sampling_logps" in row:
            # TRL reads `None` as not known and corrects nothing there
            row["sampling_logps"] = [None] * len(completion_ids)
        self.rows[place] = row
        scored = self.scored
        scored.rewards[place] = scored.raw_rewards[place] = torch.nan
        scored.lengths[place], scored.truncated[place] = len(completion_ids), truncated
        scored.source[place], scored.off_prompt[place] = Source.DEMONSTRATION, False


class Pool:
    """Whole groups of rows, with what was scored of them."""

    def __init__(self):
        self.rows: list[list[dict[str, Any]]] = []
        self.scores: list[dict[str, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: list[dict[str, Any]], scored: ScoredBatch, group: int, size: int) -> None:
        """Add one group of `size` adjacent rows."""
        part = slice(group * size, (group + 1) * size)
        self.rows.append(rows[part])
        self.scores.append({name: getattr(scored, name)[part] for name in _PER_ROW})

    def assemble(self, spare: "Pool", total: int, size: int, rank: int, world: int, like: ScoredBatch):
        """The first `total` groups, filled up from `spare`, as this rank's generation and the scored batch."""
        filled = min(len(self), total)
        rows = [row for group in (self.rows[:filled] + spare.rows)[:total] for row in group]
        scores = (self.scores[:filled] + spare.scores)[:total]
        device, local = like.rewards.device, total * size // world
        group_ids = torch.arange(total * size, device=device) // size
        scored = ScoredBatch(
            source_names=like.source_names,
            group_ids=group_ids,
            usable=group_ids < filled,
            local=slice(rank * local, (rank + 1) * local),
            sampled_rewards=like.sampled_rewards,
            **{name: torch.cat([score[name] for score in scores]) for name in _PER_ROW},
        )
        return Generation.from_rows(rows[scored.local]), scored
