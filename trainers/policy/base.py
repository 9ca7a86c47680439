"""The policy family's base: `GRPOTrainer`, opened into stages that methods override."""

import difflib
from typing import Any

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import GenerationConfig
from transformers.training_args import OptimizerNames
from trl import GRPOConfig, GRPOTrainer

from ...core.configuration import MethodConfigMixin, method_config, method_field
from ...core.family import POLICY
from ..checkpoints import rows_per_step, split
from ..method import MethodTrainer
from .batching import MicroBatches, joined, recut, why_not_regrouped
from .budget import TokenBudget
from .record import RolloutRecord
from .sampling import Endings, check_stop_strings
from .stages import PolicyStages
from .trl import OpenedGRPOTrainer

logger = get_logger(__name__)


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
    max_tokens_per_micro_batch: int | None = method_field(
        None,
        "Most tokens, prompts included, that one pass of an update computes. An update then takes as many passes as "
        "its rows need, at least `gradient_accumulation_steps`, whatever `per_device_train_batch_size` is. A row "
        "that is longer has a pass to itself. `None` cuts by rows.",
        ge=1,
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

    def validate(self):
        super().validate()
        check_stop_strings(self)
        self._check_token_budget()
        known = vars(GenerationConfig())
        unknown = [name for name in self.generation_kwargs or {} if name not in known and not self.use_vllm]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            raise ValueError(
                f"`generation_kwargs` must have names of options of `generate`, got {unknown}, which would do nothing."
                + (f" Did you mean `{near[0]}`?" if near else "")
            )

    def _check_token_budget(self) -> None:
        limit = self.max_tokens_per_micro_batch
        if limit is None:
            return
        if not self.group_batches:
            raise ValueError(
                f"`max_tokens_per_micro_batch` must be None with `group_batches=False`, got {limit}: it cuts between "
                "groups. Leave one of the two out."
            )
        if self.optim in (OptimizerNames.LOMO, OptimizerNames.ADALOMO):
            raise ValueError(
                f"`max_tokens_per_micro_batch` must be None with `optim='{OptimizerNames(self.optim).value}'`, got "
                f"{limit}: this optimizer makes an update at every backward pass. Choose another one."
            )


class PolicyTrainer(MethodTrainer, PolicyStages, OpenedGRPOTrainer):
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
    | ratios | `change_ratios` | importance weights → what stands in their place |
    | trust region | `trust_region` | the range in which ratios are trusted |
    | objective | `objective`, `divergence` | statistics of the gradient pass → per-token loss |
    | extra terms | `extra_terms` | statistics of the gradient pass → named terms |
    | after backward | `after_backward` | gradient so far |
    | before update | `before_update` | whole gradient → learning rates, or no step |

    Choice, repair, demonstration, filter, selection and feedback act in training only; evaluation takes every prompt
    as it comes.

    [`~papertrl.trainers.policy.stages.PolicyStages`] has the stages, with what they take and give;
    [`~papertrl.trainers.policy.services.PolicyServices`] what they may call.
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
        "ratios": ("change_ratios",),
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
        given["reward_funcs"] = self.load_reward_models(given.get("reward_funcs"), args)
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
        self.endings = Endings(self)
        self._trained_tokens = torch.zeros((), dtype=torch.int64, device=self.accelerator.device)
        self._set_up_sharing(
            self.temperature, self.args.cast_lm_head_to_fp32, ("log_probs", "entropy"), left_padded=True
        )
        self._set_up_micro_batches()
        if (drawing or replacing) and self._is_vlm:
            names = [*drawing, *replacing]
            raise ValueError(f"Methods {names} support text models only, got a vision-language model.")
        self.attach_slots()

    def _set_up_micro_batches(self) -> None:
        args = self.args
        if not (args.group_batches or args.skip_zero_rows):
            return
        reason, limit = why_not_regrouped(self), args.max_tokens_per_micro_batch
        if reason is not None and limit is not None:
            raise ValueError(
                f"`max_tokens_per_micro_batch` must be None here, got {limit}: {reason}. Change that, or leave it out."
            )
        if reason is not None:
            logger.warning(f"Micro-batches are cut as in TRL, rows without effect included: {reason}.")
            return
        windows = max(1, args.steps_per_generation // args.gradient_accumulation_steps)
        self.batching = MicroBatches(args.steps_per_generation, windows, args.per_device_train_batch_size)
        if limit is not None:
            self.budget = TokenBudget(limit, args.steps_per_generation // windows)

    @classmethod
    def needs_reference(cls, args: Any) -> bool:
        """
        Whether some method needs, under the config `args`, the log-probabilities of the frozen initial policy.

        They are in `record.ref_per_token_logps` then, also with `beta` 0. Extend through `super()`.
        """
        return False

    def _drawing_prompts(self, args: Any) -> list[str]:
        """Names of the methods that choose or refill prompts."""
        chooser = self.slots.prompts()
        return [*([chooser.method.name] if chooser else []), *self.names_acting("filter_groups", args)]

    def _replacing_rows(self, args: Any) -> list[str]:
        """Names of the methods that put rows of their own making into groups."""
        found = [*self.deciding("rollout", args), *self.acting("repair", args), *self.acting("demonstrate", args)]
        return list(dict.fromkeys(owner.method.name for owner in found))

    def coupled_micro_batches(self) -> str | None:
        if self.budget is not None:
            return (
                "`max_tokens_per_micro_batch` puts long rows together, and more short ones. Leave it out, and make "
                "`per_device_train_batch_size` a multiple of `num_generations`"
            )
        if self.batching is not None and self.args.per_device_train_batch_size % self.num_generations == 0:
            return None
        return (
            "completions of one prompt lie in several of them. Make `per_device_train_batch_size` a multiple of "
            "`num_generations`, and leave `group_batches` on"
        )

    def warn_if_on_policy(self, method: str, what: str) -> None:
        """Tell that `what` never acts where every update is of the very policy that sampled its batch."""
        accumulation = self.args.gradient_accumulation_steps
        if self.args.steps_per_generation * self.num_iterations <= accumulation:
            logger.warning(
                f"'{method}': {what} without effect, since each generation batch serves one update, whose ratios are "
                f"all 1. Set `num_iterations` above 1, or `steps_per_generation` to a multiple of "
                f"`gradient_accumulation_steps`={accumulation}."
            )

    def choosing_itself(self) -> bool:
        return True

    def rows_of_a_step(self) -> tuple[int, str]:
        size, group = self.args.generation_batch_size, self.num_generations
        return size // group, f"the prompts of `generation_batch_size` {size} with `num_generations` {group}"

    def keyed_generator(self, *key: int) -> torch.Generator:
        """CPU generator for this generation batch and `key`: the same on every rank, layout and after a resume."""
        number = self.args.seed
        for part in (self._step // self._reuse(), *key):
            number = (number * 1_000_003 + part + 1) % 2**62
        return torch.Generator().manual_seed(number)

    def _reuse(self) -> int:
        """Micro-batches of this rank from one generation to the next."""
        return self.args.steps_per_generation * self.num_iterations

    def log_means(self, sums: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        if self._pooled is None or not self.model.training:
            super().log_means(sums)
            return
        # Passes hold more or fewer rows: one mean over all of an optimizer step, not the mean of theirs
        for name, parts in sums.items():
            local = torch.stack([part.detach().float() for part in parts])
            self._pooled[name] = self._pooled[name] + local if name in self._pooled else local

    # --- Accounts -----------------------------------------------------------------------------------------------

    @property
    def sampled_tokens(self) -> int:
        """Completion tokens that this rank has sampled so far, for whatever purpose."""
        return self._sampled_tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens of the loss, in rows of non-zero weight, of this rank's generation batches so far."""
        return int(self._trained_tokens)

    # --- State --------------------------------------------------------------------------------------------------

    def layout(self) -> dict[str, Any]:
        names = ("num_generations", "generation_batch_size", "num_iterations")
        return super().layout() | {name: getattr(self.args, name) for name in names}

    def method_state(self) -> dict[str, Any]:
        generation, place = divmod(self._step, self._reuse())
        return super().method_state() | {"policy": {"generation": generation, "rows": place * self._global_rows()}}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        place, rest = divmod(state["policy"]["rows"], self._global_rows())
        if rest:
            raise self._cannot_share("begin within a micro-batch")
        self._step = state["policy"]["generation"] * self._reuse() + place
        if isinstance(self.train_dataset, Dataset) and self.shuffle_dataset:
            # The sampler draws one permutation per epoch from a generator of its own, which a resume starts anew
            for _ in range(int(self.state.epoch)):
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)

    def _global_rows(self) -> int:
        """Rows of a micro-batch, over all ranks."""
        return self.args.train_batch_size * self.accelerator.num_processes

    def rank_state(self) -> dict[str, Any]:
        return super().rank_state() | {
            "buffer": self._buffered_inputs if self._step % self._reuse() else None,
            "tokens": [self.sampled_tokens, self.trained_tokens],
            "max_tokens": self.args.max_tokens_per_micro_batch,
        }

    def load_rank_state(self, state: dict[str, Any]) -> None:
        super().load_rank_state(state)
        self._sampled_tokens, trained = state["tokens"]
        self._trained_tokens.fill_(trained)
        if state["buffer"] is not None:
            device = self.accelerator.device
            buffer = [
                {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
                for batch in state["buffer"]
            ]
            self._buffered_inputs = self._cut_as_here(buffer, state["max_tokens"])

    def share_rank_states(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        if any(state["buffer"] is not None for state in states):
            raise self._cannot_share("reuse rollouts that lie on other processes")
        tokens = [sum(counts) for counts in zip(*(state["tokens"] for state in states), strict=True)]
        own = {"buffer": None, "tokens": tokens if self.is_world_process_zero() else [0, 0], "max_tokens": None}
        return super().share_rank_states(states) | own

    def _cut_as_here(self, buffer: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
        """Micro-batches of a generation batch saved under `limit`, cut anew where this run would cut otherwise."""
        steps, accumulation = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if len(buffer) == steps and limit == self.args.max_tokens_per_micro_batch:
            return buffer
        windows = max(1, steps // accumulation)
        if self._is_vlm or steps % windows or len(buffer) % windows:
            raise self._cannot_share("reuse rollouts that are cut otherwise")
        if self.budget is None:
            return recut(buffer, windows, steps // windows, self.batching)
        # Rows without tokens of the loss stand in for passes, whose number may be another one here
        record = RolloutRecord.from_batch(joined(buffer))
        size = len(buffer) // windows
        lengths = [sum(len(b["group_ids"]) for b in buffer[i * size : (i + 1) * size]) for i in range(windows)]
        scored = record.loss_mask.any(1)
        parts = torch.arange(len(scored), device=scored.device).split(lengths)
        return self._cut_by_tokens(record, [rows[scored[rows]].tolist() for rows in parts])

    def _cannot_share(self, what: str) -> ValueError:
        passes = self.num_iterations * self.args.generation_batch_size // rows_per_step(self.layout())
        return ValueError(
            f"`resume_from_checkpoint`: step {self.state.global_step} was trained with {split(self.resumed_layout)}, "
            f"but this run has {split(self.layout())} and would {what}. Resume with the former, or from a checkpoint "
            f"with which a generation ends: one whose step is a multiple of {max(1, passes)}."
        )
