"""UPGE and HPT on GRPO."""

from dataclasses import replace
from typing import Any

import torch
from trl.data_utils import apply_chat_template

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.masked import masked_mean
from ...losses.policy.groups import group_mean, weighted_sum
from ...losses.policy.hpt_upge import (
    ADVANTAGES,
    DENOMINATORS,
    INSTANCES,
    MASKS,
    SHAPES,
    Estimator,
    choose_advantages,
    coefficient,
    coefficient_loss,
    soft_weights,
    switch_weights,
)
from ...losses.terms import LossTerm
from .base import PolicyConfig, PolicyTrainer
from .draft import Draft
from .objective import PolicyStatistics, column
from .record import RolloutRecord, ScoredBatch, Source

# Those whose own loss is in the table; the others would give their normalizer alone
_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")
_PARTS = {
    "mask": "hpt_upge_mask",
    "denominator": "hpt_upge_denominator",
    "advantage": "hpt_upge_advantage",
    "shape": "hpt_upge_shape",
}


@method_config
class HptUpgeGRPOConfig(PolicyConfig):
    """
    Configuration of [`HptUpgeGRPOTrainer`].

    TRL field with another default: `loss_type` "dr_grpo", which sums over tokens and has a constant divisor; see
    `hpt_balance` for what becomes of that. The paper samples 8 completions for each of 128 prompts, at a constant
    learning rate of 5e-6.
    """

    hpt_mode: str = method_field(
        "switch",
        "What a prompt learns from: its demonstration instead of its rollouts where these fail (`switch`), both, "
        "weighted by how many are right (`soft`), or its rollouts (`none`).",
        choices=("switch", "soft", "none"),
    )
    hpt_gate: float = method_field(
        0.0,
        "γ, share of solved rollouts up to which a prompt fails (`switch`); see `success_threshold`. The paper: 0 for "
        "Qwen, 0.25 for Llama. 1 is supervised learning alone.",
        ge=0,
        le=1,
    )
    hpt_sft_coef: float = method_field(
        1.0, "Weight of the loss on demonstrations. The paper also takes 0.3 (Qwen2.5-Math-1.5B).", ge=0
    )
    hpt_balance: str = method_field(
        "paper",
        "Weight of rollouts against demonstrations with `loss_type='dr_grpo'`: rollouts summed over tokens, "
        "demonstrations averaged (`paper`, Eq. 11 to 13); the released code's (`released`); or rollouts divided by "
        "`max_completion_length` (`loss_type`). Other loss types divide rollouts as they do anyway.",
        choices=("paper", "released", "loss_type"),
    )
    hpt_demo_column: str = method_field(
        "completion",
        "Dataset column with the demonstration, as text or as a list with one assistant message. Where it is `None`, "
        "a prompt learns from its rollouts. The released data call it `target`.",
    )
    hpt_upge_instance: str | None = method_field(
        None,
        "Row of the paper's table whose coefficient form is the loss of rollouts; `loss_type` is then only its "
        "normalizer, and the loss's value has no meaning. `None` leaves the loss to `loss_type`; TRL's has the "
        "gradient of `grpo`, which is the paper's.",
        choices=tuple(INSTANCES),
        was="upge_instance",
    )
    hpt_upge_mask: str | None = method_field(
        None, "Stabilization mask; `None` takes the row's.", choices=MASKS, was="upge_mask"
    )
    hpt_upge_denominator: str | None = method_field(
        None,
        "What the policy's probability is divided by: itself (`theta`), that at sampling time (`old`), 1 (`one`), or "
        "what makes the ratio a sequence's geometric mean (`sequence`); `None` takes the row's.",
        choices=DENOMINATORS,
        was="ratio_denominator",
    )
    hpt_upge_advantage: str | None = method_field(
        None,
        "Advantage of rollouts: the configured one (`rollouts`), `one`, or `sign` of the reward; `None` takes the "
        "row's.",
        choices=ADVANTAGES,
        was="upge_advantage",
    )
    hpt_upge_shape: str | None = method_field(
        None,
        "Function of the ratio whose gradient is taken; `None` takes the row's.",
        choices=SHAPES,
        was="upge_shape",
    )
    hpt_upge_gamma: float = method_field(0.1, "γ of the shape `p_div_p_gamma`.", gt=0, was="upge_gamma")
    hpt_max_grad_norm_skip: float | None = method_field(
        80.0,
        "Gradient norm above which an optimizer step is left out.",
        gt=0,
        optional=True,
        was="upge_max_grad_norm_skip",
    )
    loss_type: str = method_field(
        "dr_grpo", "Normalizer of the loss, and the loss itself without `hpt_upge_instance`."
    )

    def validate(self):
        super().validate()
        if self.hpt_max_grad_norm_skip is not None and self.deepspeed:
            raise ValueError(
                f"`hpt_max_grad_norm_skip` is {self.hpt_max_grad_norm_skip}, but DeepSpeed steps by itself and "
                "cannot be held back. Set it to None."
            )
        if self.hpt_mode == "soft" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "`hpt_mode='soft'` compares rollouts with a demonstration of reward 1: `multi_objective_aggregation` "
                f"must be 'sum_then_normalize', got {self.multi_objective_aggregation!r}."
            )
        if self.hpt_mode != "none" and self.hpt_balance == "released" and self.loss_type != "dr_grpo":
            raise ValueError(
                f"`hpt_balance='released'` is a balance of sums over tokens: `loss_type` must be 'dr_grpo', got "
                f"{self.loss_type!r}. Set it, or `hpt_balance='loss_type'`."
            )
        if self.hpt_upge_instance is None:
            given = [name for name in _PARTS.values() if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"`{given[0]}` is {getattr(self, given[0])!r}, but changes a row of the table and "
                    f"`hpt_upge_instance` names none. Set it to one of {tuple(INSTANCES)}."
                )
            return
        if self.loss_type not in _LOSS_TYPES:
            raise ValueError(
                f"`loss_type` is the normalizer of `hpt_upge_instance={self.hpt_upge_instance!r}` and must be one of "
                f"{_LOSS_TYPES}, got {self.loss_type!r}."
            )
        if self.importance_sampling_level != "token":
            raise ValueError(
                f"`importance_sampling_level` is {self.importance_sampling_level!r}, but `hpt_upge_instance` decides "
                "by its mask and denominator. Leave it at 'token'; the ratio of sequences is "
                "`hpt_upge_instance='gspo'`."
            )
        for name, value in INSTANCES[self.hpt_upge_instance].settings.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"`hpt_upge_instance={self.hpt_upge_instance!r}` goes with `{name}={value!r}`, got "
                    f"{getattr(self, name)!r}. Set it, or take the row 'grpo'."
                )

    def estimator(self) -> Estimator:
        """The row of the table that `hpt_upge_instance` names, with the parts that are set in its place."""
        own = {part: getattr(self, name) for part, name in _PARTS.items() if getattr(self, name) is not None}
        return replace(INSTANCES[self.hpt_upge_instance], **own)


