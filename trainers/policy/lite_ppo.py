"""Lite PPO on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.groups import group_std
from ...losses.policy.lite_ppo import reward_mean
from .base import PolicyConfig, PolicyTrainer
from .record import ScoredBatch


@method_config
class LitePpoGRPOConfig(PolicyConfig):
    """
    Configuration of [`LitePpoGRPOTrainer`].

    Lite PPO is a choice among what TRL has; its values are the defaults here. `loss_type="dapo"` (token mean),
    `beta=0` and `epsilon=0.2` are TRL's own.
    """

    lite_ppo_reward_mean_scope: str = method_field(
        "group",
        "Mean that is subtracted from a reward. The batch mean is for ablations: the paper finds that it can collapse "
        "with 0/1 rewards.",
        choices=("group", "batch"),
        was="reward_mean_scope",
    )
    scale_rewards: str = method_field(
        "batch", "Standard deviation that divides the centered rewards. See TRL's `scale_rewards`."
    )
    num_generations: int | None = method_field(8, "Completions per prompt.", ge=2)
    temperature: float = method_field(0.99, "Sampling temperature.", gt=0)
    top_p: float = method_field(0.99, "Nucleus of the sampling.", gt=0, le=1)
    top_k: int = method_field(100, "Tokens that sampling chooses from; 0 for all. From memory of the paper.", ge=0)

    def validate(self):
        super().validate()
        if self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "Lite PPO scales the summed reward: `multi_objective_aggregation` must be 'sum_then_normalize', got "
                f"{self.multi_objective_aggregation!r}."
            )


class LitePpoGRPOTrainer(PolicyTrainer):
    r"""
    Lite PPO: critic-free PPO with two tricks only, group mean with batch standard deviation and token-mean loss.

    $$
    A_i = \frac{r_i - \mathrm{mean}_{group}(r)}{\mathrm{std}_{batch}(r) + \epsilon},
    $$

    the standard deviation being over the raw rewards of the whole generation batch on all ranks, unbiased
    (arXiv:2508.08221). A near-unanimous group then gets no huge advantage for its one deviating answer.

    At its defaults the method is a choice of values for TRL's fields, `scale_rewards="batch"` before all, and gives
    TRL's gradient; what this trainer adds is these values as defaults, the batch mean for the paper's ablation, and
    the metrics that show the effect. ε is TRL's 1e-4.

    Relations:
        DLER also leaves the group's standard deviation, but whitens over tokens; the two replace the same stage.
        "Dr. GRPO" (`scale_rewards="none"`) does not scale at all; the paper prefers that on easy data.

    Paper: [Part I: Tricks or Traps? A Deep Dive into RL for LLM
    Reasoning](https://huggingface.co/papers/2508.08221).

    Example:

    ```python
    >>> from papertrl import LitePpoGRPOTrainer
    >>> trainer = LitePpoGRPOTrainer("Qwen/Qwen3-0.6B", reward, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("lite_ppo")
    replaces = {
        "baseline": {"lite_ppo_reward_mean_scope": "group"},
        "scale": ({"scale_rewards": "group"}, {"scale_rewards": "none"}),
    }
    config_class = LitePpoGRPOConfig

    def baseline(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        return reward_mean(rewards, scored.group_ids, self.args.lite_ppo_reward_mean_scope)

    def scale(self, scored: ScoredBatch, rewards: torch.Tensor, centered: torch.Tensor) -> torch.Tensor:
        std = group_std(rewards, torch.zeros_like(scored.group_ids))
        advantages = centered / (std + 1e-4)
        self.log_metric("lite_ppo/batch_std", std[0])
        self.log_metric("lite_ppo/max_abs_advantage", torch.nan_to_num(advantages).abs().max())
        return advantages
