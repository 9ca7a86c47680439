"""Guidance between a base model and the one trained from it: one scalar moves along, and beyond, that path."""

import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor


def guided_logprobs(
    base_logits: Tensor, trained_logits: Tensor, scale: float, plausibility_alpha: float = 0.0
) -> Tensor:
    """
    Next-token log-probabilities of the base model, moved towards the trained one and beyond.

    `log p_w(v) = (1 - w) log p_base(v) + w log p_trained(v) - log Z`, over the tokens that both models have and
    neither excludes; with `w` 0 or 1 one model's own distribution. If the trained model is the optimum of a reward
    with a KL penalty β, `p_w` is that of the penalty β/w. The tilt is per token: the product over a completion is not
    the tilted distribution over completions, since `Z` depends on the prefix.

    Source: arXiv:2508.21016, the rule `v = v_base + w (v_trained - v_base)` for diffusion; its form for language
    models is derived, exact per step.

    Args:
        base_logits (`torch.Tensor` of shape `(..., vocab)`), trained_logits (`torch.Tensor` of shape `(..., vocab)`):
            Raw scores of both models after the same prefix. If one vocabulary is padded, it is cropped to the other's.
        scale (`float`):
            Weight `w`: 0 is the base model, 1 the trained one; above 1 extrapolates, below 0 away from it.
        plausibility_alpha (`float`, *optional*, defaults to `0.0`):
            Tokens less likely under the trained model than this share of its most likely one are excluded, unless `w`
            is 0 or 1. In [0, 1); 0 excludes none.

    Returns:
        `torch.Tensor` of shape `(..., vocab)`, float32, in nats; `-inf` for excluded tokens. Where the two models have
        no token in common, the trained model's row.

    Raises:
        `ValueError`: if `scale` is not finite, or `plausibility_alpha` not in [0, 1).
    """
    check_guidance(scale, plausibility_alpha)
    shared = min(base_logits.shape[-1], trained_logits.shape[-1])
    base = base_logits[..., :shared].float().log_softmax(-1)
    trained = trained_logits[..., :shared].float().log_softmax(-1)
    if scale in (0, 1):
        return trained if scale else base
    excluded = base.isneginf() | trained.isneginf()
    if plausibility_alpha > 0:
        excluded |= trained < trained.amax(-1, keepdim=True) + math.log(plausibility_alpha)
    # The difference form stays finite where both are finite; (1 - w)(-inf) would be +inf beyond w = 1
    mixed = torch.where(excluded, -torch.inf, torch.lerp(base, trained, scale)).log_softmax(-1)
    return torch.where(excluded.all(-1, keepdim=True), trained, mixed)


def check_guidance(scale: float, plausibility_alpha: float) -> None:
    """Raise `ValueError` unless `scale` is finite and `plausibility_alpha` in [0, 1)."""
    if not math.isfinite(scale):
        raise ValueError(f"`scale` must be a finite number, got {scale!r}.")
    if not 0 <= plausibility_alpha < 1:
        raise ValueError(f"`plausibility_alpha` must be in [0, 1), got {plausibility_alpha!r}.")


def kl_divergence(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """
    `KL(p || q)` of rows of log-probabilities, in nats, over the tokens that both vocabularies have.

    Args:
        logprobs (`torch.Tensor` of shape `(..., vocab)`):
            `p`. Tokens it excludes add nothing.
        other_logprobs (`torch.Tensor` of shape `(..., vocab)`):
            `q`.
    """
    shared = min(logprobs.shape[-1], other_logprobs.shape[-1])
    p, q = logprobs[..., :shared], other_logprobs[..., :shared]
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1)


