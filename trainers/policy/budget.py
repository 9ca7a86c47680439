"""Micro-batches by the tokens that they compute, for memory that does not depend on how long the rows are."""

import torch
from accelerate.logging import get_logger

from .record import RolloutRecord, ends, rounded

logger = get_logger(__name__)


class PassTokens:
    """
    How many tokens a pass over rows of a batch computes.

    With shared prompts, each distinct prompt once and the completions up to their last scored token. Otherwise every
    row at the width of the prompts and the longest completion, as [`RolloutRecord.trimmed`] leaves them.

    Args:
        record ([`RolloutRecord`]):
            The rows.
        shared (`bool`):
            Whether prompts are shared.
        multiple_of (`int`, *optional*):
            What completions are padded to.
    """

    def __init__(self, record: RolloutRecord, shared: bool, multiple_of: int | None = None):
        self.width = None if shared else record.prompt_ids.shape[1]
        self.multiple_of = multiple_of
        prompts = record.prompt_ids.masked_fill(record.prompt_mask == 0, -1)
        self.prompts = torch.unique(prompts, dim=0, return_inverse=True)[1].tolist()
        self.prompt_lengths = record.prompt_mask.sum(1).tolist()
        self.lengths = ends(record.loss_mask if shared else record.completion_mask).tolist()

    def __call__(self, rows: list[int]) -> int:
        """Tokens of a pass over the rows of these numbers, at least one."""
        if self.width is not None:
            return len(rows) * (self.width + rounded(max(self.lengths[row] for row in rows), self.multiple_of))
        prompts = {self.prompts[row]: self.prompt_lengths[row] for row in rows}
        return sum(prompts.values()) + sum(self.lengths[row] for row in rows)


class TokenBudget:
    """
    Cuts the rows of an optimizer step into passes of at most so many tokens.

    Whole groups, the longest first, go into a pass while they fit. A group that no pass can hold is cut by rows, and a
    row that no pass can hold has one to itself.

    Args:
        limit (`int`):
            Most tokens of a pass.
        slots (`int`):
            Micro-batches of the training loop that the passes of an optimizer step are spread over.
    """

    def __init__(self, limit: int, slots: int):
        self.limit = limit
        self.slots = slots
        self._warned = False

    def cut(self, rows: list[int], group_ids: list[int], tokens: PassTokens) -> list[list[int]]:
        """
        Row numbers of each pass, as few as that makes.

        Args:
            rows (`list[int]`):
                Rows of one optimizer step.
            group_ids (`list[int]`):
                Group of each row of the batch.
            tokens ([`PassTokens`]):
                Of the batch.
        """
        groups: dict[int, list[int]] = {}
        for row in sorted(rows, key=lambda row: -tokens.lengths[row]):
            groups.setdefault(group_ids[row], []).append(row)
        passes: list[list[int]] = []
        for group in groups.values():
            for part in [group] if tokens(group) <= self.limit else [[row] for row in group]:
                if passes and tokens(passes[-1] + part) <= self.limit:
                    passes[-1] += part
                else:
                    passes.append(list(part))
        self._warn_of_long_rows(max(map(tokens, passes), default=0))
        return passes

    def _warn_of_long_rows(self, largest: int) -> None:
        if largest > self.limit and not self._warned:
            self._warned = True
            logger.warning(
                f"A row of {largest} tokens is longer than `max_tokens_per_micro_batch`={self.limit}: it is computed "
                "by itself, and takes the memory that it takes. Shorten `max_completion_length` for a firm bound.",
                main_process_only=False,
            )

    def spread(
        self, passes: list[list[int]], count: int, group_ids: list[int], tokens: PassTokens
    ) -> list[list[list[int]]]:
        """
        The passes of each slot, `count` in all: the largest are cut further, and empty ones fill up.

        Args:
            passes (`list[list[int]]`):
                From [`cut`].
            count (`int`):
                At least as many as there are passes, and slots.
            group_ids, tokens:
                As in [`cut`].
        """
        passes = list(passes)
        while len(passes) < count:
            place = max(range(len(passes)), key=lambda i: (len(passes[i]) > 1, tokens(passes[i])), default=None)
            if place is None or len(passes[place]) == 1:
                passes += [[]] * (count - len(passes))
                break
            rows = passes[place]
            starts = range(1, len(rows))
            between = [i for i in starts if group_ids[rows[i]] != group_ids[rows[i - 1]]]
            half = min(between or starts, key=lambda i: max(tokens(rows[:i]), tokens(rows[i:])))
            passes[place : place + 1] = [rows[:half], rows[half:]]
        return [passes[i * count // self.slots : (i + 1) * count // self.slots] for i in range(self.slots)]


def take_passes(record: RolloutRecord, passes: list[list[int]], spare: int) -> RolloutRecord:
    """The rows of `passes` with the number of their pass; an empty one gets the row `spare`, without its effect."""
    rows = [(row, number, bool(part)) for number, part in enumerate(passes) for row in part or [spare]]
    numbers, pass_ids, kept = torch.tensor(rows, device=record.completion_ids.device).unbind(1)
    taken = record.take(numbers)
    taken.pass_ids = pass_ids
    taken.loss_mask = taken.loss_mask * kept.unsqueeze(1)
    taken.row_weight = taken.row_weight * kept
    return taken
