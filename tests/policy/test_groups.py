"""Group statistics against the standard library, over groups of any size and order."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.losses.policy.groups import (
    by_group,
    expand_groups,
    group_mean,
    group_std,
    group_varies,
    weighted_sum,
)

reward = st.sampled_from([0.0, 1.0, 0.1, -2.5, 0.3, math.nan])
rows = st.lists(st.tuples(st.sampled_from([0, 1, 5, 9]), reward), min_size=1, max_size=12)


def tensors(drawn):
    return torch.tensor([r for _, r in drawn], dtype=torch.float64), torch.tensor([g for g, _ in drawn])


def members(drawn, group):
    return [r for g, r in drawn if g == group and not math.isnan(r)]


@given(rows)
def test_by_group_keeps_order_and_fills_with_nan(drawn):
    values, ids = tensors(drawn)
    grouped = by_group(values, ids)
    names = sorted({g for g, _ in drawn})
    assert grouped.shape[0] == len(names)
    for line, name in zip(grouped, names, strict=True):
        expected = [r for g, r in drawn if g == name]
        torch.testing.assert_close(line[: len(expected)].tolist(), expected, equal_nan=True)
        assert line[len(expected) :].isnan().all()
    order = torch.arange(len(names))
    assert expand_groups(order, ids).tolist() == [names.index(g) for g, _ in drawn]


@given(rows)
def test_mean_std_and_variation(drawn):
    values, ids = tensors(drawn)
    means, stds, varies = group_mean(values, ids), group_std(values, ids), group_varies(values, ids)
    names = sorted({g for g, _ in drawn})
    for i, (g, _) in enumerate(drawn):
        known = members(drawn, g)
        if known:
            assert means[i].item() == pytest.approx(statistics.fmean(known))
        else:
            assert means[i].isnan()
        assert stds[i].item() == pytest.approx(statistics.stdev(known) if len(known) > 1 else 0.0, rel=1e-6, abs=1e-12)
    assert varies.tolist() == [len(set(members(drawn, g))) > 1 for g in names]


@given(rows, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter(drawn, random):
    values, ids = tensors(drawn)
    order = list(range(len(drawn)))
    random.shuffle(order)
    for statistic in (group_mean, group_std):
        torch.testing.assert_close(statistic(values[order], ids[order]), statistic(values, ids)[order], equal_nan=True)


def test_variation_is_not_a_matter_of_rounding():
    # The mean of three times 0.1 is not 0.1 in floating point
    values = torch.tensor([0.1, 0.1, 0.1, 1.0, 1.0 + 2**-23, 1.0, -torch.inf, torch.inf, 0.0])
    assert group_varies(values, torch.arange(9) // 3).tolist() == [False, True, True]
    assert group_varies(torch.full((3,), torch.inf), torch.zeros(3, dtype=torch.long)).tolist() == [False]


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_weighted_sum_skips_sources_that_do_not_apply(n, sources, seed):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(n, sources, generator=g, dtype=torch.float64)
    rewards[torch.rand(n, sources, generator=g) < 0.4] = torch.nan
    weights = torch.randn(sources, generator=g, dtype=torch.float64)
    found = weighted_sum(rewards, weights)
    for i in range(n):
        known = [r * w for r, w in zip(rewards[i].tolist(), weights.tolist(), strict=True) if not math.isnan(r)]
        assert found[i].isnan() if not known else found[i].item() == pytest.approx(sum(known), abs=1e-12)
