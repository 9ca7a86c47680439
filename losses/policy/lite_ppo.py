"""Lite PPO (arXiv:2508.08221): what a reward is compared with."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .groups import group_mean


def reward_mean(
    rewards: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"], scope: Literal["group", "batch"]
) -> Float[Tensor, " rows"]:
    """
    Mean reward of each row's group, or of the whole batch, ignoring NaN (Sec. 4.1).

    Lite PPO's advantage is (r − mean_group) / (std_batch + ε), with std_batch over the *raw* rewards.

    Args:
        rewards (`torch.Tensor` of shape `(rows,)`), group_ids (`torch.Tensor` of shape `(rows,)`):
            All rows of the batch on all ranks.
        scope (`str`):
            `"group"` or `"batch"`.
    """
    return group_mean(rewards, group_ids) if scope == "group" else torch.nanmean(rewards).expand_as(rewards)
