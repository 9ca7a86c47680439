"""Evidence: verdicts follow from runs and from what is stored of them; one claim of each family runs."""

import dataclasses
import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from papertrl.core.errors import JobError, UsageError
from papertrl.evidence import Arm, Comparison, Metric, claimed, final, load_claim, mean, reaching
from papertrl.evidence.command import main
from papertrl.evidence.comparison import compare, judge, value
from papertrl.evidence.plot import draw
from papertrl.evidence.result import panels, rounded, write_result
from papertrl.evidence.study import Study
from papertrl.evidence.verdict import Interval, decide, interval, up_to

RESULTS = sorted(
    path for path in (Path(__file__).parents[1] / "claims/results").glob("*.json") if path.stem != "overoptimization"
)
# One of each family, cheap to run
QUICK = ("scaf_grpo", "srpo", "asft")
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
    outcome = compare(runs_of(NEW, OLD), Comparison("new", "old", SCORE, 0.1))
    assert outcome["verdict"] == "holds"
    assert outcome["values"] == {"new": NEW, "old": OLD}
    assert outcome["mean"] == pytest.approx(fmean(NEW) - fmean(OLD))


def test_swapped_labels_are_reversed():
    assert compare(runs_of(OLD, NEW), Comparison("new", "old", SCORE, 0.1))["verdict"] == "reversed"


def test_a_method_replaced_by_its_baseline_is_not_shown():
    outcome = compare(runs_of(OLD, OLD), Comparison("new", "old", SCORE, 0.1))
    assert outcome["verdict"] == "not shown"
    assert (outcome["low"], outcome["high"]) == (0, 0)


def test_lower_is_better_turns_the_verdict_around():
    lower = Metric("score", "lower")
    assert compare(runs_of(OLD, NEW), Comparison("new", "old", lower, 0.1))["verdict"] == "holds"


def test_a_broken_guard_keeps_a_claim_from_holding():
    guard = Metric("score", "lower")
    outcome = compare(runs_of(NEW, OLD), Comparison("new", "old", SCORE, 0.1, guards={guard: 0.1}))
    assert outcome["verdict"] == "not shown"
    assert not outcome["guards"][str(guard)]["holds"]


def test_arms_are_compared_at_the_smaller_budget():
    runs = [made_up("new", 0, 0.0, 0.5, 1.0), made_up("old", 0, 0.0, 0.4)]
    outcome = compare(runs, Comparison("new", "old", dataclasses.replace(SCORE, axis="sampled_tokens"), 0.01))
    assert outcome["values"] == {"new": [0.5], "old": [0.4]}
    assert outcome["mean"] == pytest.approx(0.1)


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


@pytest.fixture(scope="module")
def start_models(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERTRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_claim_of_every_family_is_run():
    families = [load_claim(name).family.name for name in QUICK]
    assert sorted(families) == sorted({load_claim(name).family.name for name in claimed()})


@pytest.mark.parametrize("method", QUICK)
def test_command_runs_and_goes_on(method, tmp_path, start_models, capsys):
    argv = [method, "--quick", "--jobs", "1", "--output_dir", str(tmp_path), "--work_dir", str(tmp_path / "work")]
    assert main(argv) == 0
    claim = load_claim(method)
    stored = json.loads((tmp_path / f"{method}.json").read_text())
    assert stored["quick"] and f"{method}: ran" in capsys.readouterr().out
    for comparison, outcome in zip(claim.comparisons, stored["comparisons"], strict=True):
        assert set(outcome["values"]) == {comparison.arm, comparison.against}
        assert math.isfinite(outcome["mean"]) and "trained_tokens" in outcome["at_equal"]
    assert all(set(panel["arms"]) == set(claim.arms) for panel in stored["plot"])
    assert (tmp_path / f"{method}.png").exists()
    # Finished runs are read, not made again
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert len(files) == len(claim.arms) and main(argv) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}


@pytest.mark.slow
@pytest.mark.parametrize("method", claimed())
def test_every_claim_runs(method, tmp_path, start_models):
    claim = load_claim(method)
    study = Study(claim, tmp_path, short=True, quiet=True)
    tuning = study.tune()
    runs = study.compare(tuning, [0])
    assert {run["arm"] for run in runs} == set(claim.arms)
    for comparison in claim.comparisons:
        assert math.isfinite(compare(runs, comparison)["mean"])
    # Finished runs are read, not made again
    assert study.compare(tuning, [0]) == json.loads(json.dumps(runs))


