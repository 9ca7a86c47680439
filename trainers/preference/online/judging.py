"""Scores of candidates: by reward functions and reward models, or by comparison in pairs."""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import apply_chat_template
from trl.trainer.utils import get_config_model_id

from ....models.loading import reward_model
from ....models.tokenization import template_options
from ....rewards import call_rewards
from ....rewards.checked import reward_name
from .candidates import Candidate, Completion, Group

Judge = Callable[[list, list, list], list[float]]
# Prompts with their candidates → scores
Scorer = Callable[[list[tuple[Group, Candidate]]], list[float]]


class RewardScorer:
    """
    Weighted sum of reward functions and reward models.

    Args:
        reward_funcs (`str`, `~transformers.PreTrainedModel`, `Callable`, or a list of these):
            As for [`~trl.GRPOTrainer`]: functions with TRL's signature, sequence classifiers with one label, or their
            ids or folders.
        weights (`list[float]`, *optional*):
            One per function. Defaults to 1 each.
        processing_classes (`~transformers.PreTrainedTokenizerBase` or a list, *optional*):
            Tokenizers of the reward models; loaded where unset.
        accelerator (`~accelerate.Accelerator`):
            Places the models.
        batch_size (`int`):
            Rows per forward of a model.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of the models' repositories may run.

    Raises:
        `ValueError`: if there are not as many `weights` or `processing_classes` as functions, or a model cannot be
            loaded.
    """

    def __init__(
        self,
        reward_funcs: Any,
        weights: list[float] | None,
        processing_classes: Any,
        accelerator: Accelerator,
        batch_size: int,
        trust_remote_code: bool = False,
    ):
        funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        tokenizers = processing_classes if isinstance(processing_classes, list) else [processing_classes] * len(funcs)
        self.weights = [1.0] * len(funcs) if weights is None else weights
        for name, given in (("online_reward_weights", self.weights), ("reward_processing_classes", tokenizers)):
            if len(given) != len(funcs):
                raise ValueError(f"`{name}` must have one entry per reward function ({len(funcs)}), got {len(given)}.")
        self.batch_size = batch_size
        self.names: list[str] = []
        # By the place among all of them
        self.models: dict[int, Scorer] = {}
        self.functions: dict[int, Callable] = {}
        self._logged: dict[str, list[float]] = defaultdict(list)
        for i, (func, tokenizer) in enumerate(zip(funcs, tokenizers, strict=True)):
            if isinstance(func, str):
                func = reward_model(func, trust_remote_code)
            if isinstance(func, nn.Module):
                name = get_config_model_id(func.config)
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
                self.names.append(name.rstrip("/").split("/")[-1])
                self.models[i] = self._model_scorer(accelerator.prepare_model(func, evaluation_mode=True), tokenizer)
            else:
                self.names.append(reward_name(func))
                self.functions[i] = func

    def _model_scorer(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Scorer:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        model.eval()

        @torch.no_grad()
        def score(members: list[tuple[Group, Candidate]]) -> list[float]:
            plain = isinstance(members[0][0].row["prompt"], str)
            if plain:
                # TRL's `RewardTrainer` ends each text so; one that was cut off did not end
                ends = {True: tokenizer.eos_token or "", False: ""}
                texts = [group.row["prompt"] + c.completion + ends[c.finished] for group, c in members]
            else:
                texts = [
                    apply_chat_template(
                        {"messages": group.row["prompt"] + c.completion}, tokenizer, **template_options(group.row)
                    )["text"]
                    for group, c in members
                ]
            scores = []
            for start in range(0, len(texts), self.batch_size):
                inputs = tokenizer(
                    texts[start : start + self.batch_size],
                    padding=True,
                    padding_side="right",
                    # A template writes the special tokens itself; added ones would double them
                    add_special_tokens=plain,
                    return_tensors="pt",
                ).to(model.device)
                scores += model(**inputs).logits[:, 0].float().tolist()
            return scores

        return score

    def __call__(self, groups: list[Group], trainer_state: Any) -> None:
        """
        Set `score` and `rewards` of every candidate; a NaN or `None` of one function leaves it out of the sum.

        What functions log of each candidate goes into its `logged`, what they log of all is for [`pop_logged`].
        """
        members = [(group, candidate) for group in groups for candidate in group.candidates]
        if not members:
            return
        outcomes = {i: score(members) for i, score in self.models.items()}
        if self.functions:
            given = call_rewards(
                list(self.functions.values()),
                [group.row["prompt"] for group, _ in members],
                [candidate.completion for _, candidate in members],
                [candidate.completion_ids for _, candidate in members],
                {name: [group.row[name] for group, _ in members] for name in members[0][0].row},
                trainer_state,
                log_extra=partial(_note, [candidate for _, candidate in members]),
                log_metric=lambda name, value: self._logged[name].append(float(value)),
            )
            outcomes |= dict(zip(self.functions, given, strict=True))
        for i, (_, candidate) in enumerate(members):
            given = [math.nan if (score := outcomes[k][i]) is None else float(score) for k in sorted(outcomes)]
            candidate.rewards = dict(zip(self.names, given, strict=True))
            counted = [w * r for w, r in zip(self.weights, given, strict=True) if not math.isnan(r)]
            candidate.score = sum(counted) if counted else math.nan

    def pop_logged(self) -> dict[str, float]:
        """Means of what functions logged since the last call, over all ranks, which all must call it."""
        logged: dict[str, list[float]] = defaultdict(list)
        for of_rank in gather_object([dict(self._logged)]):
            for name, values in of_rank.items():
                logged[name] += values
        self._logged.clear()
        return {name: fmean(values) for name, values in logged.items()}


def _note(candidates: list[Candidate], column: str, values: list) -> None:
    if len(values) != len(candidates):
        raise ValueError(
            f"`log_extra('{column}', ...)` was called with {len(values)} values for {len(candidates)} completions; it "
            "takes one for each."
        )
    for candidate, value in zip(candidates, values, strict=True):
        candidate.logged[column] = str(value)


def _function_scorer(func: Callable) -> Scorer:
    if inspect.iscoroutinefunction(func):
        return lambda _, inputs: asyncio.run(func(**inputs))
    return lambda _, inputs: func(**inputs)


def _load_reward_model(name: str) -> nn.Module:
    try:
        return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`reward_funcs`: reward model '{name}' cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error


def compare(
    judge: Judge, prompts: list[Completion], firsts: list[Completion], seconds: list[Completion]
) -> list[float]:
    """
    P(first ≻ second) of each pair, averaged over both orders so that a preference for a place cancels; ½ where both
    are the same, without asking.

    Args:
        judge (`Callable`):
            (prompts, firsts, seconds) → probabilities that the first is the better one.
        prompts, firsts, seconds (`list`):
            Texts or messages.

    Raises:
        `ValueError`: if the judge does not return one number in [0, 1] per pair.
    """
    # Of equal ones neither is better, and a judge that is asked may only err
    asked = [i for i, (first, second) in enumerate(zip(firsts, seconds, strict=True)) if first != second]
    wins = [0.5] * len(firsts)
    if asked:
        chosen = ([side[i] for i in asked] for side in (prompts, firsts, seconds))
        for i, probability in zip(asked, _compare_different(judge, *chosen), strict=True):
            wins[i] = probability
    return wins


def _compare_different(judge: Judge, prompts: list, firsts: list, seconds: list) -> list[float]:
    outcomes = []
    for order in ((firsts, seconds), (seconds, firsts)):
        probabilities = [float(p) for p in judge(prompts, *order)]
        if len(probabilities) != len(prompts) or not all(0 <= p <= 1 for p in probabilities):
            raise ValueError(
                f"`judge` must return a probability in [0, 1] for each of {len(prompts)} pairs, got "
                f"{len(probabilities)} values, the first of which are {probabilities[:3]}."
            )
        outcomes.append(probabilities)
    return [(forward + 1 - backward) / 2 for forward, backward in zip(*outcomes, strict=True)]
