"""DisCO on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...core.stages import remedy
from ...losses.masked import masked_mean
from ...losses.policy.disco import (
    answer_labels,
    answer_shares,
    capped_ratio,
    constraint_weight,
    discriminative_objective,
    sampling_divergence,
)
from .base import PolicyConfig, PolicyTrainer
from .batching import why_not_regrouped
from .objective import PolicyStatistics
from .record import RolloutRecord, ScoredBatch, Source

_LOSS_TYPES = ("grpo", "dr_grpo", "dapo")
# Default τ of each score
_TAU = {"logl": 10.0, "lratio": 1.0}
# Stages in which another method would work on single tokens, or on a loss that DisCO does not have
_PER_TOKEN = ("objective", "spread")


@method_config
class DiscoGRPOConfig(PolicyConfig):
    """
    Configuration of [`DiscoGRPOTrainer`].

    The paper samples 8 completions for each of 128 prompts at temperature 0.6 and makes 4 updates of them
    (`steps_per_generation`); with one update a batch, π is π_old and the constraint never acts. An answer is right if
    its combined reward is above `success_threshold`.
    """

    disco_score: str = method_field(
        "logl",
        "Score of an answer: mean log-probability of its tokens (`logl`) or their mean ratio π/π_old (`lratio`). "
        "`none` is GRPO.",
        choices=("logl", "lratio", "none"),
    )
    disco_dro: bool = method_field(
        True, "Whether the best-scored wrong answers weigh more (DisCO), or all alike (DisCO-b)."
    )
    disco_tau: float | None = method_field(
        None,
        "τ: the lower, the more the best-scored wrong answers weigh. `None` takes the paper's 10 for `logl` and 1 for "
        "`lratio`.",
        gt=0,
    )
    disco_delta: float = method_field(1e-4, "δ, allowed divergence from the sampling policy, in nats per token.", ge=0)
    disco_beta: float = method_field(1e3, "β, weight of the penalty beyond δ.", ge=0)
    disco_kl: str = method_field("k1", "Estimate of the divergence.", choices=("k1", "k3"))

    def validate(self):
        super().validate()
        if self.disco_score == "none":
            return
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"DisCO has a loss of its own; `loss_type` averages what is added to it and must be one of "
                f"{_LOSS_TYPES}, got {self.loss_type!r}. Change it, or set `disco_score='none'`."
            )
        if self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                f"`max_tokens_per_micro_batch` must be None with DisCO, got {self.max_tokens_per_micro_batch}: DisCO "
                "compares all answers to a question in one pass, and estimates its constraint on each pass. Leave it "
                "out, or set `disco_score='none'`."
            )
        sizes = [("per_device_train_batch_size", self.num_generations)]
        if self.eval_strategy != "no":
            sizes.append(("per_device_eval_batch_size", self.num_generations_eval or self.num_generations))
        for name, group in sizes:
            if getattr(self, name) % group:
                raise ValueError(
                    f"`{name}` must be a multiple of the {group} completions of a prompt, got {getattr(self, name)}: "
                    "DisCO compares all answers to a question in one pass. Change it, or `num_generations`."
                )


class DiscoGRPOTrainer(PolicyTrainer):
    r"""
    Discriminative constrained optimization: right answers get higher scores than wrong ones, near the sampling policy.

    Of a question, let P be the right answers and N the wrong ones. The score s of an answer is the mean over its
    tokens of log π or of π/π_old, without a clip. Maximized is, over Q questions (arXiv:2505.12366),

    $$
    J = \frac{1}{Q} \sum_q \Big[ \mathrm{mean}_P\, s - \tau \log \mathrm{mean}_N\, e^{s/\tau} \Big], \qquad
    D \le \delta,
    $$

    D being the mean over all tokens of an estimate of KL(π_old ‖ π). Every question with right and wrong answers
    weighs alike, where GRPO gives it the weight sqrt(p(1-p)); those with one kind only count in Q. DisCO-b
    (`disco_dro=False`) has the plain mean over N. The constraint becomes the loss β·max(D − δ, 0)·D with the first
    factor held fixed. The paper squares the hinge, which with half of its β has this gradient; β is on the scale of
    the released code.

    Advantages are ±1 by these labels, and 0 for questions with one kind of answer. Tokens and rows that were selected
    away count neither in scores nor in P, N and D. Rows that were sampled with a hint, or are none of the policy's,
    are scored like all others, but neither D nor its gradient covers them. D is estimated on each micro-batch over
    all ranks, as in the released code: the hinge needs it before the gradient, which for a whole optimizer step would
    take another pass over it. `loss_type` averages a divergence to a reference and extra terms; J and D have their own
    normalizers whatever it is. TRL's `clip_ratio/*` are logged although nothing is clipped.

    Relations:
        Of a reward, DisCO sees whether it is above the threshold: what others add for length or style does not count.
        Lp-Reg's penalty adds to DisCO as to GRPO; ratios it would trust are trusted here anyway. What Guide puts in
        the place of ratios is what `lratio` scores; `logl` has no ratios and refuses it. Methods that replace
        the loss of single tokens or give them advantages of their own are refused. DLER's filter keeps the very
        questions that have answers of both kinds; set `dler_advantage_whitening="none"`.

    Paper: [DisCO: Reinforcing Large Reasoning Models with Discriminative Constrained
    Optimization](https://huggingface.co/papers/2505.12366).

    Example:

    ```python
    >>> from papertrl import DiscoGRPOConfig, DiscoGRPOTrainer
    >>> args = DiscoGRPOConfig(gradient_accumulation_steps=4, steps_per_generation=16)  # doctest: +SKIP
    >>> trainer = DiscoGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("disco")
    extends = {
        "contribute": ({"disco_score": "none"}, {"disco_beta": 0.0}),
        "prepare_objective": {"disco_score": "none"},
    }
    # Of these, `spread` and `trust_region` are left to the base: whole answers are scored, without a clip, so that
    # nobody may decide over advantages or ranges of single tokens
    replaces = {
        "scale": {"disco_score": "none"},
        "spread": {"disco_score": "none"},
        "trust_region": {"disco_score": "none"},
        "objective": {"disco_score": "none"},
    }
    config_class = DiscoGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self.args.disco_score != "none" and self.args.steps_per_generation > 1 and self.batching is None:
            cause = why_not_regrouped(self) or "`group_batches` and `skip_zero_rows` are off"
            raise ValueError(
                f"DisCO compares all answers to a question in one pass, but micro-batches are cut without regard to "
                f"questions: {cause}. Change that, or set `steps_per_generation=1`."
            )
        if self.args.disco_score != "none" and self.args.disco_beta > 0:
            self.warn_if_on_policy("disco", "the constraint (`disco_delta`, `disco_beta`) is")

    @classmethod
    def refuse_clashes(cls, args):
        super().refuse_clashes(args)
        if args.disco_score == "none":
            return
        refused = dict.fromkeys(_PER_TOKEN, ("single tokens", "scores whole answers", "none"))
        if args.disco_score == "logl":
            refused["ratios"] = ("ratios", "has none in the score 'logl'", "lratio")
        for stage, (what, why, score) in refused.items():
            for owner in cls.acting(stage, args):
                if owner.method.name != "disco":
                    changes = owner.__dict__.get("extends", {}) | owner.__dict__.get("replaces", {})
                    ways = " or ".join(filter(None, [f"disco_score='{score}'", remedy(changes[stage])]))
                    raise ValueError(
                        f"Methods 'disco' and '{owner.method.name}' do not combine: '{owner.method.name}' changes "
                        f"{what} in the stage '{stage}', but DisCO {why}. Leave one of them out, or set {ways}."
                    )

    def scale(self, scored: ScoredBatch, rewards: torch.Tensor, centered: torch.Tensor) -> torch.Tensor:
        usable = rewards.masked_fill(~scored.usable, torch.nan)
        labels = answer_labels(usable, scored.group_ids, self.args.success_threshold)
        self.log_metric("disco/mixed_questions", (labels != 0).float().mean())
        return labels

    def prepare_objective(self, record: RolloutRecord) -> None:
        super().prepare_objective(record)
        rows = record.row_weight.shape[0] * self.accelerator.num_processes
        group = self.num_generations if self.model.training else self.num_generations_eval
        record.statistics["disco/questions"] = torch.full_like(record.row_weight, rows / group)
        constrained = self.accelerator.reduce(_constrained(record).sum(), reduction="sum")
        record.statistics["disco/constrained_tokens"] = constrained.expand_as(record.row_weight)

    def contributing_rows(self, record: RolloutRecord) -> torch.Tensor:
        rows = super().contributing_rows(record)
        # The constraint covers every token that was sampled as it is scored, but holds by itself while π is π_old
        if record.old_per_token_logps is None:
            return rows
        return rows | _constrained(record).any(1)

    def objective(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        mask = record.loss_mask * (record.row_weight > 0).unsqueeze(1)
        tokens = mask.sum(1)
        labels = record.advantages.masked_fill(tokens == 0, 0.0)
        values = stats.logps if self.args.disco_score == "logl" else capped_ratio(stats.log_ratio)
        if stats.reshaped is not None:
            values = torch.where(stats.reshaped, stats.ratio, values)
        tau = (self.args.disco_tau or _TAU[self.args.disco_score]) if self.args.disco_dro else None
        scores = masked_mean(values, mask, dim=1)
        shares = answer_shares(scores, labels, record.group_ids, tau)
        divergence = sampling_divergence(stats.log_ratio, self.args.disco_kl)
        constrained = _constrained(record)
        mean = self._micro_batch_mean(divergence, constrained)
        penalty = constraint_weight(mean, self.args.disco_delta, self.args.disco_beta) * constrained
        self.log_metric("disco/kl", mean)
        self.log_metric("disco/constraint_active", (mean > self.args.disco_delta).float())
        self._log_answers(scores.detach(), labels, shares, record.group_ids, tau)
        weights = labels * shares / (record.statistics["disco/questions"] * tokens.clamp(min=1))
        count = record.statistics["disco/constrained_tokens"].clamp(min=1).unsqueeze(1)
        return self._loss_divisor(record) * (penalty * divergence / count - weights.unsqueeze(1) * values)

    def _micro_batch_mean(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean over the tokens in `mask` of this micro-batch on every rank, without gradient."""
        sums = torch.stack([(values.detach() * mask).sum(), mask.sum()])
        total, count = self.accelerator.reduce(sums, reduction="sum")
        return total / count.clamp(min=1.0)

    def _loss_divisor(self, record: RolloutRecord) -> torch.Tensor:
        """What the reduction of `loss_type` divides the sum over the generation batch by, `(batch, 1)` or scalar."""
        if self.loss_type == "dapo":
            return record.num_items_in_batch.clamp(min=1.0)
        if self.loss_type == "dr_grpo":
            return record.num_rows_in_batch * self.max_completion_length
        return record.num_rows_in_batch * record.loss_mask.sum(1, keepdim=True).clamp(min=1.0)

    def _log_answers(self, scores, labels, shares, group_ids, tau) -> None:
        right, wrong = (labels > 0) & (shares > 0), (labels < 0) & (shares > 0)
        self.log_mean("disco/score_right", (scores * right).sum(), right.sum())
        self.log_mean("disco/score_wrong", (scores * wrong).sum(), wrong.sum())
        objective = discriminative_objective(scores, labels, group_ids, tau)
        margin = discriminative_objective(scores, labels, group_ids, None)
        mixed = shares.sum() / 2
        self.log_mean("disco/objective", objective.sum(), mixed)
        self.log_mean("disco/margin", margin.sum(), mixed)
        self.log_mean("disco/negative_concentration", (shares.square() * wrong).sum(), mixed)


def _constrained(record: RolloutRecord) -> torch.Tensor:
    """
    Tokens of the constraint, `(batch, time)`: those of the loss that the policy sampled by itself.

    Rows from elsewhere, or sampled with a hint, tell nothing about the step from the sampling policy.
    """
    rows = (record.row_weight > 0) & (record.source == Source.POLICY)
    return record.loss_mask * rows.unsqueeze(1)