def test_unknown_metrics_are_named():
    with pytest.raises(JobError, match="nonsense"):
        value(made_up("new", 0, 1.0), Metric("nonsense"))


NUMBERS = dict.fromkeys(("mean", "low", "high"))


def numbers(outcome: dict) -> list[float]:
    return [outcome[name] for name in NUMBERS]


def judge_again(comparison: Comparison, stored: dict) -> dict:
    guards = {name: guard["values"] for name, guard in stored["guards"].items()}
    return judge(comparison, stored["values"], guards)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_verdicts_are_those_of_the_stored_values(path):
    stored = json.loads(path.read_text())
    again = [judge_again(*pair) for pair in zip(load_claim(path.stem).comparisons, stored["comparisons"], strict=True)]
    assert stored["verdict"] == again[0]["verdict"]
    assert not stored["quick"] and len(stored["seeds"]) >= 5
    for old, new in zip(stored["comparisons"], again, strict=True):
        assert all(len(values) == len(stored["seeds"]) for values in old["values"].values())
        assert {**old, **NUMBERS} == {**new, **NUMBERS, "guards": old["guards"], "at_equal": old["at_equal"]}
        assert numbers(new) == pytest.approx(numbers(old), rel=1e-9, abs=1e-12)
        for name, guard in new["guards"].items():
            assert guard["holds"] == old["guards"][name]["holds"]
            assert numbers(guard) == pytest.approx(numbers(old["guards"][name]), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_swapped_labels_reverse_stored_verdicts(path):
    mirror = {"holds": "reversed", "reversed": "holds", "not shown": "not shown"}
    stored = json.loads(path.read_text())["comparisons"]
    for comparison, outcome in zip(load_claim(path.stem).comparisons, stored, strict=True):
        plain = dataclasses.replace(comparison, guards={})
        swapped = dataclasses.replace(plain, arm=plain.against, against=plain.arm)
        verdict = judge(plain, outcome["values"], {})["verdict"]
        assert judge(swapped, outcome["values"], {})["verdict"] == mirror[verdict]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_are_summaries(path):
    assert path.stat().st_size < 40_000, "runs belong in `--work_dir`, which git ignores"
    assert path.with_suffix(".png").stat().st_size < 100_000


def test_plots_need_no_runs(tmp_path):
    claim = dataclasses.replace(
        load_claim(QUICK[0]), arms={"new": Arm(), "old": Arm()}, comparisons=(Comparison("new", "old", SCORE, 0.1),),
        tune_on=SCORE,
    )  # fmt: skip
    (panel,) = panels(claim, runs_of(NEW, OLD))
    assert panel["arms"]["new"]["values"] == NEW and panel["arms"]["new"]["span"] == [0, 1]
    assert panel["arms"]["old"]["mean"] == rounded([0.0, fmean(OLD)])
    assert panel["arms"]["old"]["low"][1] == pytest.approx(interval(OLD).low, rel=1e-5)
    outcome = compare(runs_of(NEW, OLD), claim.comparisons[0])
    draw(
        {"method": "made_up", "verdict": "holds", "comparisons": [outcome], "seeds": [0], "plot": [panel]},
        tmp_path / "plot.png",
    )
    with Image.open(tmp_path / "plot.png") as image:
        assert image.mode == "P"


def test_result_files_keep_lists_of_numbers_on_a_line(tmp_path):
    outcome = {
        "values": {"a": [1.5, 2.0], "b": []},
        "text": ["[1,\n 2]", "  two  spaces [x"],
        "nested": [[1], [{"c": 3}]],
    }
    write_result(tmp_path / "made_up.json", outcome)
    text = (tmp_path / "made_up.json").read_text()
    assert json.loads(text) == outcome and '"a": [1.5, 2.0]' in text


def test_rounding_keeps_six_digits():
    assert rounded({"a": [0.123456789, 2]}) == {"a": [0.123457, 2]}
