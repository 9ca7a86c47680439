"""Guide-GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.guide_grpo import percentile_gamma, reshape_ratio
from .base import PolicyConfig, PolicyTrainer
from .draft import Draft
from .objective import CLIPPED, PolicyStatistics
from .record import RolloutRecord, ScoredBatch, Source


@method_config
class GuideGRPOConfig(PolicyConfig):
    """Configuration of [`GuideGRPOTrainer`]. The paper samples 8 completions and has no divergence term."""

    guide_reroll: bool = method_field(
        True, "Whether prompts that the policy fails at are sampled again with their hint. False is GRPO."
    )
    guide_hint_column: str = method_field(
        "hint",
        "Dataset column with the prompt that contains the hint, as text or messages like the prompt itself. Groups "
        "whose hint is `None` are not sampled again.",
    )
    guide_reroll_threshold: float = method_field(
        0.001, "Groups whose share of solved completions is at most this are sampled again.", ge=0, lt=1
    )
    guide_keep_high: float = method_field(
        0.999,
        "Groups sampled again are used if their share of solved completions is above `guide_reroll_threshold` and at "
        "most this: one in which all succeed teaches nothing.",
        gt=0,
        le=1,
    )
    guide_max_resample_batches: int = method_field(
        4,
        "How often groups that teach nothing, with hint or without, are replaced by fresh prompts. The paper goes on "
        "until the batch is full.",
        ge=0,
    )
    guide_importance_weighting: bool = method_field(
        True,
        "Whether the ratio of guided tokens is that to the policy with the hint, which sampled them; if False, to the "
        "policy without.",
    )
    guide_reshape: str = method_field(
        "percentile",
        "What the ratio r of guided tokens becomes: r/(r+γ) with γ a quantile of such ratios (`percentile`) or fixed "
        "(`constant`), its power r^γ (`power`), or r itself (`none`).",
        choices=("percentile", "constant", "power", "none"),
    )
    guide_gamma: float = method_field(
        0.9, "γ: level of the quantile, constant or exponent. See `guide_reshape`.", gt=0
    )

    def validate(self):
        super().validate()
        if self.guide_reshape in ("percentile", "power") and self.guide_gamma > 1:
            raise ValueError(
                f"`guide_gamma` must be in (0, 1] with `guide_reshape='{self.guide_reshape}'`, got {self.guide_gamma}."
            )
        if self.guide_keep_high <= self.guide_reroll_threshold:
            raise ValueError(
                f"`guide_keep_high` must be above `guide_reroll_threshold`={self.guide_reroll_threshold}, got "
                f"{self.guide_keep_high}."
            )
        if self.guide_reroll and self.guide_reshape == "percentile" and self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                "`max_tokens_per_micro_batch` must be None with `guide_reshape='percentile'`, got "
                f"{self.max_tokens_per_micro_batch}: γ is a quantile over a micro-batch, which would hold rows of "
                "like length. Leave it out, or set `guide_reshape='constant'`."
            )
        if self.guide_reroll and (self.loss_type not in CLIPPED or self.importance_sampling_level != "token"):
            raise ValueError(
                f"Guide changes ratios of single tokens: `loss_type` must be one of {CLIPPED} and "
                f"`importance_sampling_level` 'token', got {self.loss_type!r} and "
                f"{self.importance_sampling_level!r}. Change them, or set `guide_reroll=False`."
            )


class GuideGRPOTrainer(PolicyTrainer):
    r"""
    Guide-GRPO: prompts that the policy fails at are sampled again with a hint, and learned without it.

    If no completion of a prompt q is solved, its whole group is replaced by one sampled under the prompt with a hint
    h, provided that some of that succeed and not all. Tokens are scored under q (arXiv:2506.13923):

    $$
    r_t = \frac{\pi_\theta(o_t \mid q, o_{<t})}{\pi_{old}(o_t \mid q \oplus h, o_{<t})}, \qquad
    L_t = -A\, f(r_t), \qquad f(r) = \frac{r}{r + \gamma},
    $$

    without clipping. γ is, as in the released code, a quantile of the guided ratios of a micro-batch; here of those of
    all ranks, and of tokens of the loss only. It thus depends on `per_device_train_batch_size` and on how many guided
    rows meet in a micro-batch; `guide_reshape="constant"` does not. Groups that teach nothing in either way are
    replaced by fresh prompts.

    The ratio is known from the released code, and so are the defaults; the paper's other variants (a second fallback
    with a whole solution in the prompt, groups with half of their rows guided, failures of the plain group mixed in)
    are left out.

    Relations:
        Scaf-GRPO puts a single hinted success into the group and trains it *with* its hint; the two replace one
        stage. HPT shows a demonstration where hints do not help either; the two combine.

    Paper: [Adaptive Guidance Accelerates Reinforcement Learning of Reasoning
    Models](https://huggingface.co/papers/2506.13923).

    Example:

    ```python
    >>> from papertrl import GuideGRPOTrainer
    >>> dataset = dataset.map(lambda row: {"hint": row["prompt"] + " Use modular arithmetic."})  # doctest: +SKIP
    >>> trainer = GuideGRPOTrainer("Qwen/Qwen3-0.6B", reward, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("guide_grpo")
    extends = {
        "columns": {"guide_reroll": False},
        "filter_groups": ({"guide_reroll": False}, {"guide_max_resample_batches": 0}),
        "ratios": ({"guide_reroll": False}, {"guide_reshape": "none"}),
        "trust_region": {"guide_reroll": False},
    }
    replaces = {"repair": {"guide_reroll": False}}
    config_class = GuideGRPOConfig

    @classmethod
    def needed_columns(cls, args):
        return [*super().needed_columns(args), args.guide_hint_column]

    def groups_to_repair(self, scored: ScoredBatch) -> torch.Tensor:
        failing = self.solved_share(scored) <= self.args.guide_reroll_threshold
        self.log_metric("guide/reroll_fraction", failing.float().mean())
        return failing

    def repair(self, draft: Draft) -> None:
        share = self.solved_share(draft.scored)
        groups = (share <= self.args.guide_reroll_threshold).nonzero().squeeze(1).tolist()
        places = [p for g in groups if self._hint(draft, draft.places(g)[0]) is not None for p in draft.places(g)]
        if not places:
            return
        hinted = self.reroll(
            [draft.rows[p]["inputs"] for p in places],
            [self._hint(draft, p) for p in places],
            self.generation.group_size,
        )
        success = self.solved_share(hinted.scored)
        kept = self._teaches(success)
        self.log_metric("guide/hinted_accuracy", success.mean())
        self.log_metric("guide/kept_hinted_groups", kept.float().sum())
        kept = kept.tolist()
        for index, place in enumerate(places):
            if kept[index // self.generation.group_size]:
                draft.take(place, hinted, index, scored_under=draft.rows[place]["prompt_ids"])
                draft.scored.off_prompt[place] = self.args.guide_importance_weighting

    def filter_groups(self, scored: ScoredBatch) -> torch.Tensor | None:
        keep = super().filter_groups(scored)
        mine = self._teaches(self.solved_share(scored))
        return mine if keep is None else mine & keep

    def refill_rounds(self) -> int:
        return max(super().refill_rounds(), self.args.guide_max_resample_batches)

    def change_ratios(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        super().change_ratios(stats, record)
        guided, gamma = (record.source == Source.HINTED).unsqueeze(1), self.args.guide_gamma
        if self.args.guide_reshape == "percentile":
            ratios = self.gather_ragged(stats.ratio.detach()[guided & record.loss_mask.bool()], fill=-1.0)
            gamma = percentile_gamma(ratios, gamma)
            self.log_metric("guide/gamma", gamma)
        power = self.args.guide_reshape == "power"
        stats.reshape(guided, stats.ratio**gamma if power else reshape_ratio(stats.ratio, gamma))

    def trust_region(self, stats: PolicyStatistics, record: RolloutRecord) -> None:
        super().trust_region(stats, record)
        guided = (record.source == Source.HINTED).unsqueeze(1)
        tokens = guided & record.loss_mask.bool()
        self.log_mean("guide/token_fraction", tokens.sum(), record.loss_mask.sum())
        self.log_mean("guide/ratio_mean", (stats.log_ratio.exp() * tokens).sum(), tokens.sum())
        self.log_mean("guide/approx_kl", (-stats.log_ratio * tokens).sum(), tokens.sum())
        stats.unclip(guided)

    def _teaches(self, share: torch.Tensor) -> torch.Tensor:
        return (share > self.args.guide_reroll_threshold) & (share <= self.args.guide_keep_high)

    def _hint(self, draft: Draft, place: int):
        return draft.rows[place]["inputs"][self.args.guide_hint_column]
