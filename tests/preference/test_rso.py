import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st


from papertrl.losses.preference.rso import collapse_equal, point_reward, rejection_sample

# --- Rejection sampling -----------------------------------------------------------------------------------------

REWARDS = st.lists(st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf, 1.0]), max_size=12)


def by_the_listing(rewards, count, beta, rng):
    """The paper's algorithm, over a map of what is left, with a pass per turn of the outer loop."""
    left = {i: r for i, r in enumerate(rewards) if -math.inf < r < math.inf}
    accepted = []
    while len(accepted) < count and left:
        top = max(left.values())
        taken = []
        for i, reward in left.items():
            if len(accepted) == count:
                break
            u = rng.random()
            if u < math.e ** ((reward - top) / beta):
                accepted.append(i)
                taken.append(i)
        for i in taken:
            del left[i]
    return accepted


@given(rewards=REWARDS, count=st.integers(1, 14), beta=st.floats(0.05, 20), seed=st.integers(0, 1000))
def test_accepts_as_the_papers_listing_does(rewards, count, beta, seed):
    found = rejection_sample(rewards, count, beta, random.Random(seed))
    assert found.indices == by_the_listing(rewards, count, beta, random.Random(seed))
    finite = [i for i, r in enumerate(rewards) if math.isfinite(r)]
    assert len(found.indices) == min(count, len(finite)) == len(set(found.indices))
    assert found.passes <= len(found.indices) <= found.visits
    if found.passes == 1 and found.indices and count >= len(finite):
        assert set(found.indices) == set(finite)


@given(rewards=REWARDS, count=st.integers(1, 14))
def test_beta_0_takes_the_best_and_infinite_beta_the_first(rewards, count):
    finite = [i for i, r in enumerate(rewards) if math.isfinite(r)]
    best = sorted(sorted(finite), key=lambda i: rewards[i], reverse=True)[:count]
    assert rejection_sample(rewards, count, 0.0, random.Random(0)).indices == best
    assert rejection_sample(rewards, count, math.inf, random.Random(0)).indices == finite[:count]
    # The limit: nobody but the best of a pass is accepted
    if len({round(rewards[i], 3) for i in finite}) == len(finite):
        assert rejection_sample(rewards, count, 1e-9, random.Random(0)).indices == best


def test_equal_rewards_are_all_accepted_in_one_pass():
    found = rejection_sample([2.0] * 5, 4, 0.5, random.Random(0))
    assert (found.indices, found.passes, found.visits) == ([0, 1, 2, 3], 1, 4)


def total_variation(candidates: int, dedup: bool, trials: int = 20_000) -> float:
    """Of the first accepted of so many draws, from the law π exp(r/β)/Z over 20 outcomes."""
    rng = random.Random(1)
    outcomes, beta = range(20), 0.5
    policy = [rng.expovariate(1) for _ in outcomes]
    policy = [p / sum(policy) for p in policy]
    rewards = [rng.gauss(0, 1) for _ in outcomes]
    law = [p * math.exp(r / beta) for p, r in zip(policy, rewards, strict=True)]
    counts = Counter()
    for _ in range(trials):
        drawn = rng.choices(outcomes, policy, k=candidates)
        if dedup:
            drawn = [drawn[place] for place in collapse_equal(drawn, drawn)[0]]
        counts[drawn[rejection_sample([rewards[y] for y in drawn], 1, beta, rng).indices[0]]] += 1
    return 0.5 * sum(abs(counts[y] / trials - law[y] / sum(law)) for y in outcomes)


def test_first_accepted_follows_the_optimal_policy_without_collapse():
    assert total_variation(64, dedup=False) < 0.02
    # Too few candidates do not know the maximum
    assert total_variation(4, dedup=False) > 0.08
    # Each outcome counts once, however likely
    assert total_variation(64, dedup=True) > 0.05


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-3, 3)), max_size=10))
def test_equal_candidates_collapse_to_the_first_place_and_the_last_reward(items):
    ordered = {}
    for key, reward in items:
        ordered[key] = reward
    places, rewards = collapse_equal([key for key, _ in items], [reward for _, reward in items])
    assert [items[place][0] for place in places] == list(ordered)
    assert all(items[place][0] not in [key for key, _ in items[:place]] for place in places)
    assert rewards == list(ordered.values())


@given(st.floats(0.001, 0.999))
def test_point_reward_is_the_logit(p):
    assert 1 / (1 + math.exp(-point_reward(p))) == pytest.approx(p)
    assert point_reward(1 - p) == pytest.approx(-point_reward(p))


def test_point_reward_stays_finite():
    assert point_reward(1.0) == pytest.approx(13.8155, abs=1e-3) and point_reward(0.0) == -point_reward(1.0)
    assert math.isnan(point_reward(math.nan))
