"""Statistical rejection sampling of RSO: which of a policy's candidates look like draws from the optimal policy."""

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Accepted:
    """
    Outcome of [`rejection_sample`].

    Args:
        indices (`list[int]`):
            Accepted candidates, in the order of their acceptance.
        visits (`int`):
            Decisions made, one uniform draw each; none for β = 0.
        passes (`int`):
            Passes over the candidates that were left.
    """

    indices: list[int]
    visits: int
    passes: int


def rejection_sample(rewards: Sequence[float], count: int, beta: float, rng: random.Random) -> Accepted:
    """
    `count` of the candidates, distributed as π_r(y|x) ∝ π(y|x) exp(r(x, y) / β) where they are draws from π.

    A candidate that is not accepted yet is accepted if u < exp((r(y) − M) / β), u ~ U[0, 1), where M is the highest
    reward among those that were left when the pass began. Passes repeat, without what they accepted, until there are
    `count`. Each accepts its best candidate at least, so that there are at most `count` of them.

    Source: arXiv:2309.06657, Eq. 14 and the paper's Python listing (Algorithm 1). The law is exact as the number of
    candidates grows, without their M it would need the maximum over all completions.

    Args:
        rewards (`Sequence[float]`):
            r of each candidate, in the order in which they are visited. What is not finite is never accepted.
        count (`int`):
            How many to accept; all, where there are fewer.
        beta (`float`):
            β ≥ 0, in units of the reward: 0 takes the highest rewards, the first of equals first; ∞ the first
            candidates.
        rng (`random.Random`):
            Source of u.
    """
    left = [i for i, reward in enumerate(rewards) if math.isfinite(reward)]
    if beta == 0:
        best = sorted(left, key=lambda i: -rewards[i])[:count]
        return Accepted(best, visits=0, passes=int(bool(best)))
    accepted: list[int] = []
    visits = passes = 0
    while left and len(accepted) < count:
        passes += 1
        highest = max(rewards[i] for i in left)
        rejected = []
        for place, i in enumerate(left):
            visits += 1
            if rng.random() < math.exp((rewards[i] - highest) / beta):
                accepted.append(i)
                if len(accepted) == count:
                    rejected += left[place + 1 :]
                    break
            else:
                rejected.append(i)
        left = rejected
    return Accepted(accepted, visits, passes)


def collapse_equal(keys: Sequence[Hashable], rewards: Sequence[float]) -> tuple[list[int], list[float]]:
    """
    One candidate for all that are equal: the first of them, with the reward of the last.

    Source: arXiv:2309.06657, the listing, which keeps candidates in a map from text to reward. It changes the law of
    [`rejection_sample`], by much where few texts are likely: each then counts once, however probable it is.

    Args:
        keys (`Sequence`):
            What is compared.
        rewards (`Sequence[float]`):
            Their rewards.

    Returns:
        `tuple[list[int], list[float]]`: places of those that stay, and their rewards.
    """
    first = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    last = dict(zip(keys, rewards, strict=True))
    return list(first.values()), [last[key] for key in first]


def point_reward(win_probability: float, bound: float = 1e-6) -> float:
    """
    r(x, y) = logit ρ(x, y, y_b): what a pairwise ranker says of y, against a baseline y_b.

    Source: arXiv:2309.06657, Eq. 7.

    Args:
        win_probability (`float`):
            ρ(x, y, y_b) = P(y ≻ y_b).
        bound (`float`, *optional*, defaults to `1e-6`):
            Distance that the probability keeps from 0 and 1, so that the reward is finite.

    Returns:
        `float`: in nats, between ±13.8 with the default bound; NaN for NaN.
    """
    p = min(max(win_probability, bound), 1 - bound) if not math.isnan(win_probability) else math.nan
    return math.log(p) - math.log1p(-p)
