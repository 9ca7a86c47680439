"""Evidence: claims run, and their verdicts follow from the runs."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papertrl.core.errors import JobError, UsageError
from papertrl.evidence import Arm, Comparison, Metric, claimed, final, load_claim, mean, reaching
from papertrl.evidence.command import main
from papertrl.evidence.study import Study, judge, rounded, value
from papertrl.evidence.verdict import Interval, decide, interval, up_to

RESULTS = sorted(
    path for path in (Path(__file__).parents[1] / "claims/results").glob("*.json") if path.stem != "overoptimization"
)
SCORE = Metric("score")


def made_up(arm: str, seed: int, *scores: float) -> dict:
    points = [
        {"step": i, "sampled_tokens": 10 * i, "trained_tokens": 0, "seconds": 0.5 * i, "score": score}
        for i, score in enumerate(scores)
    ]
    return {"arm": arm, "seed": seed, "points": points, "logs": {}}


def runs_of(ours: list[float], theirs: list[float]) -> list[dict]:
    return [
        made_up(arm, seed, 0.0, score)
        for arm, scores in (("new", ours), ("old", theirs))
        for seed, score in enumerate(scores)
    ]


NEW, OLD = [0.9, 0.8, 0.85, 0.9, 0.87], [0.5, 0.45, 0.5, 0.52, 0.4]


def test_a_clear_difference_holds():
    outcome = judge(runs_of(NEW, OLD), Comparison("new", "old", SCORE, 0.1))
    assert outcome["verdict"] == "holds"
    assert outcome["mean"] == pytest.approx(fmean(NEW) - fmean(OLD))


def test_swapped_labels_are_reversed():
    assert judge(runs_of(OLD, NEW), Comparison("new", "old", SCORE, 0.1))["verdict"] == "reversed"


def test_a_method_replaced_by_its_baseline_is_not_shown():
    outcome = judge(runs_of(OLD, OLD), Comparison("new", "old", SCORE, 0.1))
    assert outcome["verdict"] == "not shown"
    assert (outcome["low"], outcome["high"]) == (0, 0)


def test_lower_is_better_turns_the_verdict_around():
    lower = Metric("score", "lower")
    assert judge(runs_of(OLD, NEW), Comparison("new", "old", lower, 0.1))["verdict"] == "holds"


def test_a_broken_guard_keeps_a_claim_from_holding():
    guard = Metric("score", "lower")
    outcome = judge(runs_of(NEW, OLD), Comparison("new", "old", SCORE, 0.1, guards={guard: 0.1}))
    assert outcome["verdict"] == "not shown"
    assert not outcome["guards"][str(guard)]["holds"]


def test_arms_are_compared_at_the_smaller_budget():
    runs = [made_up("new", 0, 0.0, 0.5, 1.0), made_up("old", 0, 0.0, 0.4)]
    outcome = judge(runs, Comparison("new", "old", dataclasses.replace(SCORE, axis="sampled_tokens"), 0.01))
    assert outcome["differences"] == pytest.approx([0.1])


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12))
def test_interval_is_students(differences):
    # t quantiles for 95 %, from a printed table
    table = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228}
    table[12] = 2.201
    half = table[len(differences)] * stdev(differences) / math.sqrt(len(differences))
    measured = interval(differences)
    assert measured.mean == pytest.approx(fmean(differences), abs=1e-9)
    assert measured.high - measured.low == pytest.approx(2 * half, rel=1e-3, abs=1e-9)


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 0.5))
def test_verdicts_mirror(center, half, smallest):
    forward = decide(Interval(center, center - half, center + half), smallest)
    backward = decide(Interval(-center, -center - half, -center + half), smallest)
    assert {"holds": "reversed", "reversed": "holds", "not shown": "not shown"}[forward] == backward


def test_intervals_refuse_what_is_no_number():
    with pytest.raises(ValueError, match="differences"):
        interval([0.1, math.nan])
    with pytest.raises(ValueError, match="differences"):
        interval([])


def test_summaries():
    xs, ys = [0, 1, 3], [0.0, 0.5, 1.0]
    assert final(xs, ys) == 1.0
    assert mean(xs, ys) == pytest.approx((0.25 + 1.5) / 3)
    assert reaching(0.75)(xs, ys) == pytest.approx(2 / 3)
    assert reaching(2.0)(xs, ys) == 1.0
    assert up_to(xs, ys, 2) == ([0, 1, 2], [0.0, 0.5, 0.75])


def test_arms_need_grids_of_one_size():
    claim = load_claim(claimed()[0])
    arms = {**claim.arms, "larger": Arm(grid={"learning_rate": (1, 2, 3, 4, 5)})}
    with pytest.raises(ValueError, match="grids of one size"):
        dataclasses.replace(claim, arms=arms)


def test_comparisons_need_known_arms():
    claim = load_claim(claimed()[0])
    with pytest.raises(ValueError, match="nobody"):
        dataclasses.replace(claim, comparisons=(Comparison("nobody", "else", SCORE, 0.1),))


WRONG = ("lp_regg", "--seeds 0", "--jobs 0", "--first_seed 999", "--wrong")


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_arguments_are_refused(argv):
    with pytest.raises(UsageError):
        main(argv.split())


@pytest.mark.parametrize("method", claimed())
def test_claims_run(method, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERTRL_CACHE", str(tmp_path / "cache"))
    claim = load_claim(method)
    study = Study(claim, tmp_path, short=True, quiet=True)
    tuning = study.tune()
    runs = study.compare(tuning, [0])
    assert {run["arm"] for run in runs} == set(claim.arms)
    for comparison in claim.comparisons:
        assert math.isfinite(judge(runs, comparison)["mean"])
    # Finished runs are read, not made again
    assert study.compare(tuning, [0]) == json.loads(json.dumps(runs))


def test_unknown_metrics_are_named():
    with pytest.raises(JobError, match="nonsense"):
        value(made_up("new", 0, 1.0), Metric("nonsense"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_verdicts_are_those_of_the_runs(path):
    stored = json.loads(path.read_text())
    claim = load_claim(path.stem)
    again = [judge(stored["runs"], comparison) for comparison in claim.comparisons]
    assert stored["verdict"] == again[0]["verdict"]
    assert not stored["quick"] and len(stored["seeds"]) >= 5
    for old, new in zip(stored["comparisons"], again, strict=True):
        assert old["verdict"] == new["verdict"]
        assert new["mean"] == pytest.approx(old["mean"], rel=1e-3, abs=1e-5)


def test_rounding_keeps_six_digits():
    assert rounded({"a": [0.123456789, 2]}) == {"a": [0.123457, 2]}
