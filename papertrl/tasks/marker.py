"""Short free-form completions with a known true reward and a proxy that overvalues length."""

import random
import string
from collections.abc import Callable
from typing import Any

from datasets import Dataset

from ..rewards.matching import Completion, completion_text
from .base import ProceduralTask, check_choice, check_range

PROMPT_LETTERS = 4


class MarkerTask(ProceduralTask):
    """
    Letters to write that contain the prompt's first letter right before its last: the marker `cb` of `cdab:`.

    The true reward is 1 for the marker, less `cost` for every letter beyond `free_length`. The proxy adds `proxy_bias`
    for every letter: where that exceeds `cost`, training on it ends with completions as long as they may be, and the
    true reward falls while the proxy rises.

    [`demonstrations`] have random lengths and letters and lack the marker in a share of `error_share`. A prompt with
    feedback goes on with an earlier completion and what its reader missed, the `marker` or more letters, as in
    `cdab:bcd marker:`. Who answers it gets a higher reward.

    Args:
        letters (`int`, *optional*, defaults to `8`):
            Difficulty: size of the alphabet, which starts with `a`.
        max_length (`int`, *optional*, defaults to `12`):
            Longest completion of the start policy and of the pairs.
        free_length (`int`, *optional*, defaults to `4`):
            Letters that cost nothing.
        cost (`float`, *optional*, defaults to `0.05`):
            What the true reward loses for each further letter.
        proxy_bias (`float`, *optional*, defaults to `0.1`):
            What the proxy reward gives for each letter.
        train_on (`str`, *optional*, defaults to `"true"`):
            Which of the two [`reward`] is, and by which preference pairs are labeled: `"true"` or `"proxy"`.
        label_noise (`float`, *optional*, defaults to `0.0`):
            Share of the preference pairs in which the worse completion is the chosen one.
        longer_share (`float`, *optional*):
            Share of the preference pairs in which the chosen completion is the longer one; unset, as it falls.
        covered (`int`, *optional*):
            If set, the completions of preference pairs only start with one of the alphabet's first so many letters,
            as offline data cover only part of what a policy can say.
        feedback_share (`float`, *optional*, defaults to `0.0`):
            Share of the demonstrations that stand under a prompt with feedback. If above 0, prompts for the online
            loop have the column `feedback`, about the rejected completion.

    Raises:
        `ValueError`: if `letters` is not in [4, 12], `max_length` not in [6, 20], `free_length` not in [3,
            `max_length`], `cost`, `proxy_bias`, `label_noise`, `longer_share` or `feedback_share` not in [0, 1],
            `covered` not in [1, `letters`], or `train_on` unknown.
    """

    name = "marker"
    measure = "score"
    instruction = (
        "Write a short word of the letters a to {last} that contains the prompt's first letter immediately followed "
        "by its last letter, and nothing else, as in cdab:acba."
    )

    def __init__(
        self,
        letters: int = 8,
        max_length: int = 12,
        free_length: int = 4,
        cost: float = 0.05,
        proxy_bias: float = 0.1,
        train_on: str = "true",
        label_noise: float = 0.0,
        longer_share: float | None = None,
        covered: int | None = None,
        feedback_share: float = 0.0,
    ):
        check_range(self.name, "letters", letters, 4, 12)
        check_range(self.name, "max_length", max_length, 6, 20)
        check_range(self.name, "free_length", free_length, 3, max_length)
        shares = {"cost": cost, "proxy_bias": proxy_bias, "label_noise": label_noise}
        shares["feedback_share"] = feedback_share
        for field, value in shares.items():
            check_range(self.name, field, value, 0, 1, float)
        check_choice(self.name, "train_on", train_on, ("true", "proxy"))
        if longer_share is not None:
            check_range(self.name, "longer_share", longer_share, 0, 1, float)
        if covered is not None:
            check_range(self.name, "covered", covered, 1, letters)
        self.alphabet = string.ascii_lowercase[:letters]
        self.max_length = max_length
        self.free_length = free_length
        self.cost = cost
        self.proxy_bias = proxy_bias
        self.train_on = train_on
        self.label_noise = label_noise
        self.longer_share = longer_share
        self.covered = self.alphabet[:covered]
        self.feedback_share = feedback_share
        self.max_new_tokens = max_length + 1
        self.instruction = MarkerTask.instruction.format(last=self.alphabet[-1])

    def problem(self, rng: random.Random) -> dict[str, Any]:
        prompt = "".join(rng.choices(self.alphabet, k=PROMPT_LETTERS)) + ":"
        answer = self._write(prompt, rng, True, self.free_length)
        return {"prompt": prompt, "answer": answer, "wrong_answer": self._write(prompt, rng, False, len(answer))}

    def demonstrate(self, row: dict[str, Any], rng: random.Random, error_share: float) -> str:
        return self._write(row["prompt"], rng, rng.random() >= error_share, self.max_length)

    def demonstrations(self, n: int, seed: int, error_share: float) -> Dataset:
        examples = super().demonstrations(n, seed, error_share)
        if self.feedback_share == 0:
            return examples
        rng = random.Random(f"{seed}-feedback")
        return Dataset.from_list(
            [
                self._after_feedback(row["prompt"], rng) if rng.random() < self.feedback_share else row
                for row in examples
            ]
        )

    def _after_feedback(self, prompt: str, rng: random.Random) -> dict[str, str]:
        while True:
            rejected, better = (
                self._write(prompt, rng, right, self.max_length) for right in (rng.random() < 0.5, True)
            )
            if self.reward([prompt], [better]) > self.reward([prompt], [rejected]):
                return {"prompt": f"{prompt}{rejected} {complaint(prompt, rejected)}:", "completion": better}

    def online(self, problems: Dataset) -> Dataset:
        rows = super().online(problems)
        if self.feedback_share == 0:
            return rows
        return rows.add_column("feedback", list(map(complaint, rows["prompt"], rows["rejected"])))

    def preference(self, problems: Dataset) -> Dataset:
        """
        Pairs of completions of the start policy's kind for the problems, as `prompt`, `chosen` and `rejected`.

        The chosen one has the higher [`reward`], but for a share of `label_noise`. The same problems give the same
        pairs.
        """
        prompts = list(problems["prompt"])
        pairs = [self._pair(prompt, random.Random(f"{i}-{prompt}")) for i, prompt in enumerate(prompts)]
        chosen, rejected = map(list, zip(*pairs, strict=True)) if pairs else ([], [])
        return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})

    def _pair(self, prompt: str, rng: random.Random) -> tuple[str, str]:
        flipped = rng.random() < self.label_noise
        longer = None if self.longer_share is None else rng.random() < self.longer_share
        while True:
            pair = [self._write(prompt, rng, rng.random() < 0.5, self.max_length) for _ in range(2)]
            rewards = self.reward([prompt] * 2, pair)
            if rewards[0] == rewards[1] or any(text[0] not in self.covered for text in pair):
                continue
            better = int(rewards[1] > rewards[0])
            chosen, rejected = pair[better ^ flipped], pair[1 - better ^ flipped]
            if longer is None or (len(chosen) != len(rejected) and (len(chosen) > len(rejected)) == longer):
                return chosen, rejected

    def _write(self, prompt: str, rng: random.Random, right: bool, longest: int) -> str:
        marker = marker_of(prompt)
        length = rng.randint(len(marker), longest)
        while True:
            text = "".join(rng.choices(self.alphabet, k=length))
            if right:
                place = rng.randrange(length - 1)
                return text[:place] + marker + text[place + 2 :]
            if marker not in text:
                return text

    def true_reward(self, prompts: list, completions: list[Completion], **kwargs) -> list[float]:
        """1.0 for the marker, less the cost of letters beyond the free length."""
        texts = [completion_text(completion).strip() for completion in completions]
        return [
            float(marker_of(completion_text(prompt)) in text) - self.cost * max(0, len(text) - self.free_length)
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def proxy_reward(self, prompts: list, completions: list[Completion], **kwargs) -> list[float]:
        """The true reward, and the bias for every letter."""
        true = self.true_reward(prompts, completions)
        return [
            reward + self.proxy_bias * len(completion_text(completion).strip())
            for reward, completion in zip(true, completions, strict=True)
        ]

    @property
    def reward(self) -> Callable:
        return self.true_reward if self.train_on == "true" else self.proxy_reward


def marker_of(prompt: str) -> str:
    """First and last letter of the prompt's last line, which ends with a colon."""
    letters = prompt.strip().rpartition("\n")[2].removesuffix(":")
    return letters[0] + letters[-1]


def complaint(prompt: str, text: str) -> str:
    """What a reader misses in a completion: the `marker`, or else that it is `longer`."""
    return "longer" if marker_of(prompt) in text else "marker"
