"""What is measured of a model on held-out data: prompts that it answers, or pairs that it ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import apply_chat_template
from trl.models import unwrap_model_for_generation

BATCH_SIZE = 64
PAIRS_MEASURE = "pair_accuracy"


@dataclass
class Answers:
    """
    A model's greedy answers to the held-out prompts, the same on every rank.

    Args:
        texts (`list[str]`):
            Completions without special tokens.
        scores (`list[float]`):
            What the judges gave each, averaged over the judges that apply.
        lengths (`list[int]`):
            Tokens of each text.
    """

    texts: list[str]
    scores: list[float]
    lengths: list[int]

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)

    @property
    def how(self) -> str:
        """How it was measured, and on how much."""
        return f"greedy, {len(self.scores)} prompts"

    @property
    def mean_length(self) -> float:
        """Mean number of tokens."""
        return sum(self.lengths) / len(self.lengths)


@dataclass(frozen=True)
class Ranking:
    """
    How a model that scores ranks the held-out pairs, the same on every rank.

    Args:
        mean (`float`):
            Share of pairs whose chosen completion scores higher, by TRL's evaluation.
        pairs (`int`):
            How many there are.
    """

    mean: float
    pairs: int
    # It writes nothing
    mean_length: ClassVar[None] = None

    @property
    def how(self) -> str:
        """How it was measured, and on how much."""
        return f"{self.pairs} pairs"


class HeldOutPairs:
    """Ranks the evaluation pairs by the scores of a trainer's model; in training, TRL's `eval_strategy` does."""

    def __init__(self):
        self.trainer = None

    def look(self) -> Ranking:
        """Let the trainer's current model score the pairs."""
        # A loader draws a random number; looking must not change the run
        with torch.random.fork_rng(devices=[]):
            accuracy = self.trainer.evaluate()["eval_accuracy"]
        return Ranking(accuracy, len(self.trainer.eval_dataset))


class HeldOut(TrainerCallback):
    """
    Answers the held-out prompts during training and logs the mean score as `held_out/<measure>`.

    Greedy decoding draws no random numbers, so that looking does not change the run.

    Args:
        problems (`Dataset`):
            Column `prompt`, text or messages, and whatever the judges read.
        judges (`list` of `Callable`):
            Reward functions.
        measure (`str`):
            What the mean score is called.
        max_new_tokens (`int`):
            Longest answer.
        evaluations (`int`):
            How often to look during training, evenly spread; the last step included.
    """

    def __init__(self, problems: Dataset, judges: list[Callable], measure: str, max_new_tokens: int, evaluations: int):
        self.problems = problems
        self.judges = judges
        self.measure = measure
        self.max_new_tokens = max_new_tokens
        self.evaluations = evaluations
        self.trainer = None

    def on_step_end(self, args, state, control, **kwargs):
        if not self.evaluations:
            return
        every = max(1, state.max_steps // self.evaluations)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            self.trainer.log_metric(f"held_out/{self.measure}", self.look().mean)
            control.should_log = True

    def look(self) -> Answers:
        """Let the trainer's current model answer; every rank takes an equal share of the prompts."""
        accelerator = self.trainer.accelerator
        rank, ranks = accelerator.process_index, accelerator.num_processes
        # Every rank generates as often as the others, which sharded models need
        share = -(-len(self.problems) // ranks)
        rows = [(rank * share + i) % len(self.problems) for i in range(share)]
        was_training = self.trainer.model.training
        with unwrap_model_for_generation(self.trainer.model_wrapped, accelerator) as model:
            model.eval()
            texts = [
                text
                for start in range(0, share, BATCH_SIZE)
                for text in self._generate(model, self.problems.select(rows[start : start + BATCH_SIZE])["prompt"])
            ]
            model.train(was_training)
        texts = gather_object(texts)[: len(self.problems)]
        ids = [self.trainer.processing_class(text, add_special_tokens=False)["input_ids"] for text in texts]
        return Answers(texts, self._judge(texts, ids), [len(tokens) for tokens in ids])

    @torch.no_grad()
    def _generate(self, model: Any, prompts: list) -> list[str]:
        tokenizer: PreTrainedTokenizerBase = self.trainer.processing_class
        texts = [p if isinstance(p, str) else apply_chat_template({"prompt": p}, tokenizer)["prompt"] for p in prompts]
        special = isinstance(prompts[0], str)
        inputs = tokenizer(
            texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=special
        ).to(model.device)
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _judge(self, texts: list[str], ids: list[list[int]]) -> list[float]:
        prompts = list(self.problems["prompt"])
        plain = isinstance(prompts[0], str)
        completions = texts if plain else [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: list(self.problems[name]) for name in self.problems.column_names if name != "prompt"}
        rows = zip(
            *(judge(prompts=prompts, completions=completions, completion_ids=ids, **columns) for judge in self.judges),
            strict=True,
        )
        applying = [[score for score in row if score is not None] for row in rows]
        return [sum(scores) / len(scores) if scores else 0.0 for scores in applying]
