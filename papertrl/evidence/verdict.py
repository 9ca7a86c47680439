"""From runs to a verdict: curves at equal budgets, paired differences, their interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from scipy.stats import t as student

CONFIDENCE = 0.95
HOLDS, NOT_SHOWN, REVERSED = "holds", "not shown", "reversed"

# The summary of a curve: where it was measured, what was measured → a number
Summary = Callable[[Sequence[float], Sequence[float]], float]


def final(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Last value."""
    return ys[-1]


def mean(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Mean over the curve, by the trapezoidal rule; the only value if there is one."""
    span = xs[-1] - xs[0]
    if span == 0:
        return fmean(ys)
    areas = [(x1 - x0) * (y0 + y1) / 2 for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False)]
    return sum(areas) / span


def maximum(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Largest value."""
    return max(ys)


def change(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Last value minus the first."""
    return ys[-1] - ys[0]


def reaching(level: float) -> Summary:
    """
    Summary that says where a curve first reaches `level`, as a share of the common budget; 1 where it never does.

    Args:
        level (`float`):
            Value to reach from below.
    """

    def reach(xs: Sequence[float], ys: Sequence[float]) -> float:
        if ys[0] >= level:
            return 0.0
        for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
            if y1 >= level:
                return (x0 + (x1 - x0) * (level - y0) / (y1 - y0)) / xs[-1]
        return 1.0

    reach.__name__ = f"share_of_the_budget_to_reach_{level:g}"
    return reach


def up_to(xs: Sequence[float], ys: Sequence[float], end: float) -> tuple[list[float], list[float]]:
    """
    The part of a curve with x ≤ `end`, its last point interpolated.

    Args:
        xs (`Sequence[float]`), ys (`Sequence[float]`):
            Curve, x not falling.
        end (`float`):
            In [xs[0], xs[-1]].
    """
    kept = [(x, y) for x, y in zip(xs, ys, strict=True) if x <= end]
    if len(kept) < len(xs) and kept[-1][0] < end:
        (x0, y0), (x1, y1) = kept[-1], (xs[len(kept)], ys[len(kept)])
        kept.append((end, y0 + (y1 - y0) * (end - x0) / (x1 - x0)))
    return [x for x, _ in kept], [y for _, y in kept]


@dataclass(frozen=True)
class Interval:
    """
    Mean of paired differences and its 95 % interval.

    Args:
        mean (`float`), low (`float`), high (`float`):
            In the unit of the metric.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(differences: Sequence[float]) -> Interval:
    r"""
    Student's interval of the mean, \(\bar d \pm t_{0.975,\,n-1}\, s/\sqrt n\); unbounded for a single difference.

    Args:
        differences (`Sequence[float]`):
            One per seed, d.

    Raises:
        `ValueError`: if there is none, or one is not finite.
    """
    if not differences or not all(map(math.isfinite, differences)):
        raise ValueError(f"`differences` must be finite numbers, at least one, got {list(differences)}.")
    center = fmean(differences)
    if len(differences) == 1:
        return Interval(center, -math.inf, math.inf)
    half = student.ppf((1 + CONFIDENCE) / 2, len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return Interval(center, center - float(half), center + float(half))


def decide(improvement: Interval, smallest_effect: float, guards_hold: bool = True) -> str:
    """
    Verdict on a claim.

    Args:
        improvement ([`Interval`]):
            Of the paired differences, signed so that positive favors the claim.
        smallest_effect (`float`):
            Smallest difference that counts.
        guards_hold (`bool`):
            Whether nothing was bought at the expense of a guarded metric.

    Returns:
        `str`: "holds" if the whole interval is above the smallest effect and the guards hold; "reversed" if it is all
            beyond the smallest effect on the other side; else "not shown".
    """
    if improvement.high < -smallest_effect:
        return REVERSED
    return HOLDS if improvement.low > smallest_effect and guards_hold else NOT_SHOWN
