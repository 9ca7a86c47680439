"""Pairs in the layout that shared prompts need, and their scores back in TRL's."""

from collections.abc import Callable

import torch

from ..shared_prefix import shared_inputs

Scores = dict[str, torch.Tensor | None]


def pair_inputs(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_mask: torch.Tensor,
    own_positions: bool = False,
) -> tuple[dict | None, Callable[[Scores], Scores]]:
    """
    Shared inputs from TRL's layout of pairs: each row a prompt and a completion, padded on the right.

    Args:
        input_ids, attention_mask, completion_mask (`torch.Tensor` of shape `(rows, length)`):
            Token ids; 1 at real tokens; 1 at completion tokens, which follow the prompt's without a gap.
        own_positions (`bool`, *optional*, defaults to `False`):
            As in [`~papertrl.trainers.shared_prefix.Sharing`].

    Returns:
        The inputs, or `None` if a row has no prompt token that its completion could follow, and a function that puts
        scores of shape `(rows, time)` where TRL has them, `(rows, length - 1)`. Fields that were not computed come
        back as `None`.
    """
    rows, length = input_ids.shape
    lengths = attention_mask.sum(1)
    completions = completion_mask.sum(1)
    prompts = lengths - completions
    shortest, widest, longest = torch.stack([prompts.amin(), prompts.amax(), completions.amax()]).tolist()
    if shortest == 0:
        return None, lambda scores: scores
    places = torch.arange(length, device=input_ids.device)
    before = prompts.unsqueeze(1) - widest + places[:widest]
    after = prompts.unsqueeze(1) + places[: max(longest, 1)]
    in_prompt, in_completion = before >= 0, after < lengths.unsqueeze(1)
    before, after = before.clamp(min=0), after.clamp(max=length - 1)
    inputs = shared_inputs(
        input_ids.gather(1, before),
        in_prompt.to(attention_mask.dtype),
        before,
        input_ids.gather(1, after),
        in_completion.to(attention_mask.dtype),
        after,
        in_completion,
        own_positions,
    )

    def place(scores: Scores) -> Scores:
        time = inputs["input_ids"].shape[1]
        # The token in column c is predicted at column c - 1; what lies in no completion goes to a column that is cut
        target = torch.where(in_completion, after - 1, length - 1)[:, :time]
        placed = {name: value.new_zeros(rows, length).scatter(1, target, value) for name, value in scores.items()}
        return {name: placed[name][:, :-1] if name in placed else None for name in _FIELDS}

    return inputs, place


_FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "aux_loss")
