"""HAPO on GRPO."""

import dataclasses
from typing import Any

import torch
from transformers import LogitsProcessorList

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.hapo import (
    advantage_factor,
    entropy_scale,
    normalized_entropy,
    range_factors,
    token_group_advantages,
    token_mean,
)
from ...samplers.decoding.entropy_temperature import EntropyTemperature
from .base import PolicyConfig, PolicyTrainer
from .objective import PolicyStatistics, column
from .passes import OldPass
from .record import Generation, RolloutRecord, ScoredBatch

_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
_SCALE = ("pivot", "lowest", "highest")


@method_config
class HapoGRPOConfig(PolicyConfig):
    """
    Configuration of [`HapoGRPOTrainer`].

    TRL fields with the paper's values as defaults: `epsilon_high` 0.28, and `delta` 10 (dual clip). Its other
    `loss_type="dapo"`, `epsilon=0.2` and `temperature=1` are TRL's own. The ratio matters where a generation batch
    serves several updates: set `num_iterations`, or `steps_per_generation` above `gradient_accumulation_steps`.
    """

    hapo_entropy_quantile: float = method_field(
        0.8, "Quantile of the tokens' entropies above which one counts as high.", ge=0, le=1
    )
    hapo_temperature_tau: float = method_field(
        0.1,
        "τ: tokens are drawn at temperature T · (1 + τh). The released recipe has 0.05. 0 samples as GRPO.",
        ge=0,
        lt=1,
    )
    hapo_token_group_average: bool = method_field(
        True, "Whether mean and deviation of a group's rewards run over its tokens instead of its completions."
    )
    hapo_fallback: float | None = method_field(
        5.0,
        "Advantage at which a group's statistics run over completions after all. `None`: never.",
        gt=0,
        optional=True,
    )
    hapo_adv_beta: float = method_field(1.0, "β of the redistribution of advantages. 0 leaves them.", ge=0, le=1)
    hapo_clip_alpha: float = method_field(1.0, "α of the adaptive clip ranges. 0 leaves them.", ge=0, le=1)
    hapo_sign: str = method_field(
        "signed",
        "Sign of the normalized entropy h: negative below the quantile (the paper), or never (the released code), by "
        "which no token counts as one of low entropy.",
        choices=("signed", "released"),
    )
    epsilon_high: float | None = method_field(0.28, "Upper clip range of the ratio.", ge=0, optional=True)
    delta: float | None = method_field(
        10.0, "Bound of the ratio where the advantage is negative (dual clip).", gt=1, optional=True
    )

    def validate(self):
        super().validate()
        if self.hapo_temperature_tau > 0:
            for name, value in (
                ("use_vllm", False),
                ("use_transformers_continuous_batching", False),
                ("fast_rollouts", True),
            ):
                if getattr(self, name) is not value:
                    raise ValueError(
                        "HAPO's temperature of single tokens needs the rollout loop of this library: "
                        f"`{name}` must be {value}, got {not value}. Change it, or set `hapo_temperature_tau=0`."
                    )
        if self.hapo_token_group_average and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "HAPO's group average normalizes the summed reward: `multi_objective_aggregation` must be "
                f"'sum_then_normalize', got {self.multi_objective_aggregation!r}. Change it, or set "
                "`hapo_token_group_average=False`."
            )
        if self.hapo_adv_beta > 0 or self.hapo_clip_alpha > 0:
            without = "Change it, or set `hapo_adv_beta=0` and `hapo_clip_alpha=0`."
            if self.loss_type not in _LOSS_TYPES:
                raise ValueError(
                    f"HAPO changes the clipped loss of single tokens: `loss_type` must be one of {_LOSS_TYPES}, got "
                    f"{self.loss_type!r}. {without}"
                )
            if self.importance_sampling_level != "token":
                raise ValueError(
                    "HAPO works on ratios of single tokens: `importance_sampling_level` must be 'token', got "
                    f"{self.importance_sampling_level!r}. {without}"
                )


