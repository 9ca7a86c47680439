"""One generation batch of the policy family, from the choice of its prompts to the record that the loss reads."""

from typing import Any

import torch
from accelerate.utils import gather_object

from .draft import Draft, Pool
from .passes import OldPass, pad_rows, score_record
from .record import Generation, RolloutRecord, ScoredBatch, Source


class GenerationBatch:
    """
    A generation batch while it is made: `trainer.generation`, which is `None` at other times.

    It calls the stages of its trainer in their order: [`choose`] its prompts; [`sample`] whole groups, in rounds of
    sampling, scoring, repairing, filtering and refilling, where TRL generates; [`finish`] what TRL made of them. In
    between come TRL's passes over the rollouts, of which the first is taken for the old pass.

    Args:
        trainer ([`PolicyTrainer`]):
            Whose stages are called.
        inputs (`list[dict]`):
            Dataset rows of this rank from the data loader, each repeated for its group.
        awaits_old_pass (`bool`):
            Whether TRL makes a pass over finished rollouts with the weights that sampled them. [`enter_pass`] ends it.

    Attributes:
        training (`bool`):
            False in evaluation, which takes every prompt as it comes.
        group_size (`int`):
            Adjacent rows of one prompt.
        prompt_indices (`list[int]`, *optional*):
            Row of the training dataset of each group of all ranks, where a method chose them.
        inputs (`list[dict]`):
            This rank's dataset rows: those that were chosen, then those of the rows that remain.
        needs (`frozenset[str]`):
            What methods need of the old pass.
        rollouts ([`Generation`]), scored ([`ScoredBatch`]):
            What [`sample`] made.
        sampled_prompts (tuple of two `torch.Tensor` of shape `(batch, sampled_length)`, *optional*):
            Ids and mask of the prompts that rows were sampled under, where some are scored under others.
        old_pass ([`OldPass`], *optional*):
            The pass over the rollouts, once it was made.
    """

    rollouts: Generation
    scored: ScoredBatch

    def __init__(self, trainer: Any, inputs: list[dict[str, Any]], awaits_old_pass: bool):
        self.trainer = trainer
        self.inputs = list(inputs)
        self.awaits_old_pass = awaits_old_pass
        self.training = trainer.model.training
        self.group_size = trainer.num_generations if self.training else trainer.num_generations_eval
        self.prompt_indices: list[int] | None = None
        self.needs: frozenset[str] = frozenset()
        self.sampled_prompts: tuple[torch.Tensor, torch.Tensor] | None = None
        self.old_pass: OldPass | None = None

    def choose(self) -> None:
        """Decide on the prompts."""
        trainer = self.trainer
        if self.training:
            count = trainer.accelerator.num_processes * len(self.inputs) // self.group_size
            self.prompt_indices = trainer.choose_prompts(count, round=0)
            if self.prompt_indices is not None:
                self.inputs = self._dataset_rows(self.prompt_indices)
        self.needs = trainer.old_pass_needs()

    # --- Rounds -------------------------------------------------------------------------------------------------

    def sample(self, prompts: list[Any]) -> None:
        """Sample and score whole groups; in training also repair, filter and refill them."""
        rollouts, scored = self._round(self.inputs, prompts, self.prompt_indices)
        if self.training:
            keep = self._kept_groups(scored)
            if keep is not None:
                rollouts, scored = self._refill(rollouts, scored, keep)
        self.rollouts, self.scored, self.inputs = rollouts, scored, rollouts.inputs
        if bool(scored.off_prompt.any()):
            trainer = self.trainer
            self.sampled_prompts = pad_rows(
                rollouts.sampled_prompt_ids or rollouts.prompt_ids,
                trainer._tokenizer.pad_token_id,
                "left",
                trainer.accelerator.device,
                trainer.pad_to_multiple_of,
            )

    def _round(
        self, inputs: list[dict[str, Any]], prompts: list[Any], indices: list[int] | None
    ) -> tuple[Generation, ScoredBatch]:
        trainer = self.trainer
        rollouts = trainer.rollout(inputs, prompts)
        for component in trainer.slots:
            component.sampled()
        scored = score_groups(trainer, rollouts, self.group_size, indices)
        failing = trainer.groups_to_repair(scored) if self.training else None
        if failing is None or not bool(failing.any()):
            return rollouts, scored
        draft = Draft(gather_object(rollouts.rows()), scored)
        trainer.repair(draft)
        trainer.demonstrate(draft)
        with trainer.unlogged():
            scored.rewards = scored.raw_rewards.clone()
            scored.rewards = trainer.score(scored)
        scored.rewards[scored.source == Source.DEMONSTRATION] = torch.nan
        return Generation.from_rows(draft.rows[scored.local]), scored

    def _kept_groups(self, scored: ScoredBatch) -> torch.Tensor | None:
        keep = self.trainer.filter_groups(scored)
        if keep is None:
            return None
        shown = torch.zeros_like(keep)
        shown[scored.group_ids[scored.source == Source.DEMONSTRATION]] = True
        return keep | shown

    def _refill(self, rollouts: Generation, scored: ScoredBatch, keep: torch.Tensor) -> tuple[Generation, ScoredBatch]:
        """
        Replace filtered groups by fresh ones until the batch is full or the rounds are used up.

        Groups keep their order; places that stay empty take filtered groups back, marked as not usable.
        """
        trainer, size, world = self.trainer, self.group_size, self.trainer.accelerator.num_processes
        total = scored.rewards.shape[0] // size
        kept, spare = Pool(), Pool()
        sampled_rewards = scored.sampled_rewards
        round, wanted = 0, total
        while True:
            rows = gather_object(rollouts.rows())
            for group in range(wanted):
                (kept if keep[group] else spare).add(rows, scored, group, size)
            round += 1
            if len(kept) >= total or round > trainer.refill_rounds():
                break
            indices = trainer.choose_prompts(total - len(kept), round)
            wanted = len(indices)
            # Ranks generate equally many rows. What only fills them up is dropped, so that the result is the same
            # however many ranks there are
            while len(indices) * size % world:
                indices = [*indices, indices[0]]
            inputs = self._dataset_rows(indices)
            rollouts, scored = self._round(inputs, [row["prompt"] for row in inputs], indices)
            keep = self._kept_groups(scored)
        missing = max(0, total - len(kept))
        trainer.log_metric("groups/refill_rounds", float(round - 1))
        trainer.log_metric("groups/unfilled_fraction", missing / total)
        scored.sampled_rewards = sampled_rewards
        return kept.assemble(spare, total, size, trainer.accelerator.process_index, world, scored)

    def _dataset_rows(self, indices: list[int]) -> list[dict[str, Any]]:
        """This rank's part of the dataset rows `indices`, each repeated for its group."""
        trainer = self.trainer
        dataset = trainer.train_dataset
        if trainer.args.remove_unused_columns:
            dataset = trainer._remove_unused_columns(dataset, description="training")
        repeated = [index for index in indices for _ in range(self.group_size)]
        local = len(repeated) // trainer.accelerator.num_processes
        first = trainer.accelerator.process_index * local
        return [dataset[index] for index in repeated[first : first + local]]

    # --- From completions to the record -------------------------------------------------------------------------

    def enter_pass(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, time: int
    ) -> tuple[torch.Tensor, torch.Tensor, frozenset[str]]:
        """
        What the first pass of TRL scores instead of the given rows, and what is kept of it.

        Old log-probabilities, and with them TRL's correction for vLLM, are under the prompts of sampling. Statistics
        are of the distribution that is trained: where the two differ, another pass makes them.
        """
        self.awaits_old_pass = False
        if self.sampled_prompts is None:
            return input_ids, attention_mask, self.needs
        ids, mask = self.sampled_prompts
        return (
            torch.cat([ids, input_ids[:, -time:]], dim=1),
            torch.cat([mask, attention_mask[:, -time:]], dim=1),
            frozenset(),
        )

    def finish(self, output: dict[str, Any]) -> RolloutRecord:
        """The record of what TRL's `_generate_and_score_completions` returned: advantages, selection, feedback."""
        trainer, scored = self.trainer, self.scored
        if trainer.mask_truncated_completions and trainer.endings.stops is not None:
            finished = ~scored.truncated[scored.local].unsqueeze(1)
            for name in {"completion_mask", "tool_mask"} & output.keys():
                output[name] = output[name] * finished
        record = RolloutRecord.from_generation(output, scored)
        if self.sampled_prompts is not None:
            record.sampled_prompt_ids, record.sampled_prompt_mask = self.sampled_prompts
            if record.old_per_token_logps is None:
                record.old_per_token_logps = score_record(trainer, record, prompts=self.sampled_prompts).logps
        if self.needs:
            self.old_pass = self.old_pass or score_record(trainer, record, self.needs)
            trainer.collect_statistics(record, scored, self.old_pass)
        scored.advantages = torch.nan_to_num(trainer.advantages(scored, record), nan=0.0) * scored.usable
        scored.validate()
        trainer.log_advantages(scored.advantages)
        record.advantages = scored.advantages[scored.local].clone()
        trainer.spread(record, scored)
        if self.training:
            trainer.select(record, scored)
        record.validate()
        self._count(record)
        trainer.prepare_objective(record)
        record.validate(values=trainer.args.check_records)
        if self.training:
            trainer.observe_batch(scored, record)
        return record

    def _count(self, record: RolloutRecord) -> None:
        counts = torch.stack([record.live_tokens(), (record.row_weight > 0).sum()])
        totals = self.trainer.accelerator.gather(counts.unsqueeze(0)).sum(0)
        record.num_items_in_batch, record.num_rows_in_batch = totals[0], totals[1].float()


