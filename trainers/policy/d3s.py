"""D³S on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.d3s import (
    largest_share,
    linear_schedule,
    max_variance_per_group,
    max_variance_subset,
    select_tokens,
    share_of,
    token_scores,
)
from .base import PolicyConfig, PolicyTrainer
from .objective import column
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch


@method_config
class D3sGRPOConfig(PolicyConfig):
    """
    Configuration of [`D3sGRPOTrainer`].

    The paper's values of the four ratios are not known to us; the defaults here are ours.
    """

    d3s_sample_ratio_start: float = method_field(0.25, "Share of the rollouts kept at the first step.", gt=0, le=1)
    d3s_sample_ratio_end: float = method_field(0.75, "Share of the rollouts kept at the end.", gt=0, le=1)
    d3s_token_ratio_start: float = method_field(0.1, "Share of the tokens kept at the first step.", gt=0, le=1)
    d3s_token_ratio_end: float = method_field(0.5, "Share of the tokens kept at the end.", gt=0, le=1)
    d3s_schedule_steps: int | None = method_field(
        None, "Optimizer steps over which the shares grow linearly. `None` takes the whole run.", ge=1
    )
    d3s_scope: str = method_field(
        "cross_group",
        "Whether rollouts compete over the whole generation batch or inside their group (D³S-I).",
        choices=("cross_group", "intra_group"),
    )
    d3s_token_scope: str = method_field(
        "batch",
        "Whether tokens compete over all kept rollouts or inside their sequence.",
        choices=("batch", "sequence"),
    )

    def validate(self):
        super().validate()
        for kind in ("sample", "token"):
            start, end = (getattr(self, f"d3s_{kind}_ratio_{when}") for when in ("start", "end"))
            if start > end:
                raise ValueError(
                    f"`d3s_{kind}_ratio_start` must be at most `d3s_{kind}_ratio_end`, got {start} and {end}: D³S "
                    "relaxes its selection over training."
                )


class D3sGRPOTrainer(PolicyTrainer):
    r"""
    Dynamic dual-level down-sampling: GRPO on the rollouts with the most varied advantages and their key tokens.

    Of the n rollouts of a generation batch, with advantages from their full groups, N are kept (arXiv:2509.22115):

    $$
    S = \arg\max_{|S| = N} \mathrm{Var}(A_S),
    $$

    then, of their tokens, the share K with the largest |A|·H, where H is the policy's entropy at sampling time. N and
    K grow linearly over training, so that the model does not over-fit the strong signals. Advantages are not
    standardized again after the selection. The loss is the configured one, averaged over what was kept.

    N and the number of tokens are rounded up. Rows that are not kept get weight 0 and stay in the batch, so that every
    rank has equally many. Where a generation batch serves several updates, those with a token that was kept are shared
    out among them; if there are fewer than updates, some updates have none.

    Relations:
        `top_entropy_quantile` keeps tokens by entropy alone and per micro-batch. DLER filters whole prompts without
        signal and refills them; D³S spends what was sampled on less. Both combine with it.

    Paper: [Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework for Efficient Policy
    Optimization](https://huggingface.co/papers/2509.22115). Numeric defaults, token scope and normalizer are our
    reading; the paper's code is not available.

    Example:

    ```python
    >>> from papertrl import D3sGRPOConfig, D3sGRPOTrainer
    >>> args = D3sGRPOConfig(d3s_sample_ratio_start=0.25, d3s_token_ratio_start=0.1)  # doctest: +SKIP
    >>> trainer = D3sGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("d3s")
    extends = {
        "statistics": {"d3s_token_ratio_start": 1.0},
        "select": {"d3s_sample_ratio_start": 1.0, "d3s_token_ratio_start": 1.0},
    }
    config_class = D3sGRPOConfig

    def old_pass_needs(self):
        return super().old_pass_needs() | {"entropy"}

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        record.statistics["d3s/entropies"] = old_pass.entropies.detach()

    def select(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        super().select(record, scored)
        progress = self.state.global_step / (self.args.d3s_schedule_steps or self.state.max_steps)
        samples = linear_schedule(self.args.d3s_sample_ratio_start, self.args.d3s_sample_ratio_end, progress)
        tokens = linear_schedule(self.args.d3s_token_ratio_start, self.args.d3s_token_ratio_end, progress)
        self._select_rollouts(record, scored, samples)
        if self.args.d3s_token_ratio_start < 1.0:
            self._select_tokens(record, tokens)

    def _select_rollouts(self, record: RolloutRecord, scored: ScoredBatch, ratio: float) -> None:
        advantages = scored.advantages
        if ratio == 1.0:
            return
        if self.args.d3s_scope == "cross_group":
            keep = max_variance_subset(advantages, share_of(advantages.numel(), ratio))
        else:
            keep = max_variance_per_group(advantages, scored.group_ids, ratio)
        record.row_weight = record.row_weight * keep[scored.local]
        kept = advantages[keep]
        self.log_metric("d3s/sample_ratio", keep.float().mean())
        self.log_metric("d3s/dropped_rollouts", (~keep).float().sum())
        self.log_metric("d3s/advantage_variance_before", advantages.var(correction=0))
        self.log_metric("d3s/advantage_variance_after", kept.var(correction=0))
        self.log_metric("d3s/positive_fraction_kept", (kept > 0).float().mean())
        self.log_metric("d3s/groups_kept", float(torch.unique(scored.group_ids[keep]).numel()))

    def _select_tokens(self, record: RolloutRecord, ratio: float) -> None:
        scores = token_scores(column(record.advantages), record.statistics["d3s/entropies"])
        mask = record.loss_mask.bool() & (record.row_weight > 0).unsqueeze(1)
        if self.args.d3s_token_scope == "batch":
            threshold = largest_share(self.gather_ragged(scores[mask], fill=-1.0), ratio).expand(mask.shape[0])
        else:
            threshold = torch.stack([largest_share(row[keep], ratio) for row, keep in zip(scores, mask, strict=True)])
        keep = select_tokens(scores, mask, threshold.unsqueeze(1))
        record.loss_mask = record.loss_mask * keep
        self.log_mean("d3s/token_ratio", keep.sum(), mask.sum())
        self.log_mean("d3s/mean_score_kept", (scores * keep).sum(), keep.sum())