class HapoGRPOTrainer(PolicyTrainer):
    r"""
    Heterogeneous adaptive policy optimization: GRPO that treats each token by its entropy.

    With x = log H of a token, Q the quantile of x and max and min its extremes over the generation batch, h is
    (x − Q)/(max − Q) above Q and (x − Q)/(Q − min) below (arXiv:2509.16591, Eqs. 5 and 6). Four parts, each with a
    switch of its own:

    - *Temperature* (Eq. 8): tokens are drawn at T·(1 + τh), with the extremes of the previous batch.
    - *Token-level group average* (Eq. 9): A is (R − μ)/σ with statistics over the tokens of the group, so that A sums
      to 0 over them.
    - *Redistribution* (Eqs. 10 and 11): A·(1 + βh) for tokens of high entropy whose ratio has left the neutral zone
      (1 − ε_low/2, 1 + ε_high/2), and for those of low entropy whose ratio is in it.
    - *Asymmetric clipping* (Eqs. 12 and 13): ε_low·(1 − αh) where h ≤ 0, ε_high·(1 + αh) where h > 0.

    Quantile and extremes are those of the pass over the rollouts, over all ranks, so that they do not depend on how
    the batch is cut; h is that of the current pass, limited to [−1, 1]. The released code takes them per micro-batch.
    The neutral zone has the token's adapted range, as in the code; in the paper's equation it has the base range.
    Ratios are not corrected for the temperature, neither in the paper nor in the code nor here. Entropies are those
    at the temperature T, also while sampling, where the code has 1. A group average counts every token of a
    completion; with tools, those of the tool too.

    Relations:
        `top_entropy_quantile` drops tokens of low entropy; D³S keeps those of large |A|·H. Lp-Reg protects rare tokens
        instead of open ones. DLER and Lite PPO replace the same normalization of rewards as the group average.

    Paper: [From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's
    Nature](https://huggingface.co/papers/2509.16591).

    Example:

    ```python
    >>> from papertrl import HapoGRPOConfig, HapoGRPOTrainer
    >>> args = HapoGRPOConfig(num_iterations=2, hapo_temperature_tau=0.05)  # doctest: +SKIP
    >>> trainer = HapoGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("hapo")
    extends = {"rollout": {}, "statistics": {}, "prepare_objective": {}, "trust_region": {}, "objective": {}}
    replaces = {"baseline": {"hapo_token_group_average": False}, "scale": {"hapo_token_group_average": False}}
    config_class = HapoGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        # Of the last generation batch, for the next one
        self._hapo_scale: torch.Tensor | None = None
        self._hapo_temperatures: EntropyTemperature | None = None
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)

    # --- Temperature --------------------------------------------------------------------------------------------

    def logits_processors(self) -> LogitsProcessorList:
        processors = super().logits_processors()
        if self.args.hapo_temperature_tau == 0 or not self.model.training or self._hapo_scale is None:
            return processors
        self._hapo_temperatures = EntropyTemperature(
            self._hapo_scale, self.args.hapo_temperature_tau, self.temperature, self._hapo_signed
        )
        return LogitsProcessorList([*processors, self._hapo_temperatures])

    def rollout(self, inputs: list[dict[str, Any]], prompts: list[Any]) -> Generation:
        generation = super().rollout(inputs, prompts)
        if self.args.hapo_temperature_tau > 0 and not self.args.fast_rollouts:
            raise ValueError(
                "`hapo_temperature_tau` must be 0 with this model, which the rollout loop of this library does not "
                f"support, got {self.args.hapo_temperature_tau}."
            )
        if self._hapo_temperatures is not None:
            temperatures = self.temperature * torch.cat(self._hapo_temperatures.factors)
            self._hapo_temperatures = None
            self.log_mean("hapo/temperature_mean", temperatures.sum(), temperatures.new_tensor(len(temperatures)))
            extremes = self.accelerator.gather(torch.stack([temperatures.min(), temperatures.max()]))
            self.log_metric("hapo/temperature_min", extremes.min())
            self.log_metric("hapo/temperature_max", extremes.max())
        return generation

    # --- Token-level group average ------------------------------------------------------------------------------

    def baseline(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        if not self.args.hapo_token_group_average:
            return super().baseline(scored, rewards)
        return token_mean(rewards, scored.lengths, scored.group_ids)

    def scale(self, scored: ScoredBatch, rewards: torch.Tensor, centered: torch.Tensor) -> torch.Tensor:
        if not self.args.hapo_token_group_average:
            return super().scale(scored, rewards, centered)
        advantages, fell = token_group_advantages(
            rewards, centered, scored.lengths, scored.group_ids, self.args.hapo_fallback
        )
        self.log_metric("hapo/fallback_fraction", fell.float().mean())
        return advantages

    # --- Entropies ----------------------------------------------------------------------------------------------

    @property
    def _hapo_signed(self) -> bool:
        return self.args.hapo_sign == "signed"

    @property
    def _hapo_needs_entropies(self) -> bool:
        args = self.args
        return args.hapo_temperature_tau > 0 or args.hapo_adv_beta > 0 or args.hapo_clip_alpha > 0

    def old_pass_needs(self):
        needs = super().old_pass_needs()
        return needs | {"entropy"} if self._hapo_needs_entropies else needs

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        if self._hapo_needs_entropies:
            record.statistics["hapo/entropies"] = old_pass.entropies.detach()

    def prepare_objective(self, record: RolloutRecord) -> None:
        super().prepare_objective(record)
        if not self._hapo_needs_entropies:
            return
        tokens = record.loss_mask.bool() & (record.row_weight > 0).unsqueeze(1)
        entropies = self.gather_ragged(record.statistics["hapo/entropies"][tokens].float(), fill=-1.0)
        scale = entropy_scale(entropies, self.args.hapo_entropy_quantile)
        for name, value in zip(_SCALE, scale, strict=True):
            record.statistics[f"hapo/{name}"] = value.expand(record.row_weight.shape[0]).clone()
        if self.model.training:
            self._hapo_scale = scale

    def _hapo_h(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """h of every token of the loss, by its current entropy; 0 elsewhere."""
        scale = [record.statistics[f"hapo/{name}"].unsqueeze(1) for name in _SCALE]
        return normalized_entropy(stats.entropies.float(), *scale, signed=self._hapo_signed) * record.loss_mask

    # --- Redistribution and clipping ----------------------------------------------------------------------------

    def trust_region(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        super().trust_region(stats, record)
        if self.args.hapo_clip_alpha == 0:
            return
        low, high = range_factors(self._hapo_h(stats, record), self.args.hapo_clip_alpha)
        stats.epsilon_low, stats.epsilon_high = stats.epsilon_low * low, stats.epsilon_high * high
        count = record.loss_mask.sum()
        self.log_mean("hapo/clip_low_mean", (self.epsilon_low * low * record.loss_mask).sum(), count)
        self.log_mean("hapo/clip_high_mean", (self.epsilon_high * high * record.loss_mask).sum(), count)

    def objective(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        if self.args.hapo_adv_beta == 0:
            return super().objective(stats, record)
        h, mask = self._hapo_h(stats, record), record.loss_mask
        # The zone is HAPO's own, whatever other methods do to the range
        low, high = range_factors(h, self.args.hapo_clip_alpha)
        factor = advantage_factor(
            h, stats.log_ratio.exp(), self.epsilon_low * low, self.epsilon_high * high, self.args.hapo_adv_beta
        )
        count = mask.sum()
        self.log_mean("hapo/h_mean", h.sum(), count)
        self.log_mean("hapo/h_high_fraction", (h > 0).sum(), count)
        self.log_mean("hapo/advantage_change", ((factor - 1).abs() * mask).sum(), count)
        return super().objective(stats, dataclasses.replace(record, advantages=column(record.advantages) * factor))

    # --- State --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"hapo": {"scale": self._hapo_scale}}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        scale = state["hapo"]["scale"]
        self._hapo_scale = None if scale is None else scale.to(self.accelerator.device)
