"""Which completions end by a stop string, and where."""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase, StopStringCriteria


class StopStrings:
    """
    Stop strings of completions that are there already, by the criterion with which `generate` stops.

    A string may begin in the prompt, and anything may follow it within its last token.

    Args:
        strings (`str` or `list[str]`):
            Any of them ends a completion.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            That of the completions.
    """

    def __init__(self, strings: str | list[str], tokenizer: PreTrainedTokenizerBase):
        self._criterion = StopStringCriteria(tokenizer, strings)
        self._width = self._criterion.maximum_token_len
        # An entry of the criterion that matches nothing
        self._filler = self._criterion.embedding_vec.shape[0] - 1

    def ending(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[bool]:
        """Whether each completion's last token is the last of a stop string."""
        tails = [self._tail(prompt, completion) for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        return self._criterion(torch.stack(tails), None).tolist() if tails else []

    def cut(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[list[int]]:
        """Completions up to the token that ends the first stop string; all of it where there is none."""
        return [
            completion[: self._end(prompt, completion)]
            for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]

    def _end(self, prompt: list[int], completion: list[int]) -> int:
        before = self._tail(prompt, [])[1:]
        windows = torch.cat([before, torch.tensor(completion, dtype=torch.long)]).unfold(0, self._width, 1)
        ends = self._criterion(windows, None).nonzero()
        return int(ends[0]) + 1 if len(ends) else len(completion)

    def _tail(self, prompt: list[int], completion: list[int]) -> Tensor:
        ids = torch.tensor((prompt + completion)[-self._width :], dtype=torch.long)
        return pad(ids, (self._width - len(ids), 0), value=self._filler)