@dataclass
class Voice:
    """
    A model that can be asked for next tokens, and what must happen around a forward of it.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model, in evaluation mode.
        without_adapter (`bool`, *optional*, defaults to `False`):
            Whether to switch the adapter of a PEFT model off, which makes it the base model.
        lock (`threading.Lock`, *optional*):
            Held during a forward. Voices of one network need a common one where threads share it.
    """

    model: torch.nn.Module
    without_adapter: bool = False
    lock: AbstractContextManager | None = None

    def begin(self, attention_mask: Tensor | None = None) -> "Reader":
        """Start on a new prefix, with a key-value cache of its own."""
        return Reader(self, attention_mask)


class Reader:
    """
    Reads a growing prefix with a key-value cache, so that each token goes through the model once.

    Args:
        voice ([`Voice`]):
            The model.
        attention_mask (`torch.Tensor` of shape `(rows, prompt)`, *optional*):
            1 for tokens, 0 for left padding, of the prompts.
    """

    def __init__(self, voice: Voice, attention_mask: Tensor | None = None):
        self.voice = voice
        self._mask = attention_mask
        self._cache: DynamicCache | None = None
        self._read: Tensor | None = None

    @torch.no_grad()
    def logits(self, input_ids: Tensor) -> Tensor:
        """
        Raw scores of the token after each row.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, time)`):
                All tokens so far: those of the last call, and new ones.

        Raises:
            `ValueError`: if the rows are not those of the last call, as with beams.
        """
        model, start = self.voice.model, 0
        if self._read is None:
            self._cache = DynamicCache(config=model.config)
        else:
            start = self._read.shape[1]
            if start >= input_ids.shape[1] or not torch.equal(self._read, input_ids[:, :start]):
                raise ValueError(
                    "Guidance needs rows that only grow, but they were exchanged or cut: set `num_beams` to 1, and "
                    "use a new processor for each call of `generate`."
                )
        inputs: dict = {"input_ids": input_ids[:, start:], "past_key_values": self._cache, "use_cache": True}
        if self._mask is not None:
            grown = input_ids.shape[1] - self._mask.shape[1]
            mask = torch.nn.functional.pad(self._mask, (0, grown), value=1)
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, start:]}
        without = model.disable_adapter if self.voice.without_adapter else nullcontext
        # The lock comes first: switching the adapter off concerns every thread
        with self.voice.lock or nullcontext(), without():
            scores = model(**inputs, logits_to_keep=1).logits[:, -1]
        self._read = input_ids.clone()
        return scores


class GuidanceLogitsProcessor(LogitsProcessor):
    """
    Guides `model.generate` of the trained model: its scores become those of [`guided_logprobs`].

    Twice the forward passes, two caches. `generate` applies it before temperature and top-p. Rows must stay in place:
    no beams, and one processor per call. Completions follow neither model's law: for evaluation, not for training,
    unless their log-probabilities are corrected for.

    Relations: transformers' `UnbatchedClassifierFreeGuidanceLogitsProcessor` mixes two prompts of one model by the
    same rule. [`guided_tokens`] is the loop for one prompt that streams.

    Args:
        base_model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Base model. A PEFT model serves with its adapter switched off, so that it can be the trained model as well.
        scale (`float`):
            Weight `w`.
        attention_mask (`torch.Tensor` of shape `(rows, prompt)`, *optional*):
            That of the prompts. Needed where they are padded on the left.
        plausibility_alpha (`float`, *optional*, defaults to `0.0`):
            As in [`guided_logprobs`].

    Raises:
        `ValueError`: if `scale` is not finite, or `plausibility_alpha` not in [0, 1).
    """

    def __init__(
        self,
        base_model: torch.nn.Module,
        scale: float,
        attention_mask: Tensor | None = None,
        plausibility_alpha: float = 0.0,
    ):
        check_guidance(scale, plausibility_alpha)
        self.scale, self.plausibility_alpha = scale, plausibility_alpha
        self._base = Voice(base_model, without_adapter=hasattr(base_model, "disable_adapter")).begin(attention_mask)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.scale == 1:
            return scores
        base = self._base.logits(input_ids)
        mixed = guided_logprobs(base, scores, self.scale, self.plausibility_alpha)
        return torch.nn.functional.pad(mixed, (0, scores.shape[-1] - mixed.shape[-1]), value=-torch.inf)


