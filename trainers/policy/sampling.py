"""How the policy family samples completions on the transformers backend."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from typing import Any

import torch
from accelerate.logging import get_logger
from trl.extras.profiling import profiling_context
from trl.models import unwrap_model_for_generation

from ...models.observation import causal_lm
from ...samplers.decoding.rollout import Rollouts, sample_rollouts, supported
from ...samplers.decoding.stopping import StopStrings

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


def check_stop_strings(args: Any) -> None:
    """
    Check that the backend that samples knows the stop strings of the config `args`.

    Raises:
        `ValueError`: naming the setting.
    """
    found = (args.generation_kwargs or {}).get("stop_strings")
    if found and args.use_vllm:
        raise ValueError(
            f"`stop_strings` in `generation_kwargs` is not known to vLLM, whose name for it is `stop`: set "
            f"`generation_kwargs={{'stop': {found!r}}}`, or `use_vllm=False`."
        )
    if found and args.use_transformers_continuous_batching:
        raise ValueError(
            f"`stop_strings` in `generation_kwargs` has no effect with `use_transformers_continuous_batching`, got "
            f"{found!r}. Leave one of the two out."
        )


class Endings:
    """
    What ends a completion of a policy trainer: an end token of whatever sampled it, or a stop string.

    Settings of `generation_kwargs` count, also where TRL looks at the end tokens of the tokenizer and the model alone.

    Args:
        trainer ([`PolicyTrainer`]):
            Whose settings and model decide. Its `eos_token_ids` become the tokens that really end its completions.

    Attributes:
        stops ([`~papertrl.samplers.decoding.stopping.StopStrings`], *optional*):
            If there are stop strings.

    Raises:
        `ValueError`: if stop strings of the model's generation config do not reach the backend that samples.
    """

    def __init__(self, trainer: Any):
        given, model = trainer.args.generation_kwargs or {}, causal_lm(trainer.model)
        strings = model.generation_config.stop_strings
        if trainer.use_vllm:
            ends = [*trainer.eos_token_ids, *(given.get("stop_token_ids") or [])]
            unheard, strings = strings and "stop" not in given, given.get("stop")
        else:
            ends = trainer.generation_config.eos_token_id
            unheard = strings and trainer.use_transformers_continuous_batching
            strings = model._prepare_generation_config(trainer.generation_config)[0].stop_strings
        if unheard:
            remedy = "`generation_kwargs={'stop': [...]}`" if trainer.use_vllm else "`stop_strings=None` there"
            raise ValueError(
                f"`stop_strings` of the model's generation config, {model.generation_config.stop_strings!r}, do not "
                f"reach the backend that samples. Set {remedy}."
            )
        trainer.eos_token_ids = [ends] if isinstance(ends, int) else list(dict.fromkeys(ends or []))
        self._tokens = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
        self.stops = StopStrings(strings, trainer._tokenizer) if strings else None

    def finished(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[bool]:
        """Whether each completion came to its end, and was not cut off."""
        stopped = self.stops.ending(prompt_ids, completion_ids) if self.stops else [False] * len(completion_ids)
        return [stop or ids[-1] in self._tokens for ids, stop in zip(completion_ids, stopped, strict=True)]


@contextmanager
def tokenizer_for_generate(trainer: Any) -> Iterator[None]:
    """While active, the policy's `generate` has the tokenizer, without which it refuses stop strings."""
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    generate, replaced = model.generate, "generate" in vars(model)
    model.generate = partial(generate, tokenizer=trainer._tokenizer)
    try:
        yield
    finally:
        if replaced:
            model.generate = generate
        else:
            del model.generate
