"""Which rows of a generation batch are computed, and together with which."""

from typing import Any

import torch


def why_not_regrouped(trainer: Any) -> str | None:
    """Reason why the rows of TRL's micro-batches must stay as they are with the settings of `trainer`, or `None`."""
    if trainer._is_vlm:
        return "the model is multimodal"
    if trainer.loss_type == "bnpo":
        return "`loss_type='bnpo'` averages over the micro-batch, so that its rows must not change"
    if trainer.top_entropy_quantile < 1.0:
        return "`top_entropy_quantile` compares the tokens of a micro-batch, so that its rows must not change"
    if trainer._entropy_bonus_enabled:
        return "the entropy bonus averages over the micro-batch, so that its rows must not change"
    if trainer.aux_loss_enabled:
        return "the load-balancing loss covers every token"
    accumulation, steps = trainer.args.gradient_accumulation_steps, trainer.args.steps_per_generation
    if accumulation % steps and steps % accumulation:
        return (
            f"optimizer steps ({accumulation} micro-batches) and generation batches ({steps}) end at different "
            "places; make one a multiple of the other"
        )
    return None


class MicroBatches:
    """
    Cuts generation batches into micro-batches that keep groups together and leave out rows without effect.

    TRL shuffles rows and cuts them into `steps_per_generation` micro-batches. Here groups are shuffled and cut, so
    that a micro-batch holds few distinct prompts. Where all of them end in one optimizer step, TRL's default, the
    gradient is the same. Otherwise the optimizer steps see other, equally random parts: as many groups with an effect
    each as can be, so that none is empty while another has several.

    Args:
        steps (`int`):
            Micro-batches of a generation batch.
        windows (`int`):
            Optimizer steps among them.
        rows (`int`):
            Most rows of a micro-batch.
    """

    def __init__(self, steps: int, windows: int, rows: int):
        self.steps = steps
        self.windows = windows
        self.rows = rows

    def cut(self, group_ids: torch.Tensor, computed: torch.Tensor) -> list[torch.Tensor]:
        """
        Row numbers of each micro-batch.

        Args:
            group_ids (`torch.Tensor` of shape `(batch,)`, int64):
                Group of each row.
            computed (`torch.Tensor` of shape `(batch,)`, bool):
                Rows that have an effect.
        """
        windows, idle = self.share_out(group_ids, computed)
        batches, count = [], self.steps // self.windows
        for rows in windows:
            cut = self.cut_window(rows, group_ids.cpu()[rows], count)
            # Every rank runs equally many micro-batches: where rows do not suffice, ones without effect stand in
            missing = count - len(cut)
            batches += cut + list(idle[:missing].unsqueeze(1))
            idle = idle[missing:]
        return batches

    def share_out(self, group_ids: torch.Tensor, computed: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Row numbers of each optimizer step, by shuffled groups, and those without effect, as in [`cut`]."""
        group_ids, computed = group_ids.cpu(), computed.cpu()
        groups = torch.unique(group_ids)
        rank = torch.empty(int(groups.max()) + 1, dtype=torch.long)
        rank[groups] = torch.randperm(len(groups))
        order = torch.argsort(rank[group_ids], stable=True)
        live, idle = order[computed[order]], order[~computed[order]]
        # An optimizer step without any row would still move the weights, by the optimizer's momentum
        sizes = torch.unique_consecutive(group_ids[live], return_counts=True)[1]
        if len(groups) % self.windows == 0 and len(sizes) >= self.windows:
            windows = live.split([int(part.sum()) for part in sizes.tensor_split(self.windows)])
        else:
            windows = live.tensor_split(self.windows)
        return list(windows), idle

    def cut_window(self, rows: torch.Tensor, group_ids: torch.Tensor, count: int) -> list[torch.Tensor]:
        """At most `count` micro-batches of `rows`, none empty, between groups if whole groups fit."""
        sizes = torch.unique_consecutive(group_ids, return_counts=True)[1].tolist()
        batches: list[list[torch.Tensor]] = []
        room = 0
        for group in rows.split(sizes):
            if len(group) > room:
                batches.append([])
                room = self.rows
            batches[-1].append(group)
            room -= len(group)
        if len(batches) > count or max(sizes, default=0) > self.rows:
            return list(rows.tensor_split(min(count, len(rows))))
        return [torch.cat(groups) for groups in batches]


def recut(
    batches: list[dict[str, Any]], windows: int, count: int, batching: MicroBatches | None
) -> list[dict[str, Any]]:
    """
    Micro-batches of a generation batch as another number of them; each optimizer step keeps its rows.

    Args:
        batches (`list[dict]`):
            Of text: tensors by rows, and 0-d ones that are the same in all.
        windows (`int`):
            Optimizer steps among them.
        count (`int`):
            Micro-batches that an optimizer step gets.
        batching ([`MicroBatches`], *optional*):
            Keeps groups together.
    """
    size, cut = len(batches) // windows, []
    for start in range(0, len(batches), size):
        whole = joined(batches[start : start + size])
        # Of a run with a budget of tokens
        whole.pop("pass_ids", None)
        rows = torch.arange(len(whole["completion_ids"]))
        if batching is None:
            chosen = list(rows.tensor_split(count))
        else:
            chosen = batching.cut_window(rows, whole["group_ids"].cpu(), count)
        micro = [{k: v[part.to(v.device)] if v.dim() else v for k, v in whole.items()} for part in chosen]
        # Every rank runs equally many: a row without tokens of the loss stands in
        idle = {k: v[:1] if v.dim() else v for k, v in whole.items()}
        idle |= {name: torch.zeros_like(idle[name]) for name in ("loss_mask", "row_weight")}
        cut += micro + [idle] * (count - len(micro))
    return cut


def joined(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows of all `batches`, as in [`recut`], in one."""
    return {k: torch.cat([batch[k] for batch in batches]) if v.dim() else v for k, v in batches[0].items()}
