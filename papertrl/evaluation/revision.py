"""Answers that a model revises, again and again: self-improvement at inference."""

import torch
from transformers import PreTrainedTokenizerBase

from ..data.messages import as_completion
from ..models.tokenization import tokenize_prompt
from .models import Loaded
from .sampling import complete

# Of this library: the paper's are not known
TEXT_TEMPLATE = "{prompt}{answer}\nBetter: "
CHAT_REQUEST = "Improve your answer. Reply with the better answer alone."


def revision_prompt(
    prompt: str | list[dict],
    answer: str | list[dict],
    template: str = TEXT_TEMPLATE,
    request: str = CHAT_REQUEST,
) -> str | list[dict]:
    """
    Prompt that asks for a better answer than the given one.

    Args:
        prompt (`str` or `list[dict]`):
            Text, or messages.
        answer (`str` or `list[dict]`):
            Of the same kind.
        template (`str`, *optional*):
            For text: holds `{answer}` and mostly `{prompt}`.
        request (`str`, *optional*):
            For messages: what the user says after prompt and answer.
    """
    if isinstance(prompt, str):
        return template.format(prompt=prompt, answer=answer)
    return [*prompt, *answer, {"role": "user", "content": request}]


def revise(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list,
    num_revisions: int = 5,
    template: str = TEXT_TEMPLATE,
    request: str = CHAT_REQUEST,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
) -> list[list]:
    """
    Answer prompts, and revise each answer: y_0 ~ π(·|x), y_{k+1} ~ π(·|y_k, x), the same model under the prompt of
    [`revision_prompt`].

    Source: arXiv:2406.01660, where up to five revisions improve what [`~papertrl.SrpoDPOTrainer`] has trained.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal LM, in evaluation mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list`):
            Texts, or lists of messages.
        num_revisions (`int`, *optional*, defaults to `5`):
            Revisions of each answer.
        template (`str`, *optional*), request (`str`, *optional*):
            As in [`revision_prompt`]: those of training.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest answer.
        temperature (`float`, *optional*, defaults to `1.0`):
            Of sampling; 0 decodes greedily.
        seed (`int`, *optional*, defaults to `0`):
            Of sampling; sets the global generators.
        batch_size (`int`, *optional*):
            Prompts at a time. Chosen automatically if unset.

    Returns:
        `list[list]`: for each prompt y_0 to y_N, texts or lists of messages as the prompts are.

    Raises:
        `ValueError`: if `num_revisions` is negative.

    Example:

    ```python
    >>> from papertrl import revise
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer).eval()
    >>> [len(answers) for answers in revise(model, tokenizer, ["1+1=", "2+2="], 2, max_new_tokens=3)]
    [3, 3]

    ```
    """
    if num_revisions < 0:
        raise ValueError(f"`num_revisions` must be at least 0, got {num_revisions!r}.")
    loaded = Loaded(model, tokenizer)
    histories: list[list] = [[] for _ in prompts]
    for k in range(num_revisions + 1):
        asked = [
            revision_prompt(prompt, answers[-1], template, request) if answers else prompt
            for prompt, answers in zip(prompts, histories, strict=True)
        ]
        prompt_ids = [tokenize_prompt(tokenizer, prompt, {}) for prompt in asked]
        completions = complete(loaded, prompt_ids, 1, max_new_tokens, temperature, 1.0, seed + k, batch_size)
        texts = tokenizer.batch_decode([ids for (ids,) in completions], skip_special_tokens=True)
        for prompt, answers, text in zip(prompts, histories, texts, strict=True):
            answers.append(as_completion(prompt, text))
    return histories
