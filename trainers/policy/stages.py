"""What a policy method may change: every stage of a step with its default, in the order in which data flows."""

from typing import Any

import torch
from transformers import LogitsProcessorList

from ...losses.policy.groups import group_mean, group_std, weighted_sum
from ...losses.policy.surrogate import cispo_surrogate, clipped_surrogate, kl_estimate, sapo_surrogate
from ...losses.terms import LossTerm
from .draft import Draft
from .objective import CLIPPED, PolicyStatistics, column, vespo_weights
from .passes import OldPass
from .record import Generation, RolloutRecord, ScoredBatch


class PolicyStages:
    """Stages of [`~papertrl.PolicyTrainer`], which holds what they call. By default a step is that of TRL."""

    # --- Prompts and completions --------------------------------------------------------------------------------

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
        return self.generate(inputs, prompts)

    def logits_processors(self) -> LogitsProcessorList:
        """
        Stage *roll out*: what changes the next-token logits of completions before temperature and filters.

        Each treats a row by its tokens and logits alone. Append to `super().logits_processors()`.
        """
        return LogitsProcessorList([p for component in self.slots for p in component.logits_processors()])

    # --- Rewards of groups --------------------------------------------------------------------------------------

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

    # --- Advantages ---------------------------------------------------------------------------------------------

    def old_pass_needs(self) -> frozenset[str]:
        """
        Stage *statistics*, first half: what `collect_statistics` needs of the pass over the rollouts.

        Any of `"logps"`, `"entropy"`, `"hidden_states"`, `"mlp_inputs"`. One pass serves all methods, and TRL itself
        where it makes one; with no needs there is no extra pass.
        """
        return frozenset().union(*(component.needs() for component in self.slots))

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        """
        Stage *statistics*, second half: put per-token or per-row values of this rank into `record.statistics`.

        What the advantage stages need per row goes, gathered from all ranks, into `scored.statistics`. Advantages are
        not known yet.
        """
        for component in self.slots:
            component.see_rollouts(record, scored, old_pass)

    def combine_rewards(self, scored: ScoredBatch) -> torch.Tensor:
        """Stage *combine rewards*: one reward per row `(rows,)`, NaN on rows that no source scored."""
        weights = self.reward_weights.to(scored.rewards.device)
        if self.multi_objective_aggregation == "sum_then_normalize":
            return weighted_sum(scored.rewards, weights)
        normalized = [
            (source - group_mean(source, scored.group_ids)) / (group_std(source, scored.group_ids) + 1e-4)
            for source in scored.rewards.unbind(1)
        ]
        return weighted_sum(torch.stack(normalized, dim=1), weights)

    def baseline(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        """Stage *baseline*: what is subtracted from each row's combined reward, `(rows,)`."""
        if self.multi_objective_aggregation == "normalize_then_sum":
            return torch.nanmean(rewards).expand_as(rewards)
        return group_mean(rewards, scored.group_ids)

    def scale(self, scored: ScoredBatch, rewards: torch.Tensor, centered: torch.Tensor) -> torch.Tensor:
        """Stage *scale*: advantages `(rows,)` from combined and centered rewards."""
        if self.scale_rewards == "none" and self.multi_objective_aggregation == "sum_then_normalize":
            return centered
        if self.scale_rewards == "batch" or self.multi_objective_aggregation == "normalize_then_sum":
            std = group_std(rewards, torch.zeros_like(scored.group_ids))
        else:
            std = group_std(rewards, scored.group_ids)
        return centered / (std + 1e-4)

    def advantages(self, scored: ScoredBatch, record: RolloutRecord) -> torch.Tensor:
        """
        Stage *advantages*: `(rows,)`, from the three stages before; NaN on rows that no source scored.

        For methods that weigh sources after each was scaled, with [`scaled`], or by what `record` holds. Its
        `advantages` are not set yet.
        """
        return self.scaled(scored, self.combine_rewards(scored))

    def spread(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        """
        Stage *spread*: change `record.advantages`, from `(batch,)` to `(batch, time)` where tokens differ, in place.

        Values on padding have no effect. Where rows change as a whole, change `scored.advantages` with them.
        """

    # --- What is trained ----------------------------------------------------------------------------------------

    def select(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        """
        Stage *select*: narrow `record.loss_mask` and lower `record.row_weight` in place.

        `completion_mask` stays as it is: it is the attention mask. The base counts tokens and rows anew afterwards.
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

    def prepare_objective(self, record: RolloutRecord) -> None:
        """Stage *prepare objective*: put what the loss needs of the whole selected batch into `record.statistics`."""
        for component in self.slots:
            component.prepared(record)

    def observe_batch(self, scored: ScoredBatch, record: RolloutRecord) -> None:
        """Stage *feedback*: update state from a finished batch; from values that are the same on every rank."""
        for component in self.slots:
            component.observe(scored, record)

    def observe_evaluation(self, metrics: dict[str, float]) -> None:
        """Stage *feedback*: update state from the metrics of an evaluation during training, the same on every rank."""

    # --- Loss ---------------------------------------------------------------------------------------------------

    def change_ratios(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        """
        Stage *ratios*: put something else in the place of importance weights, by [`PolicyStatistics.reshape`].

        For rows that have other ratios than to the policy that sampled them under this prompt. An objective without
        ratios is refused beside who acts here.
        """

    def trust_region(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        """
        Stage *trust region*: change the range in which ratios are trusted.

        Ranges become tensors where tokens differ, both `epsilon_low` and `epsilon_high` at a time. What was made
        infinite by another method stays so.
        """

    def objective(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """
        Stage *objective*: the policy-gradient loss of every token, before any divergence or extra term.

        Args:
            stats ([`PolicyStatistics`]):
                The gradient-carrying pass.
            record ([`RolloutRecord`]):
                The micro-batch.

        Returns:
            `torch.Tensor` of shape `(batch, time)`, or `(batch, 1)` for losses per sequence.
        """
        advantages = column(record.advantages)
        if self.loss_type in CLIPPED:
            return clipped_surrogate(stats.ratio, advantages, stats.epsilon_low, stats.epsilon_high, stats.delta)
        if self.loss_type == "cispo":
            return cispo_surrogate(stats.ratio, advantages, stats.logps, stats.epsilon_high)
        if self.loss_type == "sapo":
            return sapo_surrogate(
                stats.ratio, advantages, self.args.sapo_temperature_pos, self.args.sapo_temperature_neg
            )
        if self.loss_type == "vespo":
            return -vespo_weights(self.args, stats, record) * advantages * stats.logps
        raise ValueError(f"`loss_type` must be one of TRL's loss types, got {self.loss_type!r}.")

    def divergence(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """Stage *divergence*: per-token penalty `(batch, time)` towards the reference, weighted by `beta`."""
        return kl_estimate(stats.logps, record.ref_per_token_logps)

    def extra_terms(self, stats: PolicyStatistics, record: RolloutRecord) -> list[LossTerm]:
        """
        Stage *extra terms*: named terms of shape `(batch, time)`, aggregated over tokens just as the policy loss is.

        Append to `super().extra_terms(stats, record)`.
        """
        return []
