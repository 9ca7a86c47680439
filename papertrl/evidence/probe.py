"""What is measured of a model during a claim's runs."""

from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..evaluation.sampling import answer_config, completion_logps
from ..models.tokenization import end_tokens
from ..rewards import call_rewards
from ..samplers.decoding.rollout import sample_rollouts
from ..tasks import Task

# Draws of the probe: fixed, so that all arms of a seed are measured with the same ones
SEED = 20_240_607


@dataclass
class Probe:
    """
    A model at one point of a run, and what a measure needs to look at it. Looking does not change the run: random
    draws come from a generator of their own, and dropout is off.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model in training.
        start_model ([`~transformers.PreTrainedModel`]):
            What it started from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both.
        task ([`~papertrl.tasks.Task`]):
            Task.
        problems (`Dataset`):
            Held-out problems.
        max_new_tokens (`int`):
            Longest completion.
    """

    model: PreTrainedModel
    start_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    problems: Dataset
    max_new_tokens: int
    _samples: dict = field(default_factory=dict)

    def completions(self, temperature: float = 1.0, samples: int = 1, model: PreTrainedModel | None = None):
        """
        Completions of every held-out prompt, as token ids including the end-of-sequence token; cached.

        Args:
            temperature (`float`):
                0 for greedy decoding.
            samples (`int`):
                Completions per prompt.
            model (`PreTrainedModel`, *optional*):
                Defaults to the model in training.

        Returns:
            `list[list[int]]`: in the order of the prompts, those of one prompt together.
        """
        model = model or self.model
        key = (temperature, samples, id(model))
        if key not in self._samples:
            ends = end_tokens(self.tokenizer, model.generation_config)
            config = answer_config(self.tokenizer, ends, self.max_new_tokens, temperature)
            with torch.random.fork_rng():
                torch.manual_seed(SEED)
                counts = [samples] * len(self.problems)
                rollouts = sample_rollouts(model, self.prompt_ids, counts, config, tokenizer=self.tokenizer)
            self._samples[key] = rollouts.completion_ids
        return self._samples[key]

    def texts(self, temperature: float = 1.0, samples: int = 1) -> list[str]:
        """[`Probe.completions`] as text, without special tokens."""
        return self.tokenizer.batch_decode(self.completions(temperature, samples), skip_special_tokens=True)

    def scores(self, temperature: float = 1.0, samples: int = 1, reward=None) -> list[float]:
        """What the task's verifier, or `reward`, gives to each of [`Probe.texts`]."""
        rows = [row for row in range(len(self.problems)) for _ in range(samples)]
        columns = {name: [self.problems[name][i] for i in rows] for name in self.problems.column_names}
        prompts = columns.pop("prompt")
        ids = self.completions(temperature, samples)
        texts = self.texts(temperature, samples)
        return call_rewards([reward or self.task.reward], prompts, texts, ids, columns, TrainerState())[0]

    @cached_property
    def prompt_ids(self) -> list[list[int]]:
        """Tokens of the held-out prompts."""
        return self.tokenizer(list(self.problems["prompt"]))["input_ids"]

    def logps(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], model: PreTrainedModel | None = None
    ):
        """
        Log-probability of each completion's tokens, in nats.

        Returns:
            `torch.Tensor` of shape `(rows, time)`: 0 on padding.
        """
        rows = completion_logps(model or self.model, prompt_ids, completion_ids)
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


# --- Measures that several claims share ---------------------------------------------------------------------------


def greedy_accuracy(probe: Probe) -> dict[str, float]:
    """`accuracy`: mean verdict of the task on greedy completions."""
    return {"accuracy": fmean(probe.scores(temperature=0.0))}


def sampled_accuracy(probe: Probe) -> dict[str, float]:
    """`sampled_accuracy` and `length`: mean verdict and tokens of four completions a prompt, at temperature 1."""
    lengths = map(len, probe.completions(samples=4))
    return {"sampled_accuracy": fmean(probe.scores(samples=4)), "length": fmean(lengths)}


def kl_to_start(probe: Probe) -> dict[str, float]:
    """`kl`: KL(model ‖ start) in nats per sequence, the mean log-ratio of four samples of the model per prompt."""
    completions = probe.completions(samples=4)
    prompts = [ids for ids in probe.prompt_ids for _ in range(4)]
    ratio = probe.logps(prompts, completions) - probe.logps(prompts, completions, probe.start_model)
    return {"kl": ratio.sum(1).mean().item()}


def sampled_entropy(probe: Probe) -> dict[str, float]:
    """
    `sampled_entropy`: nats per token, the mean negative log-probability of four samples per prompt.

    The logged `entropy` covers only rows that enter the loss, which differ among arms.
    """
    completions = probe.completions(samples=4)
    prompts = [ids for ids in probe.prompt_ids for _ in range(4)]
    total = probe.logps(prompts, completions).sum().item()
    return {"sampled_entropy": -total / sum(map(len, completions))}
