"""A pairwise preference model: a language model that says which of two responses is the better one."""

import random

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..models.loading import whole_checkpoints
from .matching import Completion, completion_text

TEMPLATE = "[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n"
LABELS = ("A", "B")


class PairwiseModel:
    """
    P(first ≻ second) by a language model that was trained to name the better of two responses by one token.

    The two responses are put into a template, and the logits of the next token give

    P(first ≻ second | x) = exp(z_A) / (exp(z_A) + exp(z_B))

    at temperature 1. It is for `judge=` of preference trainers, which ask in both orders and take the mean, so that a
    preference for a place cancels. [`pairwise_dataset`] makes the rows to train such a model on.

    Source: arXiv:2405.07863, the preference model.

    Args:
        model (`str` or `~transformers.PreTrainedModel`):
            Causal language model, or its id or folder. It scores on the device it is on.
        tokenizer (`~transformers.PreTrainedTokenizerBase`, *optional*):
            Its tokenizer. May be left out if `model` is an id or folder.
        template (`str`, *optional*):
            Text with `{prompt}`, `{first}` and `{second}`; messages are written as `role: content`, one a line.
        labels (`tuple[str, str]`, *optional*, defaults to `("A", "B")`):
            What names the first and the second response, one token each.
        chat (`bool`, *optional*, defaults to `False`):
            Whether the comparison is a user's message under the tokenizer's chat template, as for the authors'
            models, or plain text.
        batch_size (`int`, *optional*, defaults to `16`):
            Comparisons per forward.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of the model's repository may run.

    Raises:
        `ValueError`: if `labels` are not two different tokens of the vocabulary, or `template` lacks a field.

    Relations: a reward model, which TRL's `RewardTrainer` trains, scores one response; pass it as `reward_funcs=`. A
    pairwise model can hold preferences that no score explains, and costs two forwards per pair of responses.

    Example:

    ```python
    >>> from papertrl.rewards.pairwise import PairwiseModel
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> judge = PairwiseModel(tiny_model(tokenizer), tokenizer)
    >>> len(judge(["1+1="], ["2"], ["3"]))
    1

    ```
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        template: str = TEMPLATE,
        labels: tuple[str, str] = LABELS,
        chat: bool = False,
        batch_size: int = 16,
        trust_remote_code: bool = False,
    ):
        if tokenizer is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if isinstance(model, str):
            with whole_checkpoints():
                model = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=trust_remote_code)
        self.model = model
        self.tokenizer = tokenizer
        self.template = checked_template(template)
        self.label_ids = label_ids(tokenizer, labels)
        self.chat = chat
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, prompts: list[Completion], firsts: list[Completion], seconds: list[Completion]) -> list[float]:
        """
        Score pairs of responses, in the order given.

        Args:
            prompts, firsts, seconds (`list`):
                Texts or messages.

        Returns:
            `list[float]`: P(first ≻ second) of each.
        """
        rows = [self._tokens(comparison(self.template, *pair)) for pair in zip(prompts, firsts, seconds, strict=True)]
        # Similar lengths together, so that little is padded
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        probabilities = [0.0] * len(rows)
        self.model.eval()
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            for i, probability in zip(part, self._probabilities([rows[i] for i in part]), strict=True):
                probabilities[i] = probability
        return probabilities

    def _tokens(self, text: str) -> list[int]:
        if self.chat:
            messages = [{"role": "user", "content": text}]
            # The template writes the special tokens; the tokenizer's own would double them
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]

    def _probabilities(self, rows: list[list[int]]) -> list[float]:
        width = max(map(len, rows))
        device = self.model.device
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        return outputs.logits[:, -1, self.label_ids].float().softmax(-1)[:, 0].tolist()


def pairwise_dataset(
    pairs: Dataset,
    template: str = TEMPLATE,
    labels: tuple[str, str] = LABELS,
    chat: bool = False,
    seed: int = 0,
) -> Dataset:
    """
    Rows to train a [`PairwiseModel`] on, by [`SupervisedTrainer`] or [`~trl.SFTTrainer`].

    Each pair becomes a comparison as `prompt`, with the chosen response first in a random half, and the label of the
    chosen one as `completion`. These trainers leave the prompt out of the loss.

    Args:
        pairs (`Dataset`):
            With columns `prompt`, `chosen` and `rejected`, of texts or messages.
        template, labels, chat:
            As in [`PairwiseModel`], which must be given the same.
        seed (`int`, *optional*, defaults to `0`):
            The same seed orders the same pairs alike.

    Raises:
        `ValueError`: if a column is missing, or `template` lacks a field.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from papertrl.rewards.pairwise import pairwise_dataset

    >>> pairs = Dataset.from_dict({"prompt": ["1+1="], "chosen": ["2"], "rejected": ["3"]})
    >>> pairwise_dataset(pairs)[0]
    {'prompt': '[CONTEXT] 1+1= [RESPONSE A] 2 [RESPONSE B] 3 \\n', 'completion': 'A'}

    ```
    """
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in pairs.column_names]
    if missing:
        raise ValueError(f"`pairs` lacks the columns {missing}; its columns are {sorted(pairs.column_names)}.")
    checked_template(template)
    rng = random.Random(seed)
    rows = []
    for row in pairs:
        better = int(rng.random() < 0.5)
        responses = [row["rejected"], row["rejected"]]
        responses[better] = row["chosen"]
        text, label = comparison(template, row["prompt"], *responses), labels[better]
        if chat:
            prompt, completion = [{"role": "user", "content": text}], [{"role": "assistant", "content": label}]
            rows.append({"prompt": prompt, "completion": completion})
        else:
            rows.append({"prompt": text, "completion": label})
    return Dataset.from_list(rows)


def comparison(template: str, prompt: Completion, first: Completion, second: Completion) -> str:
    """The template with a prompt and its two responses."""
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    return template.format(prompt=prompt, first=completion_text(first), second=completion_text(second))


def checked_template(template: str) -> str:
    """
    The template, if it can be filled.

    Raises:
        `ValueError`: if it lacks a field or has another one.
    """
    marks = {"prompt": "\0p", "first": "\0f", "second": "\0s"}
    try:
        filled = template.format(**marks)
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"`template` must have the fields {{prompt}}, {{first}} and {{second}}: {error!r}.") from None
    missing = [name for name, mark in marks.items() if mark not in filled]
    if missing:
        raise ValueError(f"`template` lacks the fields {missing}, got {template!r}.")
    return template


def label_ids(tokenizer: PreTrainedTokenizerBase, labels: tuple[str, str]) -> list[int]:
    """
    Token of each label.

    Raises:
        `ValueError`: if one is not a single token, is unknown, or they are the same.
    """
    ids: list[list[int]] = [tokenizer.encode(label, add_special_tokens=False) for label in labels]
    single = len(ids) == 2 and all(len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id for tokens in ids)
    if not single or ids[0] == ids[1]:
        raise ValueError(f"`labels` must be two different single tokens of the vocabulary, got {labels!r}: {ids}.")
    return [tokens[0] for tokens in ids]
