"""The second stage of the two-stage recipe, on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.groups import weighted_sum
from ...losses.policy.two_stage_math import cosine_reward, relative_length_reward
from .base import PolicyConfig, PolicyTrainer
from .record import ScoredBatch


@method_config
class TwoStageMathGRPOConfig(PolicyConfig):
    """
    Configuration of [`TwoStageMathGRPOTrainer`].

    The paper trains for 40 steps with 8 completions of up to 16,384 tokens, `learning_rate` 4e-6, `beta` 0.04,
    `top_p` 0.9 and `min_p` 0.05.
    """

    two_stage_cosine_weight: float = method_field(
        1.0, "Weight of the cosine reward on a completion's own length.", ge=0, was="cosine_weight"
    )
    two_stage_cosine_right: list[float] = method_field(
        [1.0, 0.1], "Cosine reward of a right completion at no length and at L_max.", was="cosine_right"
    )
    two_stage_cosine_wrong: list[float] = method_field(
        [-1.0, -0.1], "The same of a wrong completion.", was="cosine_wrong"
    )
    two_stage_cosine_max_length: int | None = method_field(
        None,
        "L_max in tokens. `None` takes `max_completion_length`. The paper: 30,000 characters.",
        ge=1,
        was="cosine_max_length",
    )
    two_stage_relative_length_weight: float = method_field(
        1.0, "Weight of the reward on a completion's length relative to others.", ge=0, was="relative_length_weight"
    )
    two_stage_relative_length_scope: str = method_field(
        "group",
        "Which others: the completions of its prompt, or the whole generation batch. The released code takes what one "
        "call of the reward function holds, several prompts of one process.",
        choices=("group", "batch"),
        was="relative_length_scope",
    )
    two_stage_correctness_reward: str | None = method_field(
        None,
        "Name of the reward function that is above `success_threshold` on right completions. `None` takes the "
        "weighted sum of all.",
        was="correctness_reward",
    )

    def validate(self):
        super().validate()
        for name in ("two_stage_cosine_right", "two_stage_cosine_wrong"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"`{name}` must be two numbers, got {getattr(self, name)}.")
        (short, long), (wrong_short, wrong_long) = self.two_stage_cosine_right, self.two_stage_cosine_wrong
        if not short >= long >= wrong_long >= wrong_short:
            raise ValueError(
                "`two_stage_cosine_right` must fall, `two_stage_cosine_wrong` must rise, and a right completion be "
                f"worth more at any length, got {self.two_stage_cosine_right} and {self.two_stage_cosine_wrong}."
            )
        shaped = self.two_stage_cosine_weight > 0 or self.two_stage_relative_length_weight > 0
        if shaped and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "Length rewards are added to the summed reward: `multi_objective_aggregation` must be "
                f"'sum_then_normalize', got {self.multi_objective_aggregation!r}."
            )


class TwoStageMathGRPOTrainer(PolicyTrainer):
    r"""
    Two-stage recipe, second stage: GRPO that shortens the right answers of a model which SFT has made accurate.

    Two rewards on the length L are added to the reward R (arXiv:2507.08267). For right completions

    $$
    R + w_c \Big[0.1 + 0.9 \cdot \tfrac12\big(1 + \cos(\pi L / L_{max})\big)\Big]
      + w_r \Big[\tfrac12 - \frac{L - L_{min}}{L_{max} - L_{min}}\Big],
    $$

    the second bracket over the group's lengths. Wrong ones get −0.1 − 0.9·(…) for the first, which forgives long
    attempts, and at most 0 for the second. The first stage is a plain [`SupervisedTrainer`] run on long correct
    traces; `recipes/two_stage_math.yaml` has both.

    Lengths are tokens here and groups those of all ranks; the released code counts characters and compares what one
    process holds. The paper's R is whether a boxed answer stands before the end of thinking
    (`--reward_funcs boxed_format`); correctness enters through the length rewards alone. For that, pass both rewards
    with `two_stage_correctness_reward` and weights 0 and 1. The usual R, correctness, is weighted like the others
    here.

    Relations:
        DLER gives no reward beyond a hard limit instead. [`~papertrl.rewards.cosine_length`] and
        [`~papertrl.rewards.relative_length`] are these rewards for other trainers, in either unit: methods that weigh
        several rewards replace the same stage, and take these as two of them. DisCO sees of a
        reward only whether it is above `success_threshold`, so that length does not count in it.

    Paper: [A Practical Two-Stage Recipe for Mathematical LLMs: Maximizing Accuracy with SFT and Efficiency with
    Reinforcement Learning](https://huggingface.co/papers/2507.08267).

    Example:

    ```python
    >>> from papertrl import TwoStageMathGRPOConfig, TwoStageMathGRPOTrainer
    >>> args = TwoStageMathGRPOConfig(max_completion_length=16_384, max_steps=40, beta=0.04)  # doctest: +SKIP
    >>> trainer = TwoStageMathGRPOTrainer("./stage1_sft", accuracy, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("two_stage_math")
    replaces = {"combine_rewards": {"two_stage_cosine_weight": 0.0, "two_stage_relative_length_weight": 0.0}}
    config_class = TwoStageMathGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        name = self.args.two_stage_correctness_reward
        if name is not None and name not in self.reward_func_names:
            raise ValueError(f"`two_stage_correctness_reward` must be one of {self.reward_func_names}, got {name!r}.")

    def combine_rewards(self, scored: ScoredBatch) -> torch.Tensor:
        args = self.args
        combined = weighted_sum(scored.rewards, self.reward_weights.to(scored.rewards.device))
        name = args.two_stage_correctness_reward
        if name is None:
            correct = self.solved(scored)
        else:
            correct = scored.rewards[:, self.reward_func_names.index(name)] > args.success_threshold
        # Rows that nobody scored are compared with nobody
        lengths = scored.lengths.to(combined).masked_fill(combined.isnan(), torch.nan)
        max_length = args.two_stage_cosine_max_length or self.max_completion_length
        cosine = cosine_reward(
            lengths, correct, max_length, tuple(args.two_stage_cosine_right), tuple(args.two_stage_cosine_wrong)
        )
        in_group = args.two_stage_relative_length_scope == "group"
        compared = scored.group_ids if in_group else torch.zeros_like(scored.group_ids)
        relative = relative_length_reward(lengths, correct, compared)
        added = args.two_stage_cosine_weight * cosine + args.two_stage_relative_length_weight * relative
        for metric, value in (("cosine", cosine), ("relative_length", relative), ("length_reward_size", added.abs())):
            self.log_metric(f"two_stage_math/{metric}", torch.nan_to_num(torch.nanmean(value)))
        for verdict, rows in (("right", correct), ("wrong", ~correct)):
            if bool(rows.any()):
                self.log_metric(f"two_stage_math/length_of_{verdict}", scored.lengths[rows].float().mean())
        return combined + added
