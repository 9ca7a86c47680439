"""The sampler of GAIN-RL: its law, its moves, and that it repeats after a restore."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.samplers.prompts.angle_curriculum import AngleCurriculum


def curriculum(order=10, **changes):
    settings = {
        "sigma": 2.0,
        "step": 3.0,
        "shift_min": 0.0,
        "shift_max": 5.0,
        "alpha_acc": 2.0,
        "alpha_angle": 2.0,
        "beta": 0.5,
        "subset_size": 4,
    }
    order = torch.arange(order) if isinstance(order, int) else order
    return AngleCurriculum(order, **(settings | changes))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mu", [0.0, 2.6])
def test_the_law_is_a_gaussian_over_ranks_without_replacement(mu):
    """Frequencies of ordered pairs against p(a) · p(b) / (1 − p(a)), in the order of the data."""
    order = torch.tensor([3, 0, 2, 1])
    sampler = curriculum(order, sigma=1.2)
    sampler.mu = mu
    weight = [math.exp(-((r - mu) ** 2) / (2 * 1.2**2)) for r in range(4)]
    p = [w / sum(weight) for w in weight]
    g, draws = generator(), 20_000
    counts = dict.fromkeys(itertools.permutations(range(4), 2), 0)
    rank = {int(prompt): r for r, prompt in enumerate(order)}
    for _ in range(draws):
        a, b = sampler.draw(2, g)
        counts[rank[a], rank[b]] += 1
    for (a, b), count in counts.items():
        expected = p[a] * p[b] / (1 - p[a])
        assert count / draws == pytest.approx(expected, abs=5 * math.sqrt(expected / draws) + 1e-3)


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 1000))
def test_prompts_repeat_only_when_there_are_too_few(size, count, seed):
    drawn = curriculum(size).draw(count, generator(seed))
    assert len(drawn) == count
    for at in range(0, count, size):
        part = drawn[at : at + size]
        assert len(set(part)) == len(part) and set(part) <= set(range(size))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), min_size=1, max_size=4),
    st.floats(-5, 0),
    st.floats(0.1, 5),
    st.floats(0, 9),
)
def test_the_window_moves_by_the_formula(observed, low, high, start):
    sampler = curriculum(shift_min=low, shift_max=high, step=2.0, alpha_acc=1.5, alpha_angle=0.7, beta=0.4)
    sampler.mu = start
    for accuracy, angle in observed:
        sampler.observe(accuracy, angle)
    sampler.choose(1, generator())
    accuracy = sum(a for a, _ in observed) / len(observed)
    angle = sum(c for _, c in observed) / len(observed)
    shift = 2.0 * math.tanh(1.5 * (accuracy - 0.4)) + 2.0 * math.tanh(0.7 * angle)
    expected = min(max(start + min(max(shift, low), high), 0.0), 9.0)
    assert sampler.mu == pytest.approx(expected)


def test_a_round_is_used_up_before_the_window_moves():
    sampler = curriculum(subset_size=4)
    first = sampler.choose(3, generator(1))
    assert sampler.mu == 0.0
    sampler.observe(1.0, 1.0)
    assert sampler.mu == 0.0
    rest = sampler.choose(1, generator(2))
    assert sampler.mu == 0.0 and len(set(first + rest)) == 4
    sampler.observe(0.0, 0.0)
    sampler.choose(1, generator(3))
    assert sampler.mu == pytest.approx(3.0 * (math.tanh(0.0) + math.tanh(1.0)))
    # What was observed before the move is not counted again
    sampler.choose(4, generator(4))
    assert sampler.mu == pytest.approx(3.0 * math.tanh(1.0))


def test_the_window_never_leaves_the_data():
    sampler = curriculum(6, shift_max=1e9, shift_min=-1e9, step=1e6, subset_size=1)
    for accuracy, end in ((1.0, 5.0), (0.0, 0.0)):
        sampler.observe(accuracy, 0.0)
        sampler.choose(1, generator())
        assert sampler.mu == end


def test_a_narrow_window_far_away_draws_the_nearest_prompts():
    # exp(−(r − μ)² / 2σ²) underflows at every rank but one
    sampler = curriculum(100, sigma=0.01)
    sampler.mu = 98.9
    assert sampler.draw(3, generator()) == [99, 98, 97]


def test_subset_larger_than_the_data():
    sampler = curriculum(3, subset_size=50)
    assert sorted(sampler.choose(3, generator())) == [0, 1, 2]
    assert sampler.queue == []


def test_a_restored_sampler_goes_on_alike():
    sampler = curriculum(subset_size=4)
    sampler.choose(3, generator(0))
    sampler.observe(0.9, 0.2)
    restored = curriculum(torch.arange(10).flip(0), subset_size=4)
    state = sampler.state_dict()
    state["observed"] = [list(pair) for pair in state["observed"]]
    restored.load_state_dict(state)
    for seed in range(1, 6):
        assert restored.choose(3, generator(seed)) == sampler.choose(3, generator(seed))
        assert restored.mu == sampler.mu
        for one in (restored, sampler):
            one.observe(0.7, -0.1)


def test_only_the_given_generator_is_used():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    a = curriculum().choose(8, generator(5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert curriculum().choose(8, generator(5)) == a
