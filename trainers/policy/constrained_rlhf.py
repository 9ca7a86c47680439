"""Constrained RLHF (ξ and μ) on GRPO."""

import json
import math
from typing import Any

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.constrained_rlhf import (
    ProxyPointSearch,
    constraint_weights,
    difference,
    kl_reward,
    mix_advantages,
    standardize,
    update_multipliers,
    within,
)
from .base import PolicyConfig, PolicyTrainer
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch

_COEFFICIENTS = ("alpha", "gamma", "rho", "sigma", "tolerance")


@method_config
class ConstrainedRlhfGRPOConfig(PolicyConfig):
    """
    Configuration of [`ConstrainedRlhfGRPOTrainer`].

    The paper's thresholds are those of its task: 0.44 of the intent score and 0.238 METEOR. `scale_rewards` defaults
    to `"none"`, since every source is standardized over the batch.
    """

    constraint_thresholds: dict[str, float] | str | None = method_field(
        None,
        "θ, value to hold each reward at, by the name of the reward function; as JSON on the command line. Rewards "
        "without one keep their `reward_weights`. `None` is GRPO.",
    )
    constraint_mode: str = method_field(
        "equality",
        "`equality` (ξ) holds a reward at its threshold from both sides, by weights that may be negative; "
        "`inequality` (μ) from below.",
        choices=("equality", "inequality"),
    )
    constraint_lagrange_squash: bool = method_field(
        True,
        "Whether weights are tanh (`equality`) or sigmoid (`inequality`) of the multipliers, or these themselves.",
        was="lagrange_squash",
    )
    constraint_lagrange_lr: float = method_field(0.1, "Step size of the multipliers.", gt=0, was="lagrange_lr")
    constraint_lagrange_momentum: float = method_field(
        0.1, "Momentum of the multipliers.", ge=0, lt=1, was="lagrange_momentum"
    )
    constraint_lagrange_init: float | None = method_field(
        None,
        "Multipliers at the start. `None` is 0, or 0.5 without `constraint_lagrange_squash`; the released code draws "
        "the former from N(0, 0.01).",
        gt=-math.inf,
        was="lagrange_init",
    )
    constraint_lagrange_max_grad_norm: float = method_field(
        0.5, "Largest gradient norm of the multipliers.", gt=0, was="lagrange_max_grad_norm"
    )
    constraint_lagrange_fixed: bool = method_field(
        False, "Whether the multipliers stay as they are at the start.", was="lagrange_fixed"
    )
    constraint_proxy_search_metric: str | None = method_field(
        None,
        "Metric of evaluations, higher being better, for which thresholds are searched during the run, such as "
        "`eval_rewards/<name>/mean`. `None` keeps the thresholds.",
        was="proxy_search_metric",
    )
    constraint_proxy_search_steps: dict[str, float] | str | None = method_field(
        None,
        "First simplex of the search: by how much one vertex moves each threshold, by name.",
        was="proxy_search_steps",
    )
    constraint_proxy_search_budget: float = method_field(
        0.1,
        "Share of the run after which thresholds are evaluated though the rewards have not reached them.",
        gt=0,
        le=1,
        was="proxy_search_budget",
    )
    constraint_proxy_search_band: float = method_field(
        0.05,
        "Share of a threshold within which the reward of an evaluation has reached it.",
        gt=0,
        lt=1,
        was="proxy_search_band",
    )
    constraint_proxy_search_alpha: float = method_field(
        1.0, "Reflection of the search by Nelder and Mead.", gt=0, was="proxy_search_alpha"
    )
    constraint_proxy_search_gamma: float = method_field(2.0, "Expansion.", gt=1, was="proxy_search_gamma")
    constraint_proxy_search_rho: float = method_field(0.5, "Contraction.", gt=0, lt=1, was="proxy_search_rho")
    constraint_proxy_search_sigma: float = method_field(0.5, "Shrinkage.", gt=0, lt=1, was="proxy_search_sigma")
    constraint_proxy_search_tolerance: float = method_field(
        0.01,
        "Standard deviation of the metric over the simplex below which the search is over.",
        gt=0,
        was="proxy_search_tolerance",
    )
    scale_rewards: str = method_field("none", "What divides the centered rewards of a source; see TRL's.")

    def validate(self):
        super().validate()
        for name in ("constraint_thresholds", "constraint_proxy_search_steps"):
            setattr(self, name, _numbers_by_name(name, getattr(self, name)))
        if self.constraint_thresholds is not None and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "Constrained RLHF scales each reward by itself: `multi_objective_aggregation` must be "
                f"'sum_then_normalize', got {self.multi_objective_aggregation!r}. Change it, or leave out "
                "`constraint_thresholds`."
            )
        if self.constraint_proxy_search_metric is None:
            return
        names, moved = (
            sorted(value or {}) for value in (self.constraint_thresholds, self.constraint_proxy_search_steps)
        )
        if not names or names != moved or not all(self.constraint_proxy_search_steps.values()):
            raise ValueError(
                "`constraint_proxy_search_metric` needs `constraint_proxy_search_steps` other than 0 for all of "
                f"`constraint_thresholds`, got {self.constraint_proxy_search_steps} for {self.constraint_thresholds}."
            )
        if self.eval_strategy == "no":
            raise ValueError(
                f"`constraint_proxy_search_metric` {self.constraint_proxy_search_metric!r} comes from evaluations, "
                "but `eval_strategy` is 'no'. Set it to 'steps', with `eval_steps`."
            )


