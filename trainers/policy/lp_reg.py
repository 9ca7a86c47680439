"""Lp-Reg on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.head import kept_mass
from ...losses.policy.lp_reg import (
    NOISE_LOGP,
    forward_kl_penalty,
    lowest_share,
    protected_tokens,
    proxy_logps,
)
from ...losses.terms import LossTerm
from ...models.observation import lm_head
from .base import PolicyConfig, PolicyTrainer
from .objective import PolicyStatistics, column
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch

_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


@method_config
class LpRegGRPOConfig(PolicyConfig):
    """
    Configuration of [`LpRegGRPOTrainer`].

    TRL fields with the paper's values as defaults: `epsilon` 1.0 and `epsilon_high` 9.0, a ratio in [0, 10], which is
    practically no clip.
    """

    lp_reg_beta: float = method_field(1.0, "β, weight of the penalty. 0 is GRPO.", ge=0)
    lp_reg_kappa: float = method_field(
        0.02,
        "κ of the noise filter: a token is noise if its probability is below κ times the largest one (`min_p`) or "
        "below κ (`fixed`).",
        gt=0,
        lt=1,
    )
    lp_reg_filter: str = method_field("min_p", "Noise filter.", choices=("min_p", "fixed"))
    lp_reg_rho: float = method_field(
        0.01,
        "ρ, share of the tokens whose probability counts as low. The paper takes 0.01 (Qwen3-14B) and 0.005 "
        "(Qwen2.5-32B).",
        gt=0,
        le=1,
    )
    lp_reg_scope: str = method_field(
        "all_tokens",
        "Tokens among which the share is taken: all of the batch (the paper's Eq. 6), or those with negative "
        "advantage (the released code).",
        choices=("all_tokens", "negative_tokens"),
    )
    epsilon: float = method_field(1.0, "Lower clip range of the ratio. The paper keeps the ratio in [0, 10].", ge=0)
    epsilon_high: float | None = method_field(
        9.0, "Upper clip range of the ratio. See `epsilon`.", ge=0, optional=True
    )

    def validate(self):
        super().validate()
        if self.lp_reg_beta > 0 and self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"Lp-Reg replaces the clipped loss of single tokens: `loss_type` must be one of {_LOSS_TYPES}, got "
                f"{self.loss_type!r}. Change it, or set `lp_reg_beta=0`."
            )
        if self.lp_reg_beta > 0 and self.importance_sampling_level != "token":
            raise ValueError(
                "Lp-Reg works on ratios of single tokens: `importance_sampling_level` must be 'token', got "
                f"{self.importance_sampling_level!r}. Change it, or set `lp_reg_beta=0`."
            )


class LpRegGRPOTrainer(PolicyTrainer):
    r"""
    Low-probability regularization: GRPO that keeps rare but sensible tokens alive while it punishes wrong answers.

    A token is *protected* if its advantage is negative, its probability is among the lowest ρ of the batch, and it is
    no noise: it survives a filter relative to the most probable token. Let q be the sampling distribution renormalized
    over what the filter keeps. On protected tokens the loss is (arXiv:2510.03222, Eq. 6)

    $$
    -A\,r + \beta\, \mathrm{KL}(q \,\|\, \pi), \qquad r = \pi / \pi_{old},
    $$

    without ratio clipping and with the KL estimated at the sampled token; elsewhere it is GRPO's.

    The threshold δ_ρ is taken over the whole generation batch of all ranks, from the log-probabilities at sampling
    time; whether a token is below it, and below q, is decided with the current ones. The released code takes it per
    micro-batch and does nothing where that gives a single token.

    Relations:
        A plain entropy bonus (`entropy_coef`) also feeds noise tokens; `top_entropy_quantile` drops gradient instead
        of adding a counterweight. Combines with any method that leaves the clipped token loss in place.

    Paper: [Low-probability Tokens Sustain Exploration in Reinforcement Learning with Verifiable
    Reward](https://huggingface.co/papers/2510.03222).

    Example:

    ```python
    >>> from papertrl import LpRegGRPOConfig, LpRegGRPOTrainer
    >>> trainer = LpRegGRPOTrainer(
    ...     model="Qwen/Qwen3-0.6B", reward_funcs=reward, args=LpRegGRPOConfig(lp_reg_rho=0.01), train_dataset=dataset
    ... )  # doctest: +SKIP
    ```
    """

    method = declared("lp_reg")
    extends = {
        "statistics": {"lp_reg_beta": 0.0},
        "prepare_objective": {"lp_reg_beta": 0.0},
        "trust_region": {"lp_reg_beta": 0.0},
        "extra_terms": {"lp_reg_beta": 0.0},
    }
    config_class = LpRegGRPOConfig

    def old_pass_needs(self):
        return super().old_pass_needs() | {"logps", "hidden_states"}

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        mask = record.completion_mask.bool()
        log_threshold = torch.zeros_like(old_pass.logps)
        log_kept = torch.zeros_like(old_pass.logps)
        with lm_head(self.model) as (weight, bias, logit_scale, softcap):
            threshold, kept = kept_mass(
                old_pass.hidden_states[mask],
                weight,
                bias,
                self.args.lp_reg_kappa,
                relative=self.args.lp_reg_filter == "min_p",
                temperature=self.temperature,
                logit_scale=logit_scale,
                softcap=softcap,
            )
        log_threshold[mask], log_kept[mask] = threshold.to(log_threshold), kept.to(log_kept)
        proxy = proxy_logps(old_pass.logps, log_threshold, log_kept)
        record.statistics["lp_reg/proxy_logps"] = proxy
        record.statistics["lp_reg/sampled_logps"] = old_pass.logps
        noise = (proxy <= NOISE_LOGP) & mask
        self.log_mean("lp_reg/filtered_sampled_fraction", noise.sum(), mask.sum())
        self.log_mean("lp_reg/mean_kept_mass", (log_kept.exp() * mask).sum(), mask.sum())

    def prepare_objective(self, record: RolloutRecord) -> None:
        super().prepare_objective(record)
        candidates = record.loss_mask.bool() & (record.row_weight > 0).unsqueeze(1)
        if self.args.lp_reg_scope == "negative_tokens":
            candidates = candidates & (column(record.advantages) < 0)
        logps = self.gather_ragged(record.statistics["lp_reg/sampled_logps"][candidates], fill=torch.inf)
        log_delta = lowest_share(logps, self.args.lp_reg_rho)
        record.statistics["lp_reg/log_delta"] = log_delta.expand(record.row_weight.shape[0]).clone()
        self.log_metric("lp_reg/delta", log_delta.exp())

    def trust_region(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        super().trust_region(stats, record)
        stats.unclip(self._protected(stats, record))

    def extra_terms(self, stats: PolicyStatistics, record: RolloutRecord) -> list[LossTerm]:
        terms = super().extra_terms(stats, record)
        protected = self._protected(stats, record)
        counted = protected & (record.row_weight > 0).unsqueeze(1)
        self.log_metric("lp_reg/regularized_tokens", self.accelerator.reduce(counted.sum().float(), "sum"))
        penalty = forward_kl_penalty(stats.logps, record.statistics["lp_reg/proxy_logps"])
        return [*terms, LossTerm("lp_reg", penalty, protected, self.args.lp_reg_beta)]

    def _protected(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        return protected_tokens(
            stats.logps,
            record.statistics["lp_reg/proxy_logps"],
            column(record.advantages),
            record.loss_mask,
            record.statistics["lp_reg/log_delta"].unsqueeze(1),
        )