@dataclass(frozen=True)
class GuidedToken:
    """
    A token of a stream.

    Args:
        token (`int`):
            The token.
        kl_base (`float`, *optional*), kl_trained (`float`, *optional*):
            Divergence, in nats, of the distribution (before temperature and top-p) from each model's. Where only one
            model was asked, `None`.
    """

    token: int
    kl_base: float | None = None
    kl_trained: float | None = None


def guided_tokens(
    base: Voice | None,
    trained: Voice | None,
    prompt_ids: Collection[int],
    scale: float,
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    plausibility_alpha: float = 0.0,
) -> Iterator[GuidedToken]:
    """
    Stream one completion at guidance weight `scale`. At 0 and 1 only that model is asked.

    Equal distributions give equal tokens under equal seeds, since each step draws one uniform number. Nothing is
    locked between tokens, so that several streams take turns on one network.

    Args:
        base ([`Voice`], *optional*), trained ([`Voice`], *optional*):
            The models; one that the weight does not need may be left out.
        prompt_ids (`Collection[int]`):
            Prompt, at least one token.
        scale (`float`):
            Weight `w` of [`guided_logprobs`].
        max_new_tokens (`int`):
            Tokens at most.
        eos_token_ids (`Collection[int]`, *optional*):
            Tokens that end the completion; the stream ends before them.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the log-probabilities; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Mass of the most likely tokens that are kept.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws.
        plausibility_alpha (`float`, *optional*, defaults to `0.0`):
            As in [`guided_logprobs`].

    Raises:
        `ValueError`: if the prompt is empty, a needed model is missing, or a setting is out of its range.
    """
    check_guidance(scale, plausibility_alpha)
    if not prompt_ids:
        raise ValueError("`prompt_ids` must have at least one token, got none.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"`temperature` must be >= 0 and `top_p` in (0, 1], got {temperature!r} and {top_p!r}.")
    needed = [voice for voice, wanted in ((base, scale != 1), (trained, scale != 0)) if wanted]
    if None in needed:
        raise ValueError(f"`scale` {scale!r} needs the base model for all but 1, and the trained one for all but 0.")
    readers = [voice.begin() for voice in needed]
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.tensor([list(prompt_ids)], device=next(needed[0].model.parameters()).device)
    for _ in range(max_new_tokens):
        rows = [reader.logits(sequence) for reader in readers]
        if len(rows) == 2:
            logprobs = guided_logprobs(*rows, scale, plausibility_alpha)
            divergences = [kl_divergence(logprobs, row.float().log_softmax(-1)).item() for row in rows]
        else:
            logprobs, divergences = rows[0].float().log_softmax(-1), [None, None]
        token = draw_token(logprobs[0], temperature, top_p, generator)
        if token in eos_token_ids:
            return
        yield GuidedToken(token, *divergences)
        sequence = torch.cat([sequence, sequence.new_tensor([[token]])], dim=1)


def draw_token(logprobs: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """
    One token by tempered, then top-p filtered, probabilities; the most likely one at temperature 0.

    Args:
        logprobs (`torch.Tensor` of shape `(vocab,)`):
            Log-probabilities.
        temperature (`float`), top_p (`float`):
            As in [`guided_tokens`].
        generator (`torch.Generator`):
            On the CPU; one number is drawn from it.
    """
    if temperature == 0:
        return int(logprobs.argmax())
    probabilities = (logprobs / temperature).softmax(-1).double().cpu()
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # Those before which the mass is not reached yet, hence always the first
        kept = order[ordered.cumsum(-1) - ordered < top_p]
        probabilities = torch.zeros_like(probabilities).index_put_((kept,), probabilities[kept])
    cumulative = probabilities.cumsum(-1)
    uniform = torch.rand(1, generator=generator, dtype=torch.float64)
    return int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
