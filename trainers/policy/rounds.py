"""How the policy family gets a generation batch: rounds of sampling, scoring, repairing, filtering and refilling."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import gather_object

from .draft import Draft, Pool
from .record import Generation, ScoredBatch, Source
from .rollout import PolicyRollout


class PolicyRounds(PolicyRollout):
    """Stages from the choice of prompts to whole groups. See [`~papertrl.PolicyTrainer`] for how they fit in."""

    # --- Stages -------------------------------------------------------------------------------------------------

    def choose_prompts(self, count: int, round: int) -> list[int] | None:
        """
        Stage *choose prompts*: rows of the training dataset for the next generation.

        Called on every rank right before generation, so that [`observe_batch`] of the previous batch has happened;
        all ranks must answer alike.

        Args:
            count (`int`):
                Number of prompts, over all ranks.
            round (`int`):
                0 for the batch itself, then the refill round.

        Returns:
            `list[int]` of length `count`, or `None` (round 0 only) for the data loader's own rows.
        """
        chooser = self.slots.prompts()
        if chooser is not None:
            return chooser.choose(count, round, self.keyed_generator(round))
        if round == 0:
            return None
        order = torch.randperm(len(self.train_dataset), generator=self.keyed_generator(round))
        return order.repeat(-(-count // len(order)))[:count].tolist()

    def rollout(self, inputs: list[dict[str, Any]], prompts: list[Any]) -> Generation:
        """
        Stage *roll out*: one completion for each of this rank's rows.

        Args:
            inputs (`list[dict]`):
                Dataset rows, each repeated for its group.
            prompts (`list`):
                Prompt of each row, as text or messages.
        """
        return Generation.from_trl(inputs, prompts, super()._generate(prompts))

    def score(self, scored: ScoredBatch) -> torch.Tensor:
        """Stage *score*: rewards `(rows, sources)` from what the reward functions returned, in `scored.rewards`."""
        return scored.rewards

    def groups_to_repair(self, scored: ScoredBatch) -> torch.Tensor | None:
        """
        Stage *repair*, first part: groups that need it, bool `(groups,)` in order of group id, or `None` for none.

        Methods combine by disjunction: `mine | super().groups_to_repair(scored)` where that is not `None`.
        """
        return None

    def repair(self, draft: Draft) -> None:
        """
        Stage *repair*, second part: replace rows of failing groups, in place, by ones sampled anew.

        Called on every rank, if there is a group to repair, with the same rows of all ranks. [`reroll`] samples;
        [`Draft.take`] replaces. Rewards are scored anew afterwards.
        """

    def demonstrate(self, draft: Draft) -> None:
        """
        Stage *demonstrate*: replace rows of groups that still fail, in place, by demonstrations.

        Called after [`repair`], under the same conditions; [`Draft.demonstrate`] replaces.
        """

    def filter_groups(self, scored: ScoredBatch) -> torch.Tensor | None:
        """
        Stage *filter groups*: which groups to keep, bool `(groups,)` in order of group id, or `None` for all.

        Methods combine by conjunction: `keep & super().filter_groups(scored)` where that is not `None`. Groups with a
        demonstration stay in any case.
        """
        return None

    def refill_rounds(self) -> int:
        """How many times filtered groups may be replaced by freshly sampled ones in one generation batch."""
        return 0

    # --- Services for stages ------------------------------------------------------------------------------------

    def reroll(self, inputs: list[dict[str, Any]], prompts: list[Any], group_size: int = 1) -> Draft:
        """
        Sample and score further completions, under prompts other than the dataset's.

        The rows are shared out among the ranks and come back to all of them. Ranks sample equally many: repeated rows
        fill up and are dropped. Must be called on every rank with the same arguments.

        Args:
            inputs (`list[dict]`):
                Dataset row of each completion, for the reward functions; at least one.
            prompts (`list`):
                What to sample it under, as text or messages.
            group_size (`int`, *optional*, defaults to 1):
                Adjacent rows that count as a group in the stage *score*.

        Returns:
            [`Draft`]: its rows hold the tokens of the prompt they were sampled under, and the dataset's prompt.
        """
        rank, world, count = self.accelerator.process_index, self.accelerator.num_processes, len(inputs)
        local = -(-count // world)
        part = [min(i, count - 1) for i in range(rank * local, (rank + 1) * local)]
        inputs, prompts = [inputs[i] for i in part], [prompts[i] for i in part]
        with self._unlogged(), self._singly(group_size):
            generation = Generation.from_trl(inputs, [row["prompt"] for row in inputs], super()._generate(prompts))
            scored = self._score(generation, None)
        return Draft(gather_object(generation.rows())[:count], scored.first(count))

    def complete(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        sampling_logps: list[list[float | None]] | None = None,
    ) -> Generation:
        """
        What [`rollout`] gives, from completions that are there already: decoded and logged as TRL does.

        Must be called on every rank, with equally many rows.

        Args:
            inputs (`list[dict]`), prompts (`list`):
                As in [`rollout`].
            prompt_ids (`list[list[int]]`), completion_ids (`list[list[int]]`):
                Tokens of prompts and completions.
            sampling_logps (`list[list[float]]`, *optional*):
                Log-probabilities under the distribution sampled from, `None` where not known.
        """
        sampled = {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": sampling_logps}
        kept, self.rollout_func = self.rollout_func, lambda prompts, trainer: sampled
        try:
            return Generation.from_trl(inputs, prompts, super()._generate(prompts))
        finally:
            self.rollout_func = kept

    def verify(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
    ) -> torch.Tensor:
        """
        Rewards `(rows, sources)` of completions that are not rows of the batch; nothing of it is logged.

        Must be called on every rank, with equally many rows.

        Args:
            inputs (`list[dict]`), prompts (`list`):
                As in [`rollout`].
            prompt_ids (`list[list[int]]`), completion_ids (`list[list[int]]`):
                Tokens of prompts and completions.
        """
        seen, metrics = self.state.num_input_tokens_seen, self._pending_metrics
        self._pending_metrics = defaultdict(list)
        with self._unlogged():
            generation = self.complete(inputs, prompts, prompt_ids, completion_ids)
            rewards = super()._calculate_rewards(
                generation.inputs, generation.prompts, generation.completions, generation.completion_ids
            )
            self.state.num_input_tokens_seen = seen
        self._pending_extra_logs.clear()
        self._pending_metrics = metrics
        first = self.accelerator.process_index * len(inputs)
        return rewards[first : first + len(inputs)]

    @contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Keep what is logged out of the batch's metrics, but for the number of tokens."""
        kept = self._metrics
        self._metrics = {mode: defaultdict(list) for mode in kept}
        try:
            yield
        finally:
            self._metrics = kept
            self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]

    @contextmanager
    def _singly(self, group_size: int) -> Iterator[None]:
        """Generate one completion per prompt, and take `group_size` adjacent rows for a group."""
        kept = self.num_generations, self._group_size
        self.num_generations, self._group_size = 1, group_size
        try:
            yield
        finally:
            self.num_generations, self._group_size = kept

    # --- Rounds -------------------------------------------------------------------------------------------------

    def _generate(self, prompts):
        """Between TRL's preparation of prompts and its use of completions: generate, score, repair and refill."""
        generation, scored = self._round(self._inputs, prompts, self._prompt_indices)
        if self.model.training:
            keep = self._kept_groups(scored)
            if keep is not None:
                generation, scored = self._refill(generation, scored, keep)
            # TRL goes on to log and score under the lists it passed, which must name the rows that remain
            self._inputs[:], prompts[:] = generation.inputs, generation.prompts
        self._pending_extra_logs.update(generation.log_extra)
        self._scored = scored
        self._set_sampled_prompts(generation)
        return generation.as_trl()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self._scored.rewards

    def _round(self, inputs: list[dict[str, Any]], prompts: list[Any], indices: list[int] | None):
        generation = self.rollout(inputs, prompts)
        for component in self.slots:
            component.sampled()
        scored = self._score(generation, indices)
        failing = self.groups_to_repair(scored) if self.model.training else None
        if failing is None or not bool(failing.any()):
            return generation, scored
        draft = Draft(gather_object(generation.rows()), scored)
        self.repair(draft)
        self.demonstrate(draft)
        with self._unlogged():
            scored.rewards = scored.raw_rewards.clone()
            scored.rewards = self.score(scored)
        scored.rewards[scored.source == Source.DEMONSTRATION] = torch.nan
        return Generation.from_rows(draft.rows[scored.local]), scored

    def _score(self, generation: Generation, indices: list[int] | None) -> ScoredBatch:
        rewards = super()._calculate_rewards(
            generation.inputs, generation.prompts, generation.completions, generation.completion_ids
        )
        generation.log_extra = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        device, local_rows = rewards.device, len(generation.prompts)
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        source = generation.source or [Source.POLICY] * local_rows
        facts = [[len(ids), ids[-1] not in ends, s] for ids, s in zip(generation.completion_ids, source, strict=True)]
        facts = self.accelerator.gather(torch.tensor(facts, dtype=torch.int64, device=device))
        group_ids = torch.arange(rewards.shape[0], device=device) // self._group_size
        prompt_indices = torch.full_like(group_ids, -1)
        if indices is not None:
            prompt_indices = torch.tensor(indices, device=device).repeat_interleave(self._group_size)
        first = self.accelerator.process_index * local_rows
        scored = ScoredBatch(
            rewards=rewards.clone(),
            raw_rewards=rewards.clone(),
            source_names=self.reward_func_names,
            group_ids=group_ids,
            prompt_indices=prompt_indices,
            lengths=facts[:, 0],
            truncated=facts[:, 1].bool(),
            source=facts[:, 2],
            off_prompt=torch.zeros_like(group_ids, dtype=torch.bool),
            usable=torch.ones_like(group_ids, dtype=torch.bool),
            local=slice(first, first + local_rows),
            sampled_rewards=rewards,
        )
        scored.rewards = self.score(scored)
        scored.validate()
        return scored

    def _kept_groups(self, scored: ScoredBatch) -> torch.Tensor | None:
        keep = self.filter_groups(scored)
        if keep is None:
            return None
        shown = torch.zeros_like(keep)
        shown[scored.group_ids[scored.source == Source.DEMONSTRATION]] = True
        return keep | shown

    def _refill(self, generation: Generation, scored: ScoredBatch, keep: torch.Tensor):
        """
        Replace filtered groups by fresh ones until the batch is full or the rounds are used up.

        Groups keep their order; places that stay empty take filtered groups back, marked as not usable.
        """
        size, world = self._group_size, self.accelerator.num_processes
        total = scored.rewards.shape[0] // size
        kept, spare = Pool(), Pool()
        sampled_rewards = scored.sampled_rewards
        round, wanted = 0, total
        while True:
            rows = gather_object(generation.rows())
            for group in range(wanted):
                (kept if keep[group] else spare).add(rows, scored, group, size)
            round += 1
            if len(kept) >= total or round > self.refill_rounds():
                break
            indices = self.choose_prompts(total - len(kept), round)
            wanted = len(indices)
            # Ranks generate equally many rows. What only fills them up is dropped, so that the result is the same
            # however many ranks there are
            while len(indices) * size % world:
                indices = [*indices, indices[0]]
            inputs = self._dataset_rows(indices)
            generation, scored = self._round(inputs, [row["prompt"] for row in inputs], indices)
            keep = self._kept_groups(scored)
        missing = max(0, total - len(kept))
        self.log_metric("groups/refill_rounds", float(round - 1))
        self.log_metric("groups/unfilled_fraction", missing / total)
        scored.sampled_rewards = sampled_rewards
        return kept.assemble(spare, total, size, self.accelerator.process_index, world, scored)

    def _dataset_rows(self, indices: list[int]) -> list[dict[str, Any]]:
        """This rank's part of the dataset rows `indices`, each repeated for its group."""
        dataset = self.train_dataset
        if self.args.remove_unused_columns:
            dataset = self._remove_unused_columns(dataset, description="training")
        repeated = [index for index in indices for _ in range(self._group_size)]
        local = len(repeated) // self.accelerator.num_processes
        first = self.accelerator.process_index * local
        return [dataset[index] for index in repeated[first : first + local]]
