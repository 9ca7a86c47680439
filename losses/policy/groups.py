"""Statistics over groups of completions that share a prompt, identified by group id."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from trl.trainer.utils import nanstd


def by_group(values: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"]) -> Float[Tensor, "groups size"]:
    """
    Arrange `values` as one line per group, in order of group id, filled up with NaN where groups differ in size.

    Args:
        values (`torch.Tensor` of shape `(rows,)`):
            One value per row.
        group_ids (`torch.Tensor` of shape `(rows,)`):
            Rows with the same id form a group; they need not be adjacent.
    """
    line, column, counts = _places(group_ids)
    grouped = values.new_full((counts.numel(), int(counts.max())), torch.nan)
    grouped[line, column] = values
    return grouped


def from_groups(grouped: Shaped[Tensor, "groups size"], group_ids: Int[Tensor, " rows"]) -> Shaped[Tensor, " rows"]:
    """One value per row again: the inverse of [`by_group`]."""
    line, column, _ = _places(group_ids)
    return grouped[line, column]


def _places(group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Line and column of each row in [`by_group`], and the number of rows of each group."""
    _, line, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    order = torch.argsort(line, stable=True)
    first = counts.cumsum(0) - counts
    column = torch.empty_like(order)
    column[order] = torch.arange(order.numel(), device=order.device) - first[line[order]]
    return line, column, counts


def expand_groups(per_group: Shaped[Tensor, " groups"], group_ids: Int[Tensor, " rows"]) -> Shaped[Tensor, " rows"]:
    """Give every row the value of its group; `per_group` is in order of group id."""
    return per_group[torch.unique(group_ids, return_inverse=True)[1]]


def group_mean(values: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Mean of each row's group, ignoring NaN; NaN where the whole group is NaN."""
    return expand_groups(torch.nanmean(by_group(values, group_ids), dim=1), group_ids)


def group_std(values: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Unbiased standard deviation of each row's group, ignoring NaN; 0 in groups of one row."""
    grouped = by_group(values, group_ids)
    std = nanstd(grouped, dim=1) if grouped.shape[1] > 1 else torch.zeros_like(grouped[:, 0])
    return expand_groups(torch.where((~grouped.isnan()).sum(1) > 1, std, torch.zeros_like(std)), group_ids)


def group_varies(values: Float[Tensor, " rows"], group_ids: Int[Tensor, " rows"]) -> Bool[Tensor, " groups"]:
    """Whether a group holds two different values; decided without rounding. NaN does not count as a value."""
    grouped = by_group(values, group_ids)
    low = torch.nan_to_num(grouped, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).amin(1)
    high = torch.nan_to_num(grouped, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(1)
    return high > low


def weighted_sum(rewards: Float[Tensor, "rows sources"], weights: Float[Tensor, " sources"]) -> Float[Tensor, " rows"]:
    """Weighted sum of the rewards that apply to a row (those not NaN); NaN where none does."""
    total = (rewards * weights).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), torch.nan)
