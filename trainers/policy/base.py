"""The policy family's base: `GRPOTrainer`, opened into stages that methods override."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from ...core.configuration import MethodConfigMixin, method_config, method_field
from ...core.family import POLICY
from ...losses.policy.groups import by_group, group_mean, group_std, weighted_sum
from ..method import MethodTrainer
from .record import RolloutRecord, ScoredBatch
from .rounds import PolicyRounds
from .scoring import OldPass

# First half of the SHA-256 of the source of what this family relies on in TRL; tests/test_pinned.py
PINNED = {
    "trl.trainer.grpo_trainer.GRPOTrainer.__init__": "18f01b7a46c9544b23d74e822bafa4cb",
    "trl.trainer.grpo_trainer.GRPOTrainer._prepare_inputs": "f824e7fb0714795697c9b4d574de1e13",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate": "2a27fdf8f5e6f3562508eec3efb9e9da",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_single_turn": "e0f02e4fc094cefdb306c6f04da26a25",
    "trl.trainer.grpo_trainer.GRPOTrainer._generate_and_score_completions": "1fa48922792dcd5c72da155cfe99db47",
    "trl.trainer.grpo_trainer.GRPOTrainer._calculate_rewards": "736ae29b083840b5da2638b55ad12586",
    "trl.trainer.grpo_trainer.GRPOTrainer._tokenize_prompts": "d2d27f7c9bfda85f1c3225785fa2f094",
    "trl.trainer.grpo_trainer.GRPOTrainer._get_per_token_logps_and_entropies": "ea73c3909275851d0cd664b1e7694905",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_high_entropy_mask": "ce6e86287bac23d6cc5d6c08a5f72e4b",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_off_policy_mask": "8ee1e196461141a71a87b47d4d1a0d2e",
    "trl.trainer.grpo_trainer.GRPOTrainer.get_gamma_weights": "3b5fa9ea16cbd80265afa79f4af0239f",
    "trl.trainer.grpo_trainer.GRPOTrainer._compute_loss": "80295546bbdbf6f711acce7f6e69b010",
    "trl.trainer.grpo_trainer.GRPOTrainer._get_train_sampler": "36497afb4d311dc9a80d914d27893fe0",
    "trl.trainer.grpo_trainer.GRPOTrainer.log": "1e7772819cc8cf0980bc9f0b48d6c1c3",
    "trl.trainer.grpo_trainer.GRPOTrainer._save_checkpoint": "ec91bde1236491119dc68afed1d02f08",
    "trl.trainer.grpo_trainer.GRPOTrainer._load_optimizer_and_scheduler": "5c1772becdfd7fdb07894217ecdb6dd7",
    "transformers.trainer.Trainer._get_grad_norm": "913ba6f52f074d10a4981ffcaac608e9",
    "transformers.trainer.Trainer._evaluate": "64dfb995ce2027daf172a4f807e3d8fc",
    "trl.trainer.utils.RepeatSampler": "ba139f4a43eeecd4976bc51c850039df",
    "trl.trainer.utils.add_fused_lm_head": "422d009f04b66659982f9545a90d560b",
    "trl.trainer.utils.maybe_gather_lm_head_ctx": "d4d59d01150623ce15106e71fcf519a2",
    "trl.kernels.chunked_logprob.ChunkedLogProbFunction": "3661e8975a9f64cc39d250ecf3e2ae22",
}


@method_config
class PolicyConfig(MethodConfigMixin, GRPOConfig):
    """Configuration of [`PolicyTrainer`]: that of [`~trl.GRPOTrainer`] and what every policy method shares."""

    fast_rollouts: bool = method_field(
        True,
        "Whether completions on the transformers backend come from a loop that prefills each distinct prompt once and "
        "drops finished rows. Same law as `generate`; a seed gives other tokens.",
    )
    share_prompts: bool = method_field(
        True,
        "Whether each distinct prompt is computed once for all of its completions, and completions without their "
        "padding. Same log-probabilities and gradients as TRL's, up to rounding.",
    )
    group_batches: bool = method_field(
        True,
        "Whether micro-batches are cut from shuffled groups instead of shuffled rows, so that prompts are shared.",
    )
    skip_zero_rows: bool = method_field(
        True,
        "Whether rows that add nothing to loss and gradient are left out of the update. Metrics of the update "
        "(`entropy`, `clip_ratio/*`, `kl`) then cover the rows that are computed.",
    )
    success_threshold: float = method_field(
        0.0,
        "A completion counts as solved if its weighted reward is above this. For methods that tell solved prompts "
        "from unsolved ones.",
    )
    check_records: bool = method_field(
        False,
        "Whether to check the values of every rollout record, not only its shapes. For debugging: it waits for the "
        "device once per generation batch.",
    )


class PolicyTrainer(MethodTrainer, PolicyRounds):
    """
    [`~trl.GRPOTrainer`] whose step is a sequence of stages. By itself it trains as its parent does: to the bit with
    `fast_rollouts`, `share_prompts`, `group_batches` and `skip_zero_rows` off. With them on, as they are by default,
    sampling follows the same law with other draws, and gradients agree up to rounding.

    In the order in which data flows:

    | stage | method to override | input → output |
    |---|---|---|
    | choose prompts | `choose_prompts` | number, round → dataset rows; right before generation |
    | roll out | `rollout`, `logits_processors` | rows and prompts → completions |
    | score | `score` | `ScoredBatch` → rewards `(rows, sources)` |
    | repair | `groups_to_repair`, `repair` | failing groups → rows sampled anew under other prompts |
    | demonstrate | `demonstrate` | groups that still fail → rows replaced by demonstrations |
    | filter groups | `filter_groups` | `ScoredBatch` → which groups to keep; the others are refilled |
    | statistics | `old_pass_needs`, `collect_statistics` | pass over the rollouts → `record.statistics` |
    | combine rewards | `combine_rewards` | rewards `(rows, sources)` → `(rows,)` |
    | baseline | `baseline` | combined rewards → what is subtracted `(rows,)` |
    | scale | `scale` | centered rewards → advantages `(rows,)` |
    | advantages | `advantages` | the three stages above, for all sources at once |
    | spread | `spread` | advantages `(rows,)` → of tokens |
    | select | `select` | record → loss mask and row weights |
    | prepare objective | `prepare_objective` | selected record → batch-wide thresholds in `record.statistics` |
    | feedback | `observe_batch`, `observe_evaluation` | rewards, advantages → state of the next choice |
    | trust region | `trust_region` | ratios and the range in which they are trusted |
    | objective | `objective`, `divergence` | statistics of the gradient pass → per-token loss |
    | extra terms | `extra_terms` | statistics of the gradient pass → named terms |
    | after backward | `after_backward` | gradient so far |
    | before update | `before_update` | whole gradient → learning rates, or no step |

    Choice, repair, demonstration, filter, selection and feedback act in training only; evaluation takes every prompt
    as it comes.
    """

    family = POLICY
    stages = {
        "columns": ("needed_columns",),
        "reference": ("needs_reference",),
        "choose_prompts": ("choose_prompts",),
        "rollout": ("rollout", "logits_processors"),
        "score": ("score",),
        "repair": ("groups_to_repair", "repair"),
        "demonstrate": ("demonstrate",),
        "filter_groups": ("filter_groups", "refill_rounds"),
        "statistics": ("old_pass_needs", "collect_statistics"),
        "combine_rewards": ("combine_rewards",),
        "baseline": ("baseline",),
        "scale": ("scale",),
        "advantages": ("advantages",),
        "spread": ("spread",),
        "select": ("select",),
        "contribute": ("contributing_rows",),
        "prepare_objective": ("prepare_objective",),
        "feedback": ("observe_batch", "observe_evaluation"),
        "trust_region": ("trust_region",),
        "objective": ("objective",),
        "divergence": ("divergence",),
        "extra_terms": ("extra_terms",),
        "after_backward": ("after_backward",),
        "before_update": ("before_update",),
    }
    config_class = PolicyConfig
    _tag_names = ["trl", "papertrl", "grpo"]

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, stages=None, **trl_kwargs):
        given = self.trl_arguments(GRPOTrainer, model, reward_funcs, args, *trl_args, stages=stages, **trl_kwargs)
        args, train_dataset = given["args"], given.get("train_dataset")
        drawing = self._drawing_prompts(args)
        if drawing and train_dataset is not None and not isinstance(train_dataset, Dataset):
            raise ValueError(
                f"Methods {drawing} choose or refill prompts and need a map-style `train_dataset`, got "
                f"`{type(train_dataset).__name__}`. Load the dataset without streaming."
            )
        if drawing and given.get("environment_factory") is not None:
            raise ValueError(
                f"Methods {drawing} choose or refill prompts, which `environment_factory` does not support: an "
                "environment owns its prompts. Leave one of the two out."
            )
        replacing = self._replacing_rows(args)
        for option in ("environment_factory", "tools"):
            if replacing and given.get(option):
                raise ValueError(
                    f"Methods {replacing} put rows of their own into groups, which `{option}` does not support: such "
                    "rows have no turns with tools. Leave one of the two out."
                )
        self._reference_only = args.beta == 0.0 and self.needs_reference(args)
        with self._reference_on(args):
            super().__init__(**given)
        self.beta = args.beta
        self._set_up_scoring()
        self._set_up_batching()
        if (drawing or replacing) and self._is_vlm:
            names = [*drawing, *replacing]
            raise ValueError(f"Methods {names} support text models only, got a vision-language model.")
        self.attach_slots()

    def _drawing_prompts(self, args: Any) -> list[str]:
        """Names of the methods that choose or refill prompts."""
        chooser = self.slots.prompts()
        return [*([chooser.method.name] if chooser else []), *self.names_acting("filter_groups", args)]

    def _replacing_rows(self, args: Any) -> list[str]:
        """Names of the methods that put rows of their own making into groups."""
        found = [*self.deciding("rollout", args), *self.acting("repair", args), *self.acting("demonstrate", args)]
        return list(dict.fromkeys(owner.method.name for owner in found))

    @classmethod
    def needs_reference(cls, args: Any) -> bool:
        """
        Whether some method needs, under the config `args`, the log-probabilities of the frozen initial policy.

        They are in `record.ref_per_token_logps` then, also with `beta` 0. Extend through `super()`.
        """
        return False

    @contextmanager
    def _reference_on(self, holder: Any) -> Iterator[None]:
        """Make TRL build and run its reference, which it does where `holder.beta` is not 0."""
        if self._reference_only:
            holder.beta = 1.0
        try:
            yield
        finally:
            if self._reference_only:
                holder.beta = 0.0

    # --- Stages -------------------------------------------------------------------------------------------------

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

    def select(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        """
        Stage *select*: narrow `record.loss_mask` and lower `record.row_weight` in place.

        `completion_mask` stays as it is: it is the attention mask. The base counts tokens and rows anew afterwards.
        """

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

    def choosing_itself(self) -> bool:
        return True

    # --- Services for stages ------------------------------------------------------------------------------------

    def scaled(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        """Advantages `(rows,)` of one reward per row, by the stages *baseline* and *scale*."""
        return self.scale(scored, rewards, rewards - self.baseline(scored, rewards))

    def solved(self, scored: ScoredBatch) -> torch.Tensor:
        """Rows `(rows,)` whose weighted reward, after the stage *score*, is above `success_threshold`."""
        return (
            weighted_sum(scored.rewards, self.reward_weights.to(scored.rewards.device)) > self.args.success_threshold
        )

    def solved_share(self, scored: ScoredBatch) -> torch.Tensor:
        """Share of each group's completions that are solved `(groups,)`; of those that were scored, NaN for none."""
        solved = self.solved(scored).float().masked_fill(scored.rewards.isnan().all(1), torch.nan)
        return torch.nanmean(by_group(solved, scored.group_ids), dim=1)

    def keyed_generator(self, *key: int) -> torch.Generator:
        """CPU generator for this generation batch and `key`: the same on every rank and after a resume."""
        number = self.args.seed
        for part in (self._step, *key):
            number = (number * 1_000_003 + part + 1) % 2**62
        return torch.Generator().manual_seed(number)

    def gather_ragged(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """
        Concatenate one-dimensional tensors of different lengths over ranks.

        Args:
            values (`torch.Tensor` of shape `(n,)`):
                This rank's values.
            fill (`float`):
                A number that does not occur among them.
        """
        gathered = self.accelerator.gather(self.accelerator.pad_across_processes(values, dim=0, pad_index=fill))
        return gathered[gathered != fill]

    # --- Generation ---------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs):
        train = self.model.training
        self._group_size = self.num_generations if train else self.num_generations_eval
        self._prompt_indices = None
        if train:
            chosen = self.choose_prompts(self.accelerator.num_processes * len(inputs) // self._group_size, round=0)
            if chosen is not None:
                self._prompt_indices = chosen
                inputs = self._dataset_rows(chosen)
        self._inputs = list(inputs)
        needs = self.old_pass_needs()
        self._old_pass = None
        self._capture_old_pass = bool(needs) and self._trl_makes_old_pass()
        with self._reference_on(self):
            output = super()._generate_and_score_completions(self._inputs)
        self._capture_old_pass = False

        scored = self._scored
        record = RolloutRecord.from_generation(output, scored)
        self._account_for_sampled_prompts(record)
        if needs:
            self.collect_statistics(record, scored, self._old_pass or self._make_old_pass(record))
        scored.advantages = torch.nan_to_num(self.advantages(scored, record), nan=0.0) * scored.usable
        scored.validate()
        self._log_advantages(scored.advantages)
        record.advantages = scored.advantages[scored.local].clone()
        self.spread(record, scored)
        if train:
            self.select(record, scored)
        record.validate()
        self._count(record)
        self.prepare_objective(record)
        record.validate(values=self.args.check_records)
        if train:
            self.observe_batch(scored, record)
        return record.as_batch()

    # --- Updates ------------------------------------------------------------------------------------------------

    def _evaluate(self, *args, **kwargs):
        metrics = super()._evaluate(*args, **kwargs)
        self.observe_evaluation(metrics)
        return metrics

    # --- Accounts -----------------------------------------------------------------------------------------------

    def _count(self, record: RolloutRecord) -> None:
        live = record.row_weight > 0
        tokens = (record.loss_mask * live.unsqueeze(1)).sum()
        totals = self.accelerator.gather(torch.stack([tokens, live.sum()]).unsqueeze(0)).sum(0)
        record.num_items_in_batch, record.num_rows_in_batch = totals[0], totals[1].float()

    def _log_advantages(self, advantages: torch.Tensor) -> None:
        logged = self._logs["advantages"]
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())

    # --- State --------------------------------------------------------------------------------------------------

    def rank_state(self) -> dict[str, Any]:
        reused = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return super().rank_state() | {"step": self._step, "buffer": self._buffered_inputs if reused else None}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        super().load_rank_state(state)
        self._step = state["step"]
        if isinstance(self.train_dataset, Dataset) and self.shuffle_dataset:
            # The sampler draws one permutation per epoch from a generator of its own, which a resume starts anew
            for _ in range(int(self.state.epoch)):
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
        if state["buffer"] is not None:
            device = self.accelerator.device
            self._buffered_inputs = [
                {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
                for batch in state["buffer"]
            ]

    def _get_train_sampler(self, dataset=None):
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler
