"""DLER and DA-DLER on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.dler import length_limits, solved_share, truncated_rewards, whiten
from ...losses.policy.groups import by_group, expand_groups, group_varies, weighted_sum
from ...losses.policy.surrogate import kl_estimate
from .base import PolicyConfig, PolicyTrainer
from .objective import PolicyStatistics
from .record import RolloutRecord, ScoredBatch


@method_config
class DlerGRPOConfig(PolicyConfig):
    """
    Configuration of [`DlerGRPOTrainer`].

    TRL fields with the paper's values as defaults: `beta` 5e-4, `epsilon_high` 0.28 and `delta` 10 (dual clip). The
    paper samples 16 completions for each of 512 prompts and limits them to 4000 tokens.
    """

    dler_length_penalty: str = method_field(
        "truncation",
        "`truncation` gives no reward to a completion that does not end within the limit; `none` keeps rewards.",
        choices=("truncation", "none"),
        was="length_penalty",
    )
    dler_truncation_length: int | None = method_field(
        None, "Limit in tokens. `None` takes `max_completion_length`. The paper: 4000.", ge=1, was="truncation_length"
    )
    dler_da_thresholds: list[float] = method_field(
        [],
        "DA-DLER: ascending shares of correct completions at which a prompt's limit changes. Empty for DLER; the "
        "paper: 0.5.",
        was="da_thresholds",
    )
    dler_da_lengths: list[int] = method_field(
        [],
        "DA-DLER: limits from hard to easy prompts, one more than thresholds. The paper: 4000 2000.",
        was="da_lengths",
    )
    dler_advantage_whitening: str = method_field(
        "token",
        "What the batch statistics of the advantages run over; `none` leaves the scaling to `scale_rewards`.",
        choices=("token", "sequence", "none"),
        was="advantage_whitening",
    )
    dler_dynamic_sampling: bool = method_field(
        True,
        "Whether groups whose rewards are all equal are replaced by freshly sampled ones.",
        was="dynamic_sampling",
    )
    dler_max_resample_batches: int = method_field(
        4,
        "How often groups are replaced before the rest of the batch is filled up without effect on the loss. The "
        "paper sets no bound.",
        ge=0,
        was="max_resample_batches",
    )
    dler_kl_estimator: str = method_field(
        "k2",
        "Divergence estimate weighted by `beta`; the released code has k3.",
        choices=("k2", "k3"),
        was="kl_estimator",
    )
    beta: float = method_field(5e-4, "Weight of the divergence to the reference. See `dler_kl_estimator`.", ge=0)
    use_bias_correction_kl: bool = method_field(
        False,
        "Whether to multiply the divergence by the ratio. k2 has the gradient of the reverse KL as it is; k3 has it "
        "only with this correction.",
    )
    epsilon_high: float | None = method_field(0.28, "Upper clip range of the ratio.", ge=0, optional=True)
    delta: float | None = method_field(
        10.0, "Bound of the ratio where the advantage is negative (dual clip).", gt=1, optional=True
    )

    def validate(self):
        super().validate()
        thresholds, lengths = self.dler_da_thresholds, self.dler_da_lengths
        limits = [("dler_truncation_length", self.dler_truncation_length)]
        limits += [("dler_da_lengths", length) for length in lengths]
        for name, limit in limits:
            if limit is not None and not 1 <= limit <= self.max_completion_length:
                raise ValueError(
                    f"`{name}` must be in [1, max_completion_length={self.max_completion_length}], got {limit}: "
                    "generation has to reach the limit."
                )
        if lengths and len(lengths) != len(thresholds) + 1:
            raise ValueError(
                f"`dler_da_lengths` must have one more entry than `dler_da_thresholds`, got {lengths} and "
                f"{thresholds}."
            )
        if thresholds and not lengths:
            raise ValueError(f"`dler_da_thresholds` {thresholds} need `dler_da_lengths`, which is empty.")
        if sorted(set(thresholds)) != thresholds or any(not 0 < t <= 1 for t in thresholds):
            raise ValueError(f"`dler_da_thresholds` must be ascending numbers in (0, 1], got {thresholds}.")
        if self.dler_length_penalty == "truncation" and self.mask_truncated_completions:
            raise ValueError(
                "`mask_truncated_completions=True` removes the completions that DLER's truncation penalizes. Set it "
                "to False, or set `dler_length_penalty='none'`."
            )


class DlerGRPOTrainer(PolicyTrainer):
    r"""
    Doing length penalty right: GRPO with a hard length limit, batch-whitened advantages, filtering and clip-higher.

    The reward of a completion counts only if it ends within the limit. With a = R − mean of the group,

    $$
    A = \frac{a - \mathrm{mean}_{batch}(a)}{\sqrt{\mathrm{var}_{batch}(a) + 10^{-8}}},
    $$

    the statistics being over all completion tokens of the batch (arXiv:2510.15110, Eq. 3). Groups whose rewards are
    all equal are replaced by freshly sampled ones; where that fails, they and any other group without variance get
    advantage 0. With `dler_da_lengths`, a prompt that the model mostly solves under the long limit gets a shorter one
    (DA-DLER); a completion counts as correct if its weighted reward is above `success_threshold`. Rewards below 0 are
    refused where the limit takes rewards away: an answer without any would beat a wrong one.

    [`~papertrl.losses.policy.dler.merge_updates`] is the paper's merging of selected updates after training.

    Relations:
        Lite PPO divides by the standard deviation of raw rewards per sequence instead; the two replace the same
        stage. Needs no additive length penalty beside it.

    Paper: [DLER: Doing Length pEnalty Right - Incentivizing More Intelligence per Token via Reinforcement
    Learning](https://huggingface.co/papers/2510.15110).

    Example:

    ```python
    >>> from papertrl import DlerGRPOConfig, DlerGRPOTrainer
    >>> args = DlerGRPOConfig(max_completion_length=512, dler_truncation_length=400)  # doctest: +SKIP
    >>> trainer = DlerGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("dler")
    extends = {"score": {"dler_length_penalty": "none"}, "filter_groups": {"dler_dynamic_sampling": False}}
    replaces = {"scale": {"dler_advantage_whitening": "none"}, "divergence": {"dler_kl_estimator": "k3"}}
    config_class = DlerGRPOConfig

    def score(self, scored: ScoredBatch) -> torch.Tensor:
        rewards = super().score(scored)
        weighted = rewards * self.reward_weights.to(rewards.device)
        lowest, source = torch.nan_to_num(weighted).amin(0).min(0)
        if lowest < 0:
            raise ValueError(
                f"DLER gives an answer beyond the limit no reward, which must be the least there is, but the weighted "
                f"reward `{scored.source_names[source]}` is {lowest.item():g} for some answer. Give rewards and "
                "`reward_weights` of at least 0, such as 0 and 1 for wrong and right, or set "
                "`dler_length_penalty='none'`."
            )
        limit = self.args.dler_truncation_length or self.max_completion_length
        limits = torch.full_like(scored.lengths, limit)
        if self.args.dler_da_lengths:
            longest = torch.full_like(limits, max(self.args.dler_da_lengths))
            full = truncated_rewards(rewards, scored.lengths, scored.truncated, longest)
            correct = weighted_sum(full, self.reward_weights.to(full.device)) > self.args.success_threshold
            share = solved_share(correct, scored.group_ids)
            limits = length_limits(share, self.args.dler_da_thresholds, self.args.dler_da_lengths)
            self.log_metric("dler/da_short_fraction", (limits < longest).float().mean())
        late = scored.truncated | (scored.lengths > limits)
        self.log_metric("dler/truncated_fraction", late.float().mean())
        return truncated_rewards(rewards, scored.lengths, scored.truncated, limits)

    def filter_groups(self, scored: ScoredBatch) -> torch.Tensor | None:
        keep = super().filter_groups(scored)
        rewards = self.combined_rewards(scored)
        varied = group_varies(rewards, scored.group_ids)
        best = torch.nan_to_num(by_group(rewards, scored.group_ids)).amax(1)
        solved = best > self.args.success_threshold
        self.log_metric("dler/all_zero_groups", (~varied & ~solved).float().mean())
        self.log_metric("dler/all_one_groups", (~varied & solved).float().mean())
        return varied if keep is None else keep & varied

    def refill_rounds(self) -> int:
        return max(super().refill_rounds(), self.args.dler_max_resample_batches)

    def scale(self, scored: ScoredBatch, rewards: torch.Tensor, centered: torch.Tensor) -> torch.Tensor:
        varied = expand_groups(group_varies(rewards, scored.group_ids), scored.group_ids)
        live = scored.usable & ~centered.isnan() & varied
        weights = scored.lengths if self.args.dler_advantage_whitening == "token" else torch.ones_like(scored.lengths)
        return whiten(centered, weights, live)

    def divergence(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        return kl_estimate(stats.logps, record.ref_per_token_logps, self.args.dler_kl_estimator)
