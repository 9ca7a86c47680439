"""The policy family's base: `GRPOTrainer`, opened into stages that methods override."""

from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from trl import GRPOConfig

from ...configuration import MethodConfigMixin, method_config, method_field
from ...losses.policy.groups import group_mean, group_std, weighted_sum
from ..method import MethodTrainer
from .record import Generation, RolloutRecord, ScoredBatch
from .rollout import PolicyRollout
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
    check_records: bool = method_field(
        False,
        "Whether to check the values of every rollout record, not only its shapes. For debugging: it waits for the "
        "device once per generation batch.",
    )


class PolicyTrainer(MethodTrainer, PolicyRollout):
    """
    [`~trl.GRPOTrainer`] whose step is a sequence of stages. By itself it trains as its parent does: to the bit with
    `fast_rollouts`, `share_prompts`, `group_batches` and `skip_zero_rows` off. With them on, as they are by default,
    sampling follows the same law with other draws, and gradients agree up to rounding.

    In the order in which data flows:

    | stage | method to override | input → output |
    |---|---|---|
    | choose prompts | `choose_prompts` | number, round → dataset rows; right before generation |
    | score | `score` | `ScoredBatch` → rewards `(rows, sources)` |
    | filter groups | `filter_groups` | `ScoredBatch` → which groups to keep; the others are refilled |
    | combine rewards | `combine_rewards` | rewards `(rows, sources)` → `(rows,)` |
    | baseline | `baseline` | combined rewards → what is subtracted `(rows,)` |
    | scale | `scale` | centered rewards → advantages `(rows,)` |
    | statistics | `old_pass_needs`, `collect_statistics` | pass over the rollouts → `record.statistics` |
    | select | `select` | record → loss mask and row weights |
    | prepare objective | `prepare_objective` | selected record → batch-wide thresholds in `record.statistics` |
    | feedback | `observe_batch` | rewards, advantages → state of the next choice |
    | objective | `objective`, `divergence` | statistics of the gradient pass → per-token loss |
    | extra terms | `extra_terms` | statistics of the gradient pass → named terms |

    Choice, filter, selection and feedback act in training only; evaluation takes every prompt as it comes.
    """

    family = "policy"
    trl_suffix = "GRPOTrainer"
    stages = (
        "choose_prompts",
        "score",
        "filter_groups",
        "combine_rewards",
        "baseline",
        "scale",
        "statistics",
        "select",
        "prepare_objective",
        "feedback",
        "objective",
        "divergence",
        "extra_terms",
    )
    config_class = PolicyConfig
    _tag_names = ["trl", "papertrl", "grpo"]

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        args = self.make_config(args, model)
        train_dataset = trl_args[0] if trl_args else trl_kwargs.get("train_dataset")
        self.check_columns(train_dataset)
        drawing = self.prompt_drawing_methods(args)
        if drawing and train_dataset is not None and not isinstance(train_dataset, Dataset):
            raise ValueError(
                f"Methods {drawing} choose or refill prompts and need a map-style `train_dataset`, got "
                f"`{type(train_dataset).__name__}`. Load the dataset without streaming."
            )
        if drawing and trl_kwargs.get("environment_factory") is not None:
            raise ValueError(
                f"Methods {drawing} choose or refill prompts, which `environment_factory` does not support: an "
                "environment owns its prompts. Leave one of the two out."
            )
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        self._set_up_scoring()
        self._set_up_batching()
        if drawing and self._is_vlm:
            raise ValueError(f"Methods {drawing} support text models only, got a vision-language model.")

    @classmethod
    def prompt_drawing_methods(cls, args: Any) -> list[str]:
        """Names of the methods that, under the config `args`, choose or refill prompts. Extend through `super()`."""
        return []

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
        if round == 0:
            return None
        order = torch.randperm(len(self.train_dataset), generator=self.keyed_generator(round))
        return order.repeat(-(-count // len(order)))[:count].tolist()

    def score(self, scored: ScoredBatch) -> torch.Tensor:
        """Stage *score*: rewards `(rows, sources)` from what the reward functions returned, in `scored.rewards`."""
        return scored.rewards

    def filter_groups(self, scored: ScoredBatch) -> torch.Tensor | None:
        """
        Stage *filter groups*: which groups to keep, bool `(groups,)` in order of group id, or `None` for all.

        Methods combine by conjunction: `keep & super().filter_groups(scored)` where that is not `None`.
        """
        return None

    def refill_rounds(self) -> int:
        """How many times filtered groups may be replaced by freshly sampled ones in one generation batch."""
        return 0

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

    def collect_statistics(self, record: RolloutRecord, old_pass: OldPass) -> None:
        """Stage *statistics*, second half: put per-token or per-row values into `record.statistics`."""

    def select(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        """
        Stage *select*: narrow `record.loss_mask` and lower `record.row_weight` in place.

        `completion_mask` stays as it is: it is the attention mask. The base counts tokens and rows anew afterwards.
        """

    def prepare_objective(self, record: RolloutRecord) -> None:
        """Stage *prepare objective*: put what the loss needs of the whole selected batch into `record.statistics`."""

    def observe_batch(self, scored: ScoredBatch, record: RolloutRecord) -> None:
        """Stage *feedback*: update state from a finished batch; from values that are the same on every rank."""

    # --- Services for stages ------------------------------------------------------------------------------------

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
        output = super()._generate_and_score_completions(self._inputs)
        self._capture_old_pass = False

        scored = self._scored
        rewards = self.combine_rewards(scored)
        centered = rewards - self.baseline(scored, rewards)
        advantages = torch.nan_to_num(self.scale(scored, rewards, centered), nan=0.0)
        scored.advantages = advantages * scored.usable
        scored.validate()
        self._log_advantages(scored.advantages)

        record = RolloutRecord.from_generation(output, scored)
        if needs:
            self.collect_statistics(record, self._old_pass or self._make_old_pass(record))
        if train:
            self.select(record, scored)
        record.validate()
        self._count(record)
        self.prepare_objective(record)
        record.validate(values=self.args.check_records)
        if train:
            self.observe_batch(scored, record)
        return record.as_batch()

    def _generate(self, prompts):
        """Between TRL's preparation of prompts and its use of completions: generate, score, filter and refill."""
        generation = Generation.from_trl(self._inputs, prompts, super()._generate(prompts))
        scored = self._score(generation, self._prompt_indices)
        if self.model.training:
            keep = self.filter_groups(scored)
            if keep is not None:
                generation, scored = self._refill(generation, scored, keep)
                # TRL goes on to log and score under the lists it passed, which must name the rows that remain
                self._inputs[:], prompts[:] = generation.inputs, generation.prompts
        self._pending_extra_logs.update(generation.log_extra)
        self._scored = scored
        return generation.as_trl()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return self._scored.rewards

    def _score(self, generation: Generation, indices: list[int] | None) -> ScoredBatch:
        rewards = super()._calculate_rewards(
            generation.inputs, generation.prompts, generation.completions, generation.completion_ids
        )
        generation.log_extra = dict(self._pending_extra_logs)
        self._pending_extra_logs.clear()
        device, local_rows = rewards.device, len(generation.prompts)
        ends = [*self.eos_token_ids, self._tokenizer.pad_token_id]
        facts = torch.tensor(
            [[len(ids), ids[-1] not in ends] for ids in generation.completion_ids], dtype=torch.int64, device=device
        )
        facts = self.accelerator.gather(facts)
        group_ids = torch.arange(rewards.shape[0], device=device) // self._group_size
        prompt_indices = torch.full_like(group_ids, -1)
        if indices is not None:
            prompt_indices = torch.tensor(indices, device=device).repeat_interleave(self._group_size)
        first = self.accelerator.process_index * local_rows
        scored = ScoredBatch(
            rewards=rewards,
            source_names=self.reward_func_names,
            group_ids=group_ids,
            prompt_indices=prompt_indices,
            lengths=facts[:, 0],
            truncated=facts[:, 1].bool(),
            usable=torch.ones_like(group_ids, dtype=torch.bool),
            local=slice(first, first + local_rows),
            sampled_rewards=rewards,
        )
        scored.rewards = self.score(scored)
        scored.validate()
        return scored

    def _refill(self, generation: Generation, scored: ScoredBatch, keep: torch.Tensor):
        """
        Replace filtered groups by fresh ones until the batch is full or the rounds are used up.

        Groups keep their order; places that stay empty take filtered groups back, marked as not usable.
        """
        size, world = self._group_size, self.accelerator.num_processes
        total = scored.rewards.shape[0] // size
        kept, spare = _Pool(), _Pool()
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
            prompts = [row["prompt"] for row in inputs]
            generation = Generation.from_trl(inputs, prompts, super()._generate(prompts))
            scored = self._score(generation, indices)
            keep = self.filter_groups(scored)
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


class _Pool:
    """Whole groups of rows, with what was scored of them."""

    NAMES = ("rewards", "prompt_indices", "lengths", "truncated")

    def __init__(self):
        self.rows: list[list[dict[str, Any]]] = []
        self.scores: list[dict[str, torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: list[dict[str, Any]], scored: ScoredBatch, group: int, size: int) -> None:
        part = slice(group * size, (group + 1) * size)
        self.rows.append(rows[part])
        self.scores.append({name: getattr(scored, name)[part] for name in self.NAMES})

    def assemble(self, spare: "_Pool", total: int, size: int, rank: int, world: int, like: ScoredBatch):
        """The first `total` groups, filled up from `spare`, as this rank's generation and the scored batch."""
        filled = min(len(self), total)
        rows = [row for group in (self.rows[:filled] + spare.rows)[:total] for row in group]
        scores = (self.scores[:filled] + spare.scores)[:total]
        device, local = like.rewards.device, total * size // world
        group_ids = torch.arange(total * size, device=device) // size
        scored = ScoredBatch(
            source_names=like.source_names,
            group_ids=group_ids,
            usable=group_ids < filled,
            local=slice(rank * local, (rank + 1) * local),
            sampled_rewards=like.sampled_rewards,
            **{name: torch.cat([score[name] for score in scores]) for name in self.NAMES},
        )
        return Generation.from_rows(rows[scored.local]), scored