def _numbers_by_name(field: str, value: Any) -> dict[str, float] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"`{field}` must be numbers by reward as JSON, got {value!r} ({error}).") from error
    numbers = isinstance(value, dict) and all(isinstance(v, int | float) and math.isfinite(v) for v in value.values())
    if value is not None and not (numbers and value):
        raise ValueError(f"`{field}` must be finite numbers by name of the reward function, or None, got {value!r}.")
    return value


class ConstrainedRlhfGRPOTrainer(PolicyTrainer):
    r"""
    Constrained RLHF: GRPO that holds every reward at a threshold and stays as near to the reference as that allows.

    A reward model tracks what is wanted only up to some point, which depends on the other rewards. So each of the N
    rewards becomes a constraint J_i = θ_i, or J_i ≥ θ_i, with a learned weight w_i = f(λ_i), and the KL divergence to
    the reference is the only objective left (arXiv:2310.04373):

    $$
    A = \big(N - \sum_i w_i\big) A_0 + \sum_i w_i A_i, \qquad
    \lambda_i \leftarrow \lambda_i - \eta f'(\lambda_i) (J_i - \theta_i),
    $$

    with f = tanh for equalities (ξ-PPO) and f = sigmoid for inequalities (μ-PPO). J_i is the mean of what the reward
    function returned for the generation batch of all ranks, NaN left out; the multipliers move once per generation
    batch, after their weights were used.

    The paper has a value head per source. Here A_i is critic-free: the centered reward (stages *baseline* and
    *scale*), standardized over the generation batch; A_0 is the same of the reward −Σ_t log(π_old / π_ref) of a
    sequence. A coefficient of that reward would cancel in the standardization, so there is none. For the same
    reason A_0 pulls back with the same force at any distance, and rewards may swing around their thresholds; a small
    `beta`, whose pull grows with the distance, damps that. It comes on top of A_0 if it is set.

    With `constraint_proxy_search_metric`, the thresholds themselves are searched for in the same run (Nelder and
    Mead): each vertex is held until the rewards of an evaluation have reached it or its budget is used up, and then
    judged by the metric. Policy and multipliers go on from where they are. At the end of the search the best
    thresholds stay. A trusted score among the reward functions needs weight 0 in `reward_weights`.

    Relations:
        Dynamic reward weighting also changes weights during the run, but towards more reward, not up to a point; the
        two replace the same stage. Other methods' baselines and scales act on each source by itself.

    Paper: [Confronting Reward Model Overoptimization with Constrained
    RLHF](https://huggingface.co/papers/2310.04373). The translation to GRPO is ours. With weights that are not
    squashed, the released code reads the wrong entries of the multipliers; this does not.

    Example:

    ```python
    >>> from papertrl import ConstrainedRlhfGRPOConfig, ConstrainedRlhfGRPOTrainer
    >>> args = ConstrainedRlhfGRPOConfig(constraint_thresholds={"meteor": 0.24, "intent": 0.44})  # doctest: +SKIP
    >>> trainer = ConstrainedRlhfGRPOTrainer(
    ...     "Qwen/Qwen3-0.6B", [meteor, intent], args, train_dataset=dataset
    ... )  # doctest: +SKIP
    ```
    """

    method = declared("constrained_rlhf")
    extends = {
        "reference": {"constraint_thresholds": None},
        "statistics": {"constraint_thresholds": None},
        "feedback": {"constraint_thresholds": None},
    }
    # Rewards are not combined: nobody may do that in a way of their own, which would be left out
    replaces = {"combine_rewards": {"constraint_thresholds": None}, "advantages": {"constraint_thresholds": None}}
    config_class = ConstrainedRlhfGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        self._constrained = list(self.args.constraint_thresholds or {})
        unknown = [name for name in self._constrained if name not in self.reward_func_names]
        if unknown:
            raise ValueError(
                f"`constraint_thresholds` names {unknown}, but the reward functions are {self.reward_func_names}."
            )
        self._columns = [self.reward_func_names.index(name) for name in self._constrained]
        start = self.args.constraint_lagrange_init
        if start is None:
            start = 0.0 if self.args.constraint_lagrange_squash else 0.5
        self._multipliers = torch.full((len(self._columns),), float(start), device=self.accelerator.device)
        self._velocity = torch.zeros_like(self._multipliers)
        self._set_thresholds(list((self.args.constraint_thresholds or {}).values()))
        self._search: ProxyPointSearch | None = None
        self._search_since = 0
        if self.args.constraint_proxy_search_metric is not None:
            self._search = self._make_search()

    @classmethod
    def needs_reference(cls, args):
        return True

    def old_pass_needs(self):
        return super().old_pass_needs() | {"logps"}

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        reward = kl_reward(old_pass.logps, record.ref_per_token_logps, record.loss_mask)
        scored.statistics["constrained_rlhf/kl_reward"] = self.accelerator.gather(reward)

    def advantages(self, scored: ScoredBatch, record: RolloutRecord) -> torch.Tensor:
        known = ~scored.rewards.isnan().all(dim=1)

        def of(rewards: torch.Tensor) -> torch.Tensor:
            centered = difference(rewards, self.baseline(scored, rewards))
            return standardize(self.scale(scored, rewards, centered), known & scored.usable)

        sources = torch.stack([of(rewards) for rewards in scored.rewards.unbind(1)], dim=1)
        mixed = mix_advantages(
            of(scored.statistics["constrained_rlhf/kl_reward"]), sources[:, self._columns], self._constraint_weights()
        )
        free = self.reward_weights.to(sources.device).clone()
        free[self._columns] = 0.0
        return (mixed + sources @ free).where(known, torch.nan)

    def observe_batch(self, scored: ScoredBatch, record: RolloutRecord) -> None:
        super().observe_batch(scored, record)
        returns = scored.sampled_rewards[:, self._columns].nanmean(dim=0)
        violations = returns - self._thresholds
        weights = self._constraint_weights()
        for i, name in enumerate(self._constrained):
            self.log_metric(f"constrained_rlhf/{name}/weight", weights[i])
            self.log_metric(f"constrained_rlhf/{name}/multiplier", self._multipliers[i])
            self.log_metric(f"constrained_rlhf/{name}/return", returns[i])
            self.log_metric(f"constrained_rlhf/{name}/threshold", self._thresholds[i])
            self.log_metric(f"constrained_rlhf/{name}/violation", violations[i])
        self.log_metric("constrained_rlhf/kl_weight", len(weights) - weights.sum())
        self.log_metric("constrained_rlhf/kl_reward", scored.statistics["constrained_rlhf/kl_reward"].mean())
        met = within(returns, self._thresholds, self.args.constraint_proxy_search_band)
        self.log_metric("constrained_rlhf/satisfied", met.float().mean())
        if not self.args.constraint_lagrange_fixed:
            self._multipliers, self._velocity = update_multipliers(
                self._multipliers,
                self._velocity,
                violations,
                self.args.constraint_mode,
                self.args.constraint_lagrange_squash,
                self.args.constraint_lagrange_lr,
                self.args.constraint_lagrange_momentum,
                self.args.constraint_lagrange_max_grad_norm,
            )
        self.log_metric("constrained_rlhf/weight_change", (self._constraint_weights() - weights).abs().mean())
        if self._search is not None and self._search.evaluations:
            self.log_metric("constrained_rlhf/search_evaluations", float(len(self._search.evaluations)))
            self.log_metric("constrained_rlhf/search_best", self._search.best()[1])

    def observe_evaluation(self, metrics: dict[str, float]) -> None:
        super().observe_evaluation(metrics)
        if self._search is None or (point := self._search.propose()) is None:
            return
        names = [f"eval_rewards/{name}/mean" for name in self._constrained]
        missing = [name for name in (*names, self.args.constraint_proxy_search_metric) if metrics.get(name) is None]
        if missing:
            raise ValueError(
                f"`constraint_proxy_search_metric` needs {missing} of an evaluation, but its metrics are "
                f"{sorted(metrics)}."
            )
        returns = self._thresholds.new_tensor([metrics[name] for name in names])
        met = bool(within(returns, self._thresholds, self.args.constraint_proxy_search_band).all())
        budget = self.args.constraint_proxy_search_budget * self.state.max_steps
        if not met and self.state.global_step - self._search_since < budget:
            return
        self._search.tell(point, metrics[self.args.constraint_proxy_search_metric])
        self._search_since = self.state.global_step
        self._set_thresholds(self._search.propose() or self._search.best()[0])

    def method_state(self) -> dict[str, Any]:
        state = super().method_state()
        if self.args.constraint_thresholds is None:
            return state
        return state | {
            "constrained_rlhf": {
                "constraints": {
                    name: torch.stack([self._multipliers[i], self._velocity[i], self._thresholds[i]])
                    for i, name in enumerate(self._constrained)
                },
                "evaluations": self._search.evaluations if self._search else [],
                "search_since": self._search_since,
            }
        }

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        if self.args.constraint_thresholds is None:
            return
        saved = state["constrained_rlhf"]
        values = torch.stack([saved["constraints"][name] for name in self._constrained], dim=1)
        self._multipliers, self._velocity, self._thresholds = values.to(self.accelerator.device)
        self._search_since = saved["search_since"]
        if self._search is not None:
            self._search.evaluations = [(point, score) for point, score in saved["evaluations"]]

    def _constraint_weights(self) -> torch.Tensor:
        return constraint_weights(self._multipliers, self.args.constraint_mode, self.args.constraint_lagrange_squash)

    def _set_thresholds(self, values: list[float]) -> None:
        self._thresholds = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)

    def _make_search(self) -> ProxyPointSearch:
        first = list(self.args.constraint_thresholds.values())
        simplex = [first]
        for i, name in enumerate(self._constrained):
            simplex.append([*first[:i], first[i] + self.args.constraint_proxy_search_steps[name], *first[i + 1 :]])
        coefficients = {name: getattr(self.args, f"constraint_proxy_search_{name}") for name in _COEFFICIENTS}
        return ProxyPointSearch(simplex, coefficients)
