"""How the policy family samples completions on the transformers backend."""

from itertools import groupby
from typing import Any

import torch
from accelerate.logging import get_logger
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ...samplers.decoding.rollout import Rollouts, sample_rollouts, supported

logger = get_logger(__name__)


def fast_rollouts(trainer: Any, prompt_ids: list[list[int]]) -> Rollouts | None:
    """
    Completions by [`~papertrl.samplers.decoding.rollout.sample_rollouts`] in place of `generate`.

    Where the model is not supported, says why, turns `fast_rollouts` off and returns `None`.

    Args:
        trainer ([`PolicyTrainer`]):
            Whose policy samples, under its [`logits_processors`].
        prompt_ids (`list[list[int]]`):
            Tokens of each row's prompt; equal ones stand together.
    """
    # The contexts in which TRL calls `generate`
    with (
        profiling_context(trainer, "papertrl.sample_rollouts"),
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        torch.no_grad(),
        # Around the whole loop, so that the weights are cast once and not at every token
        trainer.accelerator.autocast(),
        trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False),
    ):
        reason = "the model is multimodal" if trainer._is_vlm else supported(model, trainer.generation_config)
        if reason is None:
            groups = [(ids, len(list(rows))) for ids, rows in groupby(prompt_ids)]
            return sample_rollouts(
                model,
                [ids for ids, _ in groups],
                [count for _, count in groups],
                trainer.generation_config,
                processors=trainer.logits_processors(),
                tokenizer=trainer._tokenizer,
            )
    trainer.args.fast_rollouts = False
    logger.warning(f"Completions are sampled by `generate`, as in TRL: {reason}.")
    return None
