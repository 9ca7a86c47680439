"""Dynamic reward weighting on GRPO."""

import math
from typing import Any

import torch
from accelerate.logging import get_logger

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.dynamic_reward_weighting import (
    HypervolumeGuide,
    clip_factors,
    exponentiated_gradient,
    influence,
    meta_reward,
)
from ...models.observation import decoder_layers, gradients_apart
from .base import PolicyConfig, PolicyTrainer
from .objective import column
from .record import RolloutRecord, ScoredBatch

logger = get_logger(__name__)

# The released code takes the gradients of layers 10 to 25 of 36
_MIDDLE = (10 / 36, 26 / 36)
_MOST_REWARDS = 4


@method_config
class DynamicRewardWeightingGRPOConfig(PolicyConfig):
    """
    Configuration of [`DynamicRewardWeightingGRPOTrainer`].

    `reward_weights`, positive and brought to sum 1, are the weights at the start.
    """

    weighting_mode: str = method_field(
        "gradient",
        "`gradient` moves weight to rewards whose gradients help all rewards; `hypervolume` scales advantages by what "
        "the policy adds to the Pareto front; `none` is GRPO.",
        choices=("gradient", "hypervolume", "none"),
        was="reward_weighting",
    )
    weighting_regularization: float = method_field(
        1e-5,
        "μ; the weights' step size is learning rate / μ, 0.1 with the paper's learning rate of 1e-6. Keep that ratio "
        "where the learning rate differs.",
        gt=0,
    )
    weighting_accumulation: int = method_field(
        1, "Generation batches whose influences are averaged for one update of the weights.", ge=1
    )
    weighting_layers: list[int] = method_field(
        [],
        "Decoder layers whose gradients count, from 0. Empty takes the middle ones, as 10 to 25 of the 36 in the "
        "released code.",
    )
    weighting_hypervolume_low: float = method_field(
        0.5, "Factor of the advantages while the front does not grow.", gt=0, was="hypervolume_low"
    )
    weighting_hypervolume_gain: float = method_field(
        1.5, "What the factor gains at most as the front grows.", gt=0, was="hypervolume_gain"
    )
    weighting_hypervolume_ema: float = method_field(
        0.9,
        "Without evaluations, the front is that of the mean training rewards, averaged over generation batches with "
        "this decay.",
        ge=0,
        lt=1,
        was="hypervolume_ema",
    )

    def validate(self):
        super().validate()
        if any(isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 for layer in self.weighting_layers):
            raise ValueError(f"`weighting_layers` must be layer numbers from 0, got {self.weighting_layers}.")
        if self.weighting_mode == "gradient" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "Gradients per reward need advantages per reward: `multi_objective_aggregation` must be "
                f"'sum_then_normalize', got {self.multi_objective_aggregation!r}. Change it, or `weighting_mode`."
            )


