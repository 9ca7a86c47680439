"""Passes of policy and reference over rollouts. The log-probabilities are TRL's; the work is less."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer
from trl.trainer.utils import pad

from ...models.observation import Pass, backbone, last_mlp, observe
from ..packing import pack
from .record import MULTIMODAL_KEYS, RolloutRecord


@dataclass
class OldPass:
    """
    What the pass over finished rollouts, with the weights that sampled them, gave for this rank's rows.

    Args:
        logps (`torch.Tensor` of shape `(batch, time)`):
            Log-probabilities of the completion tokens at the sampling temperature, in nats.
        entropies (`torch.Tensor` of shape `(batch, time)`, *optional*), hidden_states (`torch.Tensor` of shape
            `(batch, time, hidden)`, *optional*): at the positions that predict the completion tokens; if asked for.
        mlp_inputs (`torch.Tensor` of shape `(batch, prompt_length + time, hidden)`, *optional*):
            Input of the last layer's MLP at every position; if asked for.
    """

    logps: torch.Tensor
    entropies: torch.Tensor | None
    hidden_states: torch.Tensor | None
    mlp_inputs: torch.Tensor | None


def score_tokens(
    trainer: Any,
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int | None = None,
    needs: frozenset[str] = frozenset(),
    compute_aux_loss: bool = False,
    **multimodal: Any,
) -> tuple[OldPass, torch.Tensor | None]:
    """
    One pass of `model` over rollouts in TRL's layout, by distinct prompts where `trainer` shares them.

    Args:
        trainer ([`PolicyTrainer`]):
            Its settings decide how.
        model (`torch.nn.Module`):
            Policy or reference.
        input_ids, attention_mask (`torch.Tensor` of shape `(rows, prompt_length + time)`):
            Prompts, padded on the left, and completions, padded on the right.
        labels (`torch.Tensor` of shape `(rows, time)`, bool):
            Completion tokens whose scores are wanted; others may be scored or 0.
        batch_size (`int`, *optional*):
            Rows at a time.
        needs (`frozenset[str]`, *optional*):
            As in [`~PolicyTrainer.old_pass_needs`].
        compute_aux_loss (`bool`, *optional*, defaults to `False`), multimodal: as in TRL.

    Returns:
        The scores, and the load-balancing loss if it was asked for.
    """
    multimodal_rows = any(multimodal.get(key) is not None for key in MULTIMODAL_KEYS)
    if not (compute_aux_loss or multimodal_rows) and trainer.shares(input_ids.shape[1]):
        return _score_packed(trainer, model, input_ids, attention_mask, labels, batch_size, needs), None
    time = labels.shape[1]
    hidden = mlp = None
    with ExitStack() as observers:
        if "hidden_states" in needs:
            hidden = observers.enter_context(observe(backbone(model), Pass.OLD))
        if "mlp_inputs" in needs:
            mlp = observers.enter_context(observe(last_mlp(trainer.model), Pass.OLD, inputs=True))
        # Past the trainer's own override, which comes here
        logps, entropies, aux_loss = GRPOTrainer._get_per_token_logps_and_entropies(
            trainer,
            model,
            input_ids,
            attention_mask,
            time,
            batch_size,
            "entropy" in needs,
            compute_aux_loss=compute_aux_loss,
            **multimodal,
        )
    return OldPass(logps, entropies, hidden and hidden.hidden_states(time), mlp and mlp.hidden_states()), aux_loss


@torch.no_grad()
def score_record(
    trainer: Any,
    record: RolloutRecord,
    needs: frozenset[str] = frozenset(),
    prompts: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> OldPass:
    """
    The pass over finished rollouts.

    Args:
        trainer ([`PolicyTrainer`]):
            Whose policy scores.
        record ([`RolloutRecord`]):
            The rollouts.
        needs (`frozenset[str]`, *optional*):
            As in [`~PolicyTrainer.old_pass_needs`].
        prompts (tuple of two `torch.Tensor` of shape `(batch, prompt_length)`, *optional*):
            Ids and mask of other prompts than the record's to score under.
    """
    ids, mask = prompts or (record.prompt_ids, record.prompt_mask)
    size = trainer.args.per_device_eval_batch_size
    if trainer.model.training:
        size = trainer.rows_at_a_time(ids.shape[1] + record.completion_ids.shape[1])
    scores, _ = score_tokens(
        trainer,
        trainer.model,
        torch.cat([ids, record.completion_ids], dim=1),
        torch.cat([mask, record.completion_mask], dim=1),
        record.completion_mask.bool(),
        size,
        needs,
        **record.multimodal,
    )
    return scores


def pad_rows(
    rows: list[list[int]], pad_token_id: int, side: str, device: torch.device, multiple_of: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(rows, longest)` of rows of tokens, padded on `side`."""
    tensors = [torch.tensor(row) for row in rows]
    ids, mask = (
        pad(parts, padding_value=value, padding_side=side, pad_to_multiple_of=multiple_of).to(device)
        for parts, value in ((tensors, pad_token_id), ([torch.ones_like(t) for t in tensors], 0))
    )
    return ids, mask


def _score_packed(trainer, model, input_ids, attention_mask, labels, batch_size, needs) -> OldPass:
    size, start = batch_size or input_ids.shape[0], input_ids.shape[1] - labels.shape[1]
    chunks = []
    for first in range(0, input_ids.shape[0], size):
        rows = slice(first, first + size)
        mask = attention_mask[rows]
        packing = pack(
            input_ids[rows],
            mask,
            mask[:, :start].sum(1),
            nn.functional.pad(labels[rows], (start, 0)),
            trainer.sharing.count_padding,
            whole="mlp_inputs" in needs,
        )
        mlp = None
        with ExitStack() as observers:
            observers.enter_context(trainer.accelerator.autocast())
            if "mlp_inputs" in needs:
                mlp = observers.enter_context(observe(last_mlp(trainer.model), Pass.OLD, inputs=True))
            out = model(packing=packing)
        chunks.append(
            (
                out.scores["log_probs"][:, start:],
                out.scores["entropy"][:, start:],
                out.states[packing.places[:, start - 1 : -1]] if "hidden_states" in needs else None,
                mlp and mlp.hidden_states().squeeze(0)[packing.places],
            )
        )
    return OldPass(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)))
