"""How the policy family samples completions on the transformers backend."""

from itertools import groupby

import torch
from accelerate.logging import get_logger
from transformers import LogitsProcessorList
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ...samplers.decoding.rollout import sample_rollouts, supported
from .batching import PolicyBatching

logger = get_logger(__name__)


class PolicyRollout(PolicyBatching):
    """Completions by [`~papertrl.samplers.decoding.rollout.sample_rollouts`] where it stands in for `generate`."""

    def logits_processors(self) -> LogitsProcessorList:
        """
        Stage *roll out*: what changes the next-token logits of completions before temperature and filters.

        Each treats a row by its tokens and logits alone. Append to `super().logits_processors()`.
        """
        return LogitsProcessorList([p for component in self.slots for p in component.logits_processors()])

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if not self.args.fast_rollouts or self.use_vllm or self.use_transformers_continuous_batching:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        # The contexts in which TRL calls `generate`
        with (
            profiling_context(self, "papertrl.sample_rollouts"),
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                generation_kwargs=self.generation_kwargs,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            torch.no_grad(),
            # Around the whole loop, so that the weights are cast once and not at every token
            self.accelerator.autocast(),
            self._dist.summon_full_params(self.model_wrapped, recurse=False),
        ):
            reason = "the model is multimodal" if self._is_vlm else supported(model, self.generation_config)
            if reason is None:
                groups = [(ids, len(list(rows))) for ids, rows in groupby(prompt_ids)]
                rollouts = sample_rollouts(
                    model,
                    [ids for ids, _ in groups],
                    [count for _, count in groups],
                    self.generation_config,
                    processors=self.logits_processors(),
                    tokenizer=self._tokenizer,
                )
                return rollouts.completion_ids, rollouts.logprobs
        self.args.fast_rollouts = False
        logger.warning(f"Completions are sampled by `generate`, as in TRL: {reason}.")
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, has_tool_images)
