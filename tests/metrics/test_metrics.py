"""Metrics against exhaustive counting, closed forms and simulated data."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import papertrl.metrics
from papertrl.metrics.estimators import bootstrap, distinct_n, length_controlled, log_ratio_kl, pass_at_k

evaluate = pytest.importorskip("evaluate")


@given(st.integers(1, 8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n, data):
    right = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    subsets = list(itertools.combinations(right, k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k(np.array([sum(right)]), np.array([n]), k)[0] == pytest.approx(expected)


def test_pass_at_k_of_many_samples_is_finite_and_exact():
    n, c, k = 10_000, 3, 5_000
    expected = 1 - math.prod((n - k - i) / (n - i) for i in range(c))
    assert pass_at_k(np.array([c]), np.array([n]), k)[0] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_refuses_more_than_there_are(k):
    with pytest.raises(ValueError, match=f"`k` must be in .1, 2., .*got {k}"):
        pass_at_k(np.array([1]), np.array([2]), k)


def test_win_rate_at_equal_length_finds_the_simulated_one():
    rng = np.random.default_rng(0)
    difference = rng.normal(20, 30, size=20_000)
    scale = np.sqrt((difference**2).mean())
    theta, phi = -0.4, 2.0
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(difference / scale))))
    wins = (rng.random(20_000) < p).astype(float)
    assert wins.mean() > 0.55
    assert length_controlled(wins, difference) == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.02)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=30))
def test_without_length_differences_length_control_changes_nothing(wins):
    wins = np.array(wins)
    controlled = length_controlled(wins, np.zeros(len(wins)))
    assert controlled == pytest.approx(wins.mean(), abs=0.02)
    assert 0 < controlled < 1


def test_length_control_is_finite_where_length_decides_everything():
    wins = np.array([1.0, 1, 0, 0] * 10)
    assert length_controlled(wins, np.array([5, 3, -3, -5] * 10)) == pytest.approx(0.5, abs=0.01)


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["a b", "a b"], 1) == pytest.approx(0.5)
    assert distinct_n(["aab"], 1) == pytest.approx(2 / 3)
    assert distinct_n([""], 2) == 1.0


def test_both_kl_estimators_find_the_exact_divergence():
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    tokens = rng.choice(3, size=200_000, p=p)
    exact = float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        estimate = log_ratio_kl(np.log(p[tokens]), np.log(q[tokens]), estimator) / len(tokens)
        assert estimate == pytest.approx(exact, rel=0.02)


def test_bootstrap_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        sample = rng.normal(1.0, 1.0, size=60)
        measured = bootstrap(60, lambda rows, sample=sample: sample[rows].mean(), seed=seed, resamples=300)
        covered += measured["low"] <= 1.0 <= measured["high"]
    assert 0.88 <= covered / 200 <= 0.99


INPUTS = {
    "exact_match": ({"predictions": ["a ", "b"], "references": ["a", "c"]}, {"exact_match": 0.5}),
    "pass_at_k": ({"predictions": [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "k": 2}, {"pass@2": 1 / 3}),
    "mean_at_k": ({"predictions": [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], "k": 2}, {"mean@2": 0.25}),
    "win_rate": (
        {
            "predictions": [1.0, 0.0, 0.5],
            "references": [0.0, 1.0, 0.5],
            "prediction_lengths": [3, 3, 3],
            "reference_lengths": [3, 3, 3],
        },
        {"win_rate": 0.5, "length_controlled_win_rate": 0.5},
    ),
    "response_length": ({"predictions": [[1, 2], [3, 4, 5, 6]]}, {"response_length": 3.0}),
    "distinct_n": ({"predictions": [["a b", "a b"], ["a b c", "d"]], "n": 1}, {"distinct-1": 0.75}),
    "kl_to_base": ({"predictions": [[-1.0, -1.0], [-2.0]], "references": [[-2.0, -1.0], [-2.0]]}, {"kl_to_base": 0.5}),
}


@pytest.mark.parametrize("name", INPUTS)
def test_modules_compute_by_name_and_by_path(name):
    inputs, expected = INPUTS[name]
    path = Path(papertrl.metrics.__file__).parent / f"{name}.py"
    for metric in (papertrl.metrics.load(name), evaluate.load(str(path))):
        assert metric.compute(**inputs) == pytest.approx(expected)


def test_bleu_is_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu")
    predictions, references = ["the cat sat on the mat", "a dog"], ["the cat sat on a mat", "a dog barks"]
    expected = sacrebleu.BLEU().corpus_score(predictions, [references]).score
    assert papertrl.metrics.load("bleu").compute(predictions=predictions, references=references) == {
        "bleu": pytest.approx(expected)
    }


def test_all_metrics_are_listed_and_unknown_ones_refused():
    files = {path.stem for path in Path(papertrl.metrics.__file__).parent.glob("*.py")} - {"__init__", "estimators"}
    assert files == set(papertrl.metrics.METRICS)
    with pytest.raises(ValueError, match="Did you mean 'pass_at_k'"):
        papertrl.metrics.load("pass_at_kk")
