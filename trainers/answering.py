"""Answers of the model that is being trained, for measuring it: greedy, otherwise as training samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.distributed import DistributedBackend
from trl.models.utils import unwrap_model_for_generation

from ..evaluation.sampling import answer_config, generate
from ..models.tokenization import end_tokens, template_options, tokenize_prompt


class AnswersPrompts:
    """Mixin of trainers whose training does not sample answers, or in a way of its own: `answer`."""

    _tokenizer: PreTrainedTokenizerBase

    @contextmanager
    def unwrapped_policy(self) -> Iterator[nn.Module]:
        """Yield the unwrapped policy, ready to generate."""
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            DistributedBackend(self.accelerator).summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    def answer(self, rows: list[dict[str, Any]], max_tokens: int) -> list[list[int]]:
        """
        Greedy completions of prompts by the model as it is now, in its present mode; nothing is logged or counted.

        Must be called on every rank, with equally many rows.

        Args:
            rows (`list[dict]`):
                Dataset rows with `prompt`, text or messages, and what the chat template reads.
            max_tokens (`int`):
                Longest completion.

        Returns:
            `list[list[int]]`: tokens of the completions, the end token included.
        """
        prompt_ids = [tokenize_prompt(self._tokenizer, row["prompt"], template_options(row)) for row in rows]
        with self.unwrapped_policy() as model, self.accelerator.autocast():
            ends = end_tokens(self._tokenizer, model.generation_config)
            return generate(model, self._tokenizer, prompt_ids, answer_config(self._tokenizer, ends, max_tokens))
