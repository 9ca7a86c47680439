"""HAPO on GRPO."""

import dataclasses

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.hapo import (
    advantage_factor,
    normalized_entropy,
    range_factors,
    token_group_advantages,
    token_mean,
)
from ...samplers.decoding.entropy_temperature import (
    SCALE,
    EntropyTemperature,
    EntropyTemperatureConfig,
    measure_entropies,
)
from .base import PolicyConfig, PolicyTrainer
from .objective import PolicyStatistics, column
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch

_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
# Neither redistribution nor clipping: entropies do not matter
_NO_SHAPING = {"hapo_adv_beta": 0.0, "hapo_clip_alpha": 0.0}


@method_config
class HapoGRPOConfig(EntropyTemperatureConfig, PolicyConfig):
    """
    Configuration of [`HapoGRPOTrainer`]; its temperature's fields are those of
    [`~papertrl.samplers.decoding.entropy_temperature.EntropyTemperatureConfig`].

    TRL fields with the paper's values as defaults: `epsilon_high` 0.28, and `delta` 10 (dual clip). Its other
    `loss_type="dapo"`, `epsilon=0.2` and `temperature=1` are TRL's own. The ratio matters where a generation batch
    serves several updates: set `num_iterations`, or `steps_per_generation` above `gradient_accumulation_steps`.
    """

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
    epsilon_high: float | None = method_field(0.28, "Upper clip range of the ratio.", ge=0, optional=True)
    delta: float | None = method_field(
        10.0, "Bound of the ratio where the advantage is negative (dual clip).", gt=1, optional=True
    )

    def validate(self):
        super().validate()
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
    at the temperature T, also while sampling, where the code has 1. The temperature follows h, within [−1, 1], as in
    the code; the paper's equation has the unclamped (x − Q)/s. DAPO's dynamic sampling, on in the paper's runs, is
    left out: beside DLER with `dler_length_penalty` and `dler_advantage_whitening` "none", groups without variance are
    replaced. A group average counts every token of a
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
    components = (EntropyTemperature,)
    extends = {
        "statistics": _NO_SHAPING,
        "prepare_objective": _NO_SHAPING,
        "trust_region": {"hapo_clip_alpha": 0.0},
        "objective": {"hapo_adv_beta": 0.0},
    }
    replaces = {"baseline": {"hapo_token_group_average": False}, "scale": {"hapo_token_group_average": False}}
    config_class = HapoGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self.args.hapo_clip_alpha > 0:
            self.warn_if_on_policy("hapo", "the adaptive clip ranges (`hapo_clip_alpha`) are")

    # --- Token-level group average ------------------------------------------------------------------------------

    def baseline(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        return token_mean(rewards, scored.lengths, scored.group_ids)

    def scale(self, scored: ScoredBatch, rewards: torch.Tensor, centered: torch.Tensor) -> torch.Tensor:
        advantages, fell = token_group_advantages(
            rewards, centered, scored.lengths, scored.group_ids, self.args.hapo_fallback
        )
        self.log_metric("hapo/fallback_fraction", fell.float().mean())
        return advantages

    # --- Entropies ----------------------------------------------------------------------------------------------

    def old_pass_needs(self):
        return super().old_pass_needs() | {"entropy"}

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        record.statistics["hapo/entropies"] = old_pass.entropies.detach()

    def prepare_objective(self, record: RolloutRecord) -> None:
        super().prepare_objective(record)
        # The temperature, where it is on, has measured them
        if SCALE[0] not in record.statistics:
            measure_entropies(self, record, self.args.hapo_entropy_quantile)

    def _hapo_h(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        """h of every token of the loss, by its current entropy; 0 elsewhere."""
        scale = [record.statistics[name].unsqueeze(1) for name in SCALE]
        signed = self.args.hapo_sign == "signed"
        return normalized_entropy(stats.entropies.float(), *scale, signed=signed) * record.loss_mask

    # --- Redistribution and clipping ----------------------------------------------------------------------------

    def trust_region(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        super().trust_region(stats, record)
        low, high = range_factors(self._hapo_h(stats, record), self.args.hapo_clip_alpha)
        stats.epsilon_low, stats.epsilon_high = stats.epsilon_low * low, stats.epsilon_high * high
        count = record.loss_mask.sum()
        self.log_mean("hapo/clip_low_mean", (self.epsilon_low * low * record.loss_mask).sum(), count)
        self.log_mean("hapo/clip_high_mean", (self.epsilon_high * high * record.loss_mask).sum(), count)

    def objective(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
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
