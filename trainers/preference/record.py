"""The record that preference stages pass on. Its contract is stated and checked here, once."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...losses.terms import LossTerm
from .sampling import SampledCompletions

_PER_TOKEN = ("per_token_logps", "ref_per_token_logps", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")


@dataclass
class PreferenceRecord:
    """
    One batch of pairs and what policy and reference say about it.

    Rows are `2·pairs`: all chosen completions, then their rejected partners in the same order; any tensor of rows
    splits with `chunk(2)`. `length` counts tokens of prompt and completion, right-padded; `time = length − 1` counts
    the positions that predict a token, so that column t of a per-token tensor belongs to token t + 1.

    Args:
        input_ids, attention_mask, completion_mask (`torch.Tensor` of shape `(rows, length)`):
            Token ids; 1 at real tokens; 1 at completion tokens.
        per_token_logps (`torch.Tensor` of shape `(rows, time)`):
            log π_θ(y_t), in nats and with gradient; 0 outside the completion.
        logps (`torch.Tensor` of shape `(rows,)`):
            log π_θ(y|x), in nats and with gradient: the sum of the former, weighted by `ld_alpha` if set.
        ref_logps (`torch.Tensor` of shape `(rows,)`):
            The same under the reference, without gradient.
        ref_per_token_logps (`torch.Tensor` of shape `(rows, time)`, *optional*):
            log π_ref(y_t), without gradient; 0 outside the completion. `None` with `precompute_ref_log_probs`.
        entropy, mean_logits (`torch.Tensor` of shape `(rows, time)`):
            Entropy of the policy's next-token distribution in nats, and mean of its logits; detached.
        is_top1 (`torch.Tensor` of shape `(rows, time)`, bool):
            Whether the token is the policy's most likely one.
        log_sum_sq_probs (`torch.Tensor` of shape `(rows, time)`, *optional*):
            log Σ_v π_θ(v)², detached; only with `use_weighting`.
        aux_loss (`torch.Tensor` of shape `()`, *optional*):
            Load-balancing loss of a mixture of experts, with gradient.
        samples (`dict[str, SampledCompletions]`):
            What methods sampled before the policy's pass, by method name.
        margins (`torch.Tensor` of shape `(pairs,)`, *optional*):
            Δ of every pair, with gradient; set after the stage *margin*.
        pair_losses (`list[LossTerm]`):
            Losses of every pair, weighted; set after the stage *pair weights*.
        extras (`dict[str, torch.Tensor]`):
            What methods made of further dataset columns in the stage *collate*, one entry per pair.
        exchanged (`bool`):
            Whether chosen and rejected are exchanged against the data, as [`flipped`] does for smoothed losses:
            `extras` and `samples` are as they were.
        inputs (`dict[str, Any]`), reference_passes (`list[torch.Tensor]`):
            The collated batch, and what the reference said of it in turn: to evaluate the pairs once more.

    Raises:
        `ValueError`: if a tensor breaks the contract; the message names it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    per_token_logps: torch.Tensor
    logps: torch.Tensor
    ref_logps: torch.Tensor
    ref_per_token_logps: torch.Tensor | None
    entropy: torch.Tensor
    mean_logits: torch.Tensor
    is_top1: torch.Tensor
    log_sum_sq_probs: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    samples: dict[str, SampledCompletions] = field(default_factory=dict)
    margins: torch.Tensor | None = None
    pair_losses: list[LossTerm] = field(default_factory=list)
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    exchanged: bool = False
    inputs: dict[str, Any] = field(default_factory=dict)
    reference_passes: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self):
        rows, length = self.input_ids.shape
        if rows % 2:
            raise ValueError(f"`PreferenceRecord.input_ids` must have an even number of rows, got {rows}.")
        shapes = dict.fromkeys(("attention_mask", "completion_mask"), (rows, length))
        shapes |= dict.fromkeys(_PER_TOKEN, (rows, length - 1)) | dict.fromkeys(("logps", "ref_logps"), (rows,))
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"`PreferenceRecord.{name}` must be of shape {shape}, got {tuple(value.shape)}.")
        for name in ("ref_logps", *_PER_TOKEN[1:]):
            value = getattr(self, name)
            if value is not None and value.requires_grad:
                raise ValueError(f"`PreferenceRecord.{name}` must be without gradient.")
        for name, value in self.extras.items():
            if len(value) != rows // 2:
                raise ValueError(
                    f"`PreferenceRecord.extras['{name}']` must have {rows // 2} entries, got {len(value)}."
                )

    def check_values(self) -> None:
        """
        Check what only the values show. Waits for the device.

        Raises:
            `ValueError`: if a completion token is padding, a log-probability outside the completion is not 0, or one
            inside it is not finite.
        """
        if (self.completion_mask > self.attention_mask).any():
            raise ValueError("`PreferenceRecord.completion_mask` marks padding as completion.")
        for name in ("per_token_logps", "ref_per_token_logps"):
            value = getattr(self, name)
            if value is None:
                continue
            if not value.isfinite().all():
                raise ValueError(f"`PreferenceRecord.{name}` is not finite everywhere.")
            if (value[self.shift_completion_mask == 0] != 0).any():
                raise ValueError(f"`PreferenceRecord.{name}` is not 0 outside the completion.")

    def flipped(self) -> "PreferenceRecord":
        """The same pairs with chosen and rejected exchanged; `extras` and `samples` stay."""
        names = ("input_ids", "attention_mask", "completion_mask", "logps", "ref_logps", *_PER_TOKEN)
        rows = {name: getattr(self, name) for name in names}
        exchanged = {name: torch.cat(v.chunk(2)[::-1]) for name, v in rows.items() if v is not None}
        margins = None if self.margins is None else -self.margins
        return replace(self, **exchanged, margins=margins, exchanged=not self.exchanged)

    @property
    def shift_completion_mask(self) -> torch.Tensor:
        """1 where a completion token is scored, of shape `(rows, time)`: in line with the per-token tensors."""
        return self.completion_mask[:, 1:]

    @property
    def lengths(self) -> torch.Tensor:
        """Number of scored completion tokens, of shape `(rows,)`; 0 for an empty completion."""
        return self.shift_completion_mask.sum(1)

    @property
    def logratios(self) -> torch.Tensor:
        """h = log π_θ(y|x) − log π_ref(y|x), of shape `(rows,)`, in nats and with gradient."""
        return self.logps - self.ref_logps