class HptUpgeGRPOTrainer(PolicyTrainer):
    r"""
    Hybrid post-training: each prompt learns from its rollouts if the model sometimes solves it, else from a
    demonstration.

    With P the share of a prompt's rollouts that solve it (arXiv:2509.04419, Eq. 8 to 13),

    $$
    L = \mathbb{1}[P > \gamma]\, L_{RL} + \mathbb{1}[P \le \gamma]\, L_{SFT}, \qquad
    L_{SFT} = -\frac{1}{|\tau^*|} \sum_t \log \pi(\tau^*_t),
    $$

    and a batch's loss is the mean over its prompts. The first row of a failing group becomes the demonstration, its
    other rows leave the loss. \\( L_{RL} \\) is the configured loss over the prompts that are left, times their
    share: by default the mean over rollouts of the sum over their tokens (Eq. 11), which no length divides, so that
    the cap `max_completion_length` does not matter. `hpt_balance="released"` is the released code's: the sum over the
    rollouts of a micro-batch over the longest completion, and the mean over all tokens of demonstrations, so that
    their balance depends on `per_device_train_batch_size`. Longest completion and mean are those of the generation
    batch here, of the micro-batch there. `hpt_mode="soft"` is its other variant: every group has a demonstration
    next to its rollouts, and the number of right rows decides the weights of \\( L_{RL} \\), of \\( L_{SFT} \\), and
    of an off-policy policy gradient on the demonstration (the table's row `luffy`, with the demonstration counted as
    right in the group's advantages); other group sizes than 8 take the nearest eighth.

    Demonstrations have no ratio and no clip, enter no reward statistics, and end without the end token where they
    are longer than `max_completion_length`. An update whose gradient norm is above `hpt_max_grad_norm_skip`, or is
    not finite, is left out, the optimizer's state included.

    The paper derives both losses from one estimator (UPGE, Eq. 6), \\( \mathbb{1}_{stable} \frac{1}{\pi_{ref}} \hat A
    \nabla \pi \\), whose parts give the known methods. The fields are `hpt_upge_instance` and so on:

    | `instance` | `denominator` | `advantage` | `mask` | \\( c \\) on \\( \nabla \log \pi \\) |
    |---|---|---|---|---|
    | `sft` | `theta` | `one` | `none` | 1 |
    | `ppo`, `grpo`, `dapo`, `dr_grpo` | `old` | `rollouts` | `clip` | mask·A·r |
    | `reinforce` | `theta` | `sign` | `none` | A |
    | `cispo` | `old` | `rollouts` | `cispo` | mask·A·r |
    | `cispo_minimax` | `old` | `rollouts` | `cap` | A·min(r, 1 + ε) |
    | `gspo` | `sequence` | `rollouts` | `sequence` | mask·A·s |
    | `srft` | `one` | `rollouts` | `none` | A·π |
    | `luffy` | `one` | `rollouts` | `none` | A·π·f'(π), f(π) = π/(π + γ) |

    The mask `cispo` is 0 above 1 + ε whatever the sign of A, which is our reading of its name.

    With `hpt_upge_instance`, the loss of rollouts is −c·logπ with c held fixed. Clip bounds are 1 ± ε in every row,
    where TRL's `loss_type="cispo"` caps at ε itself. A token whose ratio another method has reshaped keeps the
    configured loss. Metrics: `loss/hpt_sft`, the demonstrations' mean negative log-likelihood per token (0 in a
    micro-batch without), `upge/coefficient` and `upge/masked_tokens` of the rollouts, and those with `hpt/`.

    Relations:
        Guide-GRPO gives failing prompts a hint and samples anew; it needs hints instead of demonstrations, and the
        two combine: what still fails is demonstrated. SFT and then GRPO spends demonstrations on what is solved.

    Paper: [Towards a Unified View of Large Language Model
    Post-Training](https://huggingface.co/papers/2509.04419). The equation has a clip and standardized advantages, as
    here. The released run has neither (here: `hpt_upge_instance="grpo"`, `hpt_upge_mask="none"`,
    `scale_rewards="none"`), and an entropy bonus of 0.001.

    Example:

    ```python
    >>> from papertrl import HptUpgeGRPOConfig, HptUpgeGRPOTrainer
    >>> args = HptUpgeGRPOConfig(hpt_demo_column="solution")  # doctest: +SKIP
    >>> trainer = HptUpgeGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("hpt_upge")
    extends = {
        "columns": {"hpt_mode": "none"},
        "repair": {"hpt_mode": "none"},
        "demonstrate": {"hpt_mode": "none"},
        "combine_rewards": {"hpt_mode": "none"},
        "select": {"hpt_mode": "none"},
        "contribute": {"hpt_mode": "none", "hpt_upge_instance": None},
        "prepare_objective": {"hpt_mode": "none"},
        "extra_terms": {"hpt_mode": "none"},
        "before_update": {"hpt_max_grad_norm_skip": None},
    }
    replaces = {"objective": {"hpt_upge_instance": None}}
    config_class = HptUpgeGRPOConfig

    @classmethod
    def needed_columns(cls, args: Any) -> list[str]:
        return [*super().needed_columns(args), args.hpt_demo_column]

    # --- Demonstrations -----------------------------------------------------------------------------------------

    def groups_to_repair(self, scored: ScoredBatch) -> torch.Tensor | None:
        groups = super().groups_to_repair(scored)
        performance = self.solved_share(scored)
        self.log_metric("hpt/solve_none", (performance <= 0).float().mean())
        self.log_metric("hpt/solve_all", (performance >= 1).float().mean())
        mine = self._to_demonstrate(performance)
        return mine if groups is None else groups | mine

    def demonstrate(self, draft: Draft) -> None:
        super().demonstrate(draft)
        for group in self._to_demonstrate(self.solved_share(draft.scored)).nonzero().squeeze(1).tolist():
            place = draft.places(group)[0]
            row = draft.rows[place]
            demonstration = row["inputs"][self.args.hpt_demo_column]
            if demonstration is not None:
                draft.demonstrate(place, *self._completion(row["prompts"], demonstration))

    def _verdicts(self, scored: ScoredBatch) -> torch.Tensor:
        return self.solved(scored).float().masked_fill(scored.rewards.isnan().all(1), torch.nan)

    def _to_demonstrate(self, performance: torch.Tensor) -> torch.Tensor:
        if self.args.hpt_mode == "soft":
            return torch.ones_like(performance, dtype=torch.bool)
        return performance <= self.args.hpt_gate

    def _completion(self, prompt: Any, demonstration: Any) -> tuple[Any, list[int], bool]:
        """Demonstration as the policy would have given it: text or messages, tokens, and whether they were cut."""
        if isinstance(prompt, list):
            if isinstance(demonstration, str):
                demonstration = [{"role": "assistant", "content": demonstration}]
            roles = [message["role"] for message in demonstration]
            if roles != ["assistant"]:
                raise ValueError(
                    f"`hpt_demo_column` '{self.args.hpt_demo_column}' must hold one assistant message per prompt, "
                    f"got messages of {roles}."
                )
            text = apply_chat_template(
                {"prompt": prompt, "completion": demonstration},
                self.tokenizer,
                chat_template=self.chat_template,
                **self.chat_template_kwargs,
            )["completion"]
        elif isinstance(demonstration, str):
            text = demonstration
        else:
            raise ValueError(
                f"`hpt_demo_column` '{self.args.hpt_demo_column}' must hold text where prompts are text, got "
                f"{type(demonstration).__name__}."
            )
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        # What a template puts after the end token is not sampled
        ends = [i for i, token in enumerate(ids) if token in self.eos_token_ids]
        ids = ids[: ends[-1] + 1] if ends else [*ids, self.tokenizer.eos_token_id]
        limit = self.max_completion_length
        return demonstration, ids[:limit], len(ids) > limit

    # --- Rewards and weights ------------------------------------------------------------------------------------

    def combine_rewards(self, scored: ScoredBatch) -> torch.Tensor:
        rewards = super().combine_rewards(scored)
        if not self.model.training:
            return rewards
        if self.args.hpt_mode == "soft":
            rewards = rewards.masked_fill(scored.source == Source.DEMONSTRATION, 1.0)
        # Without reward they do not enter the statistics behind the others' advantages
        return rewards.masked_fill(self._prompt_weights(scored)[:, :2].sum(1) == 0, torch.nan)

    def _prompt_weights(self, scored: ScoredBatch) -> torch.Tensor:
        """Weights of RL, off-policy RL and SFT for the prompt of each row, `(rows, 3)`."""
        shown = scored.source == Source.DEMONSTRATION
        demonstrated = group_mean(shown.float(), scored.group_ids) > 0
        weights = switch_weights(demonstrated)
        if self.args.hpt_mode == "soft":
            verdicts = self._verdicts(scored).masked_fill(shown, 1.0)
            soft = soft_weights(group_mean(verdicts, scored.group_ids))
            weights = torch.where(demonstrated.unsqueeze(1), soft, weights)
        return weights

    def select(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        # Before other methods choose among what is left
        weights = self._prompt_weights(scored)
        # The base averages over the rows that are left, Eq. 13 over all prompts
        share = (weights[:, 0] > 0).float().mean()
        shown = scored.source == Source.DEMONSTRATION
        row_weight = (weights[:, 0] * share).masked_fill(shown, 0.0)
        row_weight = row_weight * self._rollout_factor(scored, (row_weight > 0).sum() / share.clamp(min=1e-9))
        record.row_weight = record.row_weight * row_weight[scored.local]
        shown = shown.float().unsqueeze(1) * weights
        if self.args.hpt_balance == "released":
            # Of all their tokens, each demonstration has the mean of its own
            lengths = scored.lengths * (shown[:, 2] > 0)
            shown[:, 2] *= lengths / lengths.sum().clamp(min=1) * (len(lengths) / self.num_generations)
        record.statistics["hpt/off_policy_weight"] = shown[scored.local, 1]
        record.statistics["hpt/sft_weight"] = shown[scored.local, 2]
        self.log_metric("hpt/sft_prompt_fraction", (weights[:, 2] > 0).float().mean())
        super().select(record, scored)

    def _rollout_factor(self, scored: ScoredBatch, rows: torch.Tensor) -> torch.Tensor | float:
        """What turns TRL's "dr_grpo", a sum over tokens by `rows` · `max_completion_length`, into the balance."""
        if self.loss_type != "dr_grpo" or self.args.hpt_balance == "loss_type":
            return 1.0
        if self.args.hpt_balance == "paper":
            return float(self.max_completion_length)
        return self.max_completion_length * rows / (scored.lengths.max() * self.micro_batches_per_generation())

    def prepare_objective(self, record: RolloutRecord) -> None:
        super().prepare_objective(record)
        # Whatever the selection among rollouts did to it, a demonstration counts in full
        shown = (record.source == Source.DEMONSTRATION).unsqueeze(1)
        record.loss_mask = torch.where(shown, record.completion_mask, record.loss_mask)

    # --- Loss ---------------------------------------------------------------------------------------------------

    def contributing_rows(self, record: RolloutRecord) -> torch.Tensor:
        rows = super().contributing_rows(record)
        if self.args.hpt_upge_instance is not None and self.args.estimator().advantage != "rollouts":
            rows = rows | ((record.row_weight > 0) & record.loss_mask.any(1))
        if self.args.hpt_mode != "none":
            rows = rows | (record.statistics["hpt/off_policy_weight"] > 0) | (record.statistics["hpt/sft_weight"] > 0)
        return rows

    def objective(self, stats: PolicyStatistics, record: RolloutRecord) -> torch.Tensor:
        found, advantages = self._coefficient(self.args.estimator(), stats, record)
        live = record.loss_mask * (record.row_weight > 0).unsqueeze(1) * (advantages != 0)
        self.log_mean("upge/coefficient", (found * live).sum(), live.sum())
        self.log_mean("upge/masked_tokens", ((found == 0) * live).sum(), live.sum())
        loss = coefficient_loss(found, stats.logps)
        if stats.reshaped is None:
            return loss
        # Ratios that another method has set, it has set for the configured loss
        return torch.where(stats.reshaped, super().objective(stats, record), loss)

    def _coefficient(self, estimator: Estimator, stats: PolicyStatistics, record: RolloutRecord):
        """Coefficients `(batch, time)`, and the advantages in them."""
        rewards = weighted_sum(record.rewards, self.reward_weights.to(record.rewards.device))
        advantages = choose_advantages(
            estimator.advantage, column(record.advantages), rewards - self.args.success_threshold
        )
        found = coefficient(
            estimator,
            stats.logps,
            stats.log_ratio,
            advantages,
            record.loss_mask,
            1 - stats.epsilon_low,
            1 + stats.epsilon_high,
            stats.delta,
            self.args.hpt_upge_gamma,
        )
        return found, advantages

    def extra_terms(self, stats: PolicyStatistics, record: RolloutRecord) -> list[LossTerm]:
        terms = super().extra_terms(stats, record)
        if not self.model.training:
            return terms
        parts = [("sft", "sft", self.args.hpt_sft_coef)]
        if self.args.hpt_mode == "soft":
            parts.append(("off_policy", "luffy", 1.0))
        prompts = self.args.generation_batch_size / self.num_generations
        for name, instance, coef in parts:
            weight = record.statistics[f"hpt/{name}_weight"]
            found, _ = self._coefficient(INSTANCES[instance], stats, record)
            losses = weight * masked_mean(coefficient_loss(found, stats.logps), record.loss_mask, dim=1)
            terms.append(LossTerm(f"hpt_{name}", losses, (weight > 0).float(), coef, per=prompts))
        return terms

    def before_update(self, grad_norm: torch.Tensor) -> None:
        super().before_update(grad_norm)
        skipped = not bool(grad_norm <= self.args.hpt_max_grad_norm_skip)
        if skipped:
            self.model.zero_grad(set_to_none=True)
        self.log_metric("hpt/skipped_steps", float(skipped))