class DynamicRewardWeightingGRPOTrainer(PolicyTrainer):
    r"""
    Dynamic reward weighting: GRPO whose weights of several rewards follow what the policy still learns from each.

    With `"gradient"` (arXiv:2509.11452), g_k being the gradient of the loss with advantages from reward k alone and
    η the learning rate,

    $$
    w \leftarrow \mathrm{softmax}\Big(\log w + \frac{\eta}{\mu} I\Big), \qquad
    I_k = \sum_j \langle g_k, g_j \rangle,
    $$

    before the same batch is trained on with the new weights. g_k is taken once per generation batch, at the weights
    that sampled it, over chosen decoder layers: of the unclipped surrogate, with the divergence of `beta`, by one
    forward pass and one backward pass per reward. Each is summed over ranks, then clipped to `max_grad_norm`; the norm
    is that of the chosen layers, where the released code has that of the model.

    With `"hypervolume"`, the front holds the mean rewards that the policy has reached, beyond those of the initial
    one, and

    $$
    m = 0.5 + 1.5 \tanh(\Delta HV)
    $$

    multiplies the next advantages, ΔHV being what the latest means add to the front's hypervolume. The paper
    multiplies rewards, which standard deviations per group cancel. ΔHV is in the product of the rewards' units: bring
    rewards to the order of 1. The means are those of evaluations during training, the first one being the reference
    (set `eval_on_start` for the initial policy's). Without evaluations, they are those of the generation batches,
    smoothed.

    Relations:
        Constrained RLHF holds rewards at thresholds instead; the two replace the same stage. TRL's `reward_weights`
        alone is the fixed mixture. Other methods' baselines and scales act on each reward by itself.

    Paper: [Learning to Optimize Multi-Objective Alignment Through Dynamic Reward
    Weighting](https://huggingface.co/papers/2509.11452). The released hypervolume counts points below the reference
    as negative; here they are clipped to it.

    Example:

    ```python
    >>> from papertrl import DynamicRewardWeightingGRPOConfig, DynamicRewardWeightingGRPOTrainer
    >>> args = DynamicRewardWeightingGRPOConfig(weighting_mode="gradient")  # doctest: +SKIP
    >>> trainer = DynamicRewardWeightingGRPOTrainer(
    ...     "Qwen/Qwen3-0.6B", [accuracy, brevity, clarity], args, train_dataset=dataset
    ... )  # doctest: +SKIP
    ```
    """

    method = declared("dynamic_reward_weighting")
    extends = {"advantages": {"weighting_mode": "none"}, "feedback": {"weighting_mode": "none"}}
    # The base combines rewards, by weights that this method decides: nobody may do it in a way of their own
    replaces = {"combine_rewards": {"weighting_mode": "none"}}
    config_class = DynamicRewardWeightingGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        kind = self.args.weighting_mode
        self._guide = HypervolumeGuide()
        self._smoothed: list[float] | None = None
        self._contribution, self._meta = 0.0, 1.0
        self._influences = torch.zeros(len(self.reward_func_names), device=self.accelerator.device)
        self._accumulated = 0
        if kind == "none":
            return
        if kind == "gradient" and len(self.reward_func_names) < 2:
            logger.warning(
                "'dynamic_reward_weighting' does nothing: `weighting_mode='gradient'` needs two reward functions or "
                f"more to weigh, got {self.reward_func_names}. Pass another, or set 'hypervolume'."
            )
        if bool((self.reward_weights <= 0).any()):
            raise ValueError(
                f"`reward_weights` must be positive to be weighed dynamically, got {self.reward_weights.tolist()}. "
                "Change the sign of a reward function that is to be lowered, and leave out one without weight."
            )
        self.reward_weights = self.reward_weights / self.reward_weights.sum()
        if kind == "hypervolume" and len(self.reward_func_names) > _MOST_REWARDS:
            raise ValueError(
                f"`weighting_mode='hypervolume'` takes at most {_MOST_REWARDS} reward functions, got "
                f"{self.reward_func_names}: the exact volume costs too much beyond. Set 'gradient'."
            )
        if kind == "gradient":
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise ValueError(
                    "`weighting_mode='gradient'` needs whole gradients on every rank, which DeepSpeed and FSDP "
                    "shard. Launch with DDP, or set 'hypervolume'."
                )
            self._chosen_layers()

    def advantages(self, scored: ScoredBatch, record: RolloutRecord) -> torch.Tensor:
        if self.args.weighting_mode == "gradient" and self.model.training:
            self._follow_gradients(scored, record)
        advantages = super().advantages(scored, record)
        return self._meta * advantages if self.args.weighting_mode == "hypervolume" else advantages

    def observe_batch(self, scored: ScoredBatch, record: RolloutRecord) -> None:
        super().observe_batch(scored, record)
        for name, weight in zip(self.reward_func_names, self.reward_weights, strict=True):
            self.log_metric(f"dynamic_reward_weighting/{name}/weight", weight)
        if self.args.weighting_mode == "hypervolume":
            self.log_metric("dynamic_reward_weighting/meta_reward", self._meta)
            if self.args.eval_strategy == "no":
                self._smooth(scored.sampled_rewards.nanmean(dim=0).tolist())
            if self._guide.points:
                self.log_metric("dynamic_reward_weighting/contribution", self._contribution)
                self.log_metric("dynamic_reward_weighting/hypervolume", self._guide.volume())
                self.log_metric("dynamic_reward_weighting/front_size", float(len(self._guide.points) - 1))

    def observe_evaluation(self, metrics: dict[str, float]) -> None:
        super().observe_evaluation(metrics)
        if self.args.weighting_mode == "hypervolume":
            means = [metrics[f"eval_rewards/{name}/mean"] for name in self.reward_func_names]
            if None not in means:
                self._grow(means)

    def method_state(self) -> dict[str, Any]:
        state = super().method_state()
        return state | {
            "dynamic_reward_weighting": {
                "weights": self.reward_weights,
                "influences": self._influences,
                "accumulated": self._accumulated,
                "front": self._guide.points,
                "smoothed": self._smoothed,
                "contribution": self._contribution,
                "meta_reward": self._meta,
            }
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        saved = state["dynamic_reward_weighting"]
        self.reward_weights = saved["weights"].to(self.reward_weights.device)
        self._influences = saved["influences"].to(self._influences.device)
        self._accumulated = saved["accumulated"]
        self._contribution, self._meta = saved["contribution"], saved["meta_reward"]
        self._guide.points, self._smoothed = saved["front"], saved["smoothed"]

    # --- By gradients -------------------------------------------------------------------------------------------

    def _follow_gradients(self, scored: ScoredBatch, record: RolloutRecord) -> None:
        columns = [self.scaled(scored, rewards) for rewards in scored.rewards.unbind(1)]
        advantages = torch.nan_to_num(torch.stack(columns, dim=1), nan=0.0) * scored.usable.unsqueeze(1)
        gram = self._gram(record, advantages[scored.local])
        factors = clip_factors(gram, self.args.max_grad_norm)
        norms = gram.diagonal().sqrt()
        gram = gram * factors.unsqueeze(0) * factors.unsqueeze(1)
        influences = influence(gram)
        cosines = gram / (norms * factors).outer(norms * factors).clamp(min=1e-20)
        for i, name in enumerate(self.reward_func_names):
            self.log_metric(f"dynamic_reward_weighting/{name}/influence", influences[i])
            self.log_metric(f"dynamic_reward_weighting/{name}/grad_norm", norms[i])
            for j, other in enumerate(self.reward_func_names[:i]):
                self.log_metric(f"dynamic_reward_weighting/cosine/{other}/{name}", cosines[i, j])
        self.log_metric("dynamic_reward_weighting/influence", influences.sum())
        self._influences = self._influences + influences
        self._accumulated += 1
        if self._accumulated == self.args.weighting_accumulation:
            rate = self.learning_rate / self.args.weighting_regularization
            mean = self._influences / self._accumulated
            self.reward_weights = exponentiated_gradient(self.reward_weights.to(mean), mean, rate)
            self._influences, self._accumulated = torch.zeros_like(mean), 0

    def _gram(self, record: RolloutRecord, advantages: torch.Tensor) -> torch.Tensor:
        """Inner products `(sources, sources)` of the gradients from each column of `advantages`, over all ranks."""
        parameters = [p for layer in self._chosen_layers() for p in layer.parameters() if p.requires_grad]
        sources = advantages.shape[1]
        totals = [torch.zeros(sources, p.numel(), device=p.device) for p in parameters]
        length = record.prompt_ids.shape[1] + record.completion_ids.shape[1]
        for rows in torch.arange(len(advantages)).split(self.rows_at_a_time(length)):
            part = record.take(rows)
            with self.compute_loss_context_manager(), self.unlogged():
                stats = self.policy_statistics(self.model, part)
                penalty = self.beta * self.divergence(stats, part) if self.beta != 0.0 else 0.0
                losses = [
                    self.aggregate(penalty - stats.ratio * column(source), part)[0]
                    for source in advantages[rows.to(advantages.device)].unbind(1)
                ]
            for k, loss in enumerate(losses):
                gradients = gradients_apart(loss, parameters, retain_graph=k + 1 < sources)
                for total, gradient in zip(totals, gradients, strict=True):
                    if gradient is not None:
                        total[k] += gradient.flatten()
        # `aggregate` scales a micro-batch for one optimizer step; this is the mean over the generation batch
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        gram = torch.zeros(sources, sources, device=advantages.device)
        for total in totals:
            total = self.accelerator.reduce(total, reduction="mean") * share
            gram += total @ total.T
        return gram

    def _chosen_layers(self) -> list[torch.nn.Module]:
        layers = decoder_layers(self.model)
        chosen = self.args.weighting_layers
        if not chosen:
            low, high = _MIDDLE
            chosen = [i for i in range(len(layers)) if low <= i / len(layers) < high] or list(range(len(layers)))
        if max(chosen) >= len(layers):
            raise ValueError(f"`weighting_layers` must be below {len(layers)}, the number of layers, got {chosen}.")
        return [layers[i] for i in chosen]

    # --- By hypervolume -----------------------------------------------------------------------------------------

    def _smooth(self, means: list[float]) -> None:
        """Move the smoothed means, of which those that a batch does not know stay."""
        if self._smoothed is None and any(map(math.isnan, means)):
            return
        decay, before = self.args.weighting_hypervolume_ema, self._smoothed or means
        self._smoothed = [
            old if math.isnan(new) else decay * old + (1 - decay) * new for old, new in zip(before, means, strict=True)
        ]
        self._grow(self._smoothed)

    def _grow(self, means: list[float]) -> None:
        """Set the factor of the next advantages by what `means` add to the front; the first ones are its reference."""
        if self._guide.points:
            self._contribution = self._guide.observe(means)
            self._meta = meta_reward(
                self._contribution, self.args.weighting_hypervolume_low, self.args.weighting_hypervolume_gain
            )
        else:
            self._guide.observe(means)
