"""Which rows of a generation batch are computed, and together with which."""

from typing import Any

import torch
from accelerate.logging import get_logger

from .record import RolloutRecord
from .scoring import PolicyScoring

logger = get_logger(__name__)


class PolicyBatching(PolicyScoring):
    """
    Micro-batches that keep groups together and leave out rows without effect.

    TRL shuffles rows and cuts them into `steps_per_generation` micro-batches. Here groups are shuffled and cut, so
    that a micro-batch holds few distinct prompts. Where all of them end in one optimizer step, TRL's default, the
    gradient is the same. Otherwise the optimizer steps see other, equally random parts.
    """

    def contributing_rows(self, record: RolloutRecord) -> torch.Tensor:
        """
        Rows that can change loss or gradient, bool `(batch,)`: those with a loss token, weight and advantage.

        With a divergence to the reference every row counts. A method whose terms act on rows of zero advantage
        extends this.
        """
        if any(component.computes_all_rows() for component in self.slots):
            return torch.ones_like(record.row_weight, dtype=torch.bool)
        live = (record.row_weight > 0) & record.loss_mask.any(1)
        if self.beta != 0.0:
            return live
        nonzero = record.advantages != 0
        return live & (nonzero if nonzero.dim() == 1 else nonzero.any(1))

    def coupled_micro_batches(self) -> str | None:
        size, group = self.args.per_device_train_batch_size, self.num_generations
        if self._regroups and size % group == 0:
            return None
        return (
            "completions of one prompt lie in several of them. Make `per_device_train_batch_size` a multiple of "
            "`num_generations`, and leave `group_batches` on"
        )

    def _set_up_batching(self) -> None:
        self._regroups = self.args.group_batches or self.args.skip_zero_rows
        reason = self._why_not_regrouped() if self._regroups else None
        if reason is not None:
            self._regroups = False
            logger.warning(f"Micro-batches are cut as in TRL, rows without effect included: {reason}.")

    def _why_not_regrouped(self) -> str | None:
        if self._is_vlm:
            return "the model is multimodal"
        if self.loss_type == "bnpo":
            return "`loss_type='bnpo'` averages over the micro-batch, so that its rows must not change"
        if self.top_entropy_quantile < 1.0:
            return "`top_entropy_quantile` compares the tokens of a micro-batch, so that its rows must not change"
        if self._entropy_bonus_enabled:
            return "the entropy bonus averages over the micro-batch, so that its rows must not change"
        if self.aux_loss_enabled:
            return "the load-balancing loss covers every token"
        accumulation, steps = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        if accumulation % steps and steps % accumulation:
            return (
                f"optimizer steps ({accumulation} micro-batches) and generation batches ({steps}) end at different "
                "places; make one a multiple of the other"
            )
        return None

    def _prepare_inputs(self, generation_batch):
        if not (self._regroups and self.model.training):
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            record = RolloutRecord.from_batch(self._generate_and_score_completions(generation_batch))
            self._buffered_inputs = [self._rows(record, rows) for rows in self._micro_batches(record)]
        return self._buffered_inputs[self._step % steps]

    def _micro_batches(self, record: RolloutRecord) -> list[torch.Tensor]:
        """Row numbers of each micro-batch of this generation batch."""
        steps = self.args.steps_per_generation
        groups = torch.unique(record.group_ids)
        rank = torch.empty(int(groups.max()) + 1, dtype=torch.long)
        rank[groups.cpu()] = torch.randperm(len(groups))
        order = torch.argsort(rank[record.group_ids.cpu()], stable=True)
        computed = torch.ones(len(order), dtype=torch.bool)
        if self.args.skip_zero_rows:
            computed = self.contributing_rows(record).cpu()
        windows = max(1, steps // self.args.gradient_accumulation_steps)
        batches = []
        for window in order.chunk(windows):
            rows, count = window[computed[window]], steps // windows
            cut = self._cut(rows, record.group_ids.cpu()[rows], count)
            # Every rank runs equally many micro-batches: where rows do not suffice, ones without effect stand in
            batches += cut + list(window[~computed[window]][: count - len(cut)].unsqueeze(1))
        skipped = torch.tensor([len(order) - sum(map(len, batches)), len(order)], device=self.accelerator.device)
        self.log_mean("rows/skipped_fraction", *skipped)
        return batches

    def _cut(self, rows: torch.Tensor, group_ids: torch.Tensor, count: int) -> list[torch.Tensor]:
        """At most `count` micro-batches of `rows`, none empty, between groups if whole groups fit."""
        limit = self.args.per_device_train_batch_size
        sizes = torch.unique_consecutive(group_ids, return_counts=True)[1].tolist()
        batches: list[list[torch.Tensor]] = []
        room = 0
        for group in rows.split(sizes):
            if len(group) > room:
                batches.append([])
                room = limit
            batches[-1].append(group)
            room -= len(group)
        if len(batches) > count or max(sizes, default=0) > limit:
            return list(rows.tensor_split(min(count, len(rows))))
        return [torch.cat(groups) for groups in batches]

    @staticmethod
    def _rows(record: RolloutRecord, rows: torch.Tensor) -> dict[str, Any]:
        rows = rows.to(record.completion_ids.device)
        return {name: value[rows] if value.dim() else value for name, value in record.as_batch().items()}