def score_groups(
    trainer: Any, rollouts: Generation, group_size: int, prompt_indices: list[int] | None = None
) -> ScoredBatch:
    """
    Completions of all ranks with their rewards, after the stage *score*.

    Args:
        trainer ([`PolicyTrainer`]):
            Whose reward functions and stage are called.
        rollouts ([`Generation`]):
            This rank's completions.
        group_size (`int`):
            Adjacent rows of a group.
        prompt_indices (`list[int]`, *optional*):
            Row of the training dataset of each group of all ranks.
    """
    rewards = trainer.reward(rollouts)
    device, local_rows = rewards.device, len(rollouts.prompts)
    finished = trainer.endings.finished(rollouts.sampled_prompt_ids or rollouts.prompt_ids, rollouts.completion_ids)
    source = rollouts.source or [Source.POLICY] * local_rows
    facts = [[len(ids), not f, s] for ids, f, s in zip(rollouts.completion_ids, finished, source, strict=True)]
    facts = trainer.accelerator.gather(torch.tensor(facts, dtype=torch.int64, device=device))
    group_ids = torch.arange(rewards.shape[0], device=device) // group_size
    indices = torch.full_like(group_ids, -1)
    if prompt_indices is not None:
        indices = torch.tensor(prompt_indices, device=device).repeat_interleave(group_size)
    first = trainer.accelerator.process_index * local_rows
    scored = ScoredBatch(
        rewards=rewards.clone(),
        raw_rewards=rewards.clone(),
        source_names=trainer.reward_func_names,
        group_ids=group_ids,
        prompt_indices=indices,
        lengths=facts[:, 0],
        truncated=facts[:, 1].bool(),
        source=facts[:, 2],
        off_prompt=torch.zeros_like(group_ids, dtype=torch.bool),
        usable=torch.ones_like(group_ids, dtype=torch.bool),
        local=slice(first, first + local_rows),
        sampled_rewards=rewards,
    )
    scored.rewards = trainer.score(scored)
    scored.validate()
    return scored
