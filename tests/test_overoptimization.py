"""Over-optimization: the experiment covers the family, and what the page says follows from the runs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from papertrl.cli import main
from papertrl.core.catalogue import METHODS
from papertrl.core.errors import UsageError
from papertrl.evidence import overoptimization
from papertrl.evidence.overoptimization import (
    PLAIN,
    SETTINGS,
    chosen_methods,
    curves,
    experiment,
    lost,
    read,
    section,
    table,
)

ROOT = Path(__file__).parents[1]
FAMILY = [name for name, family in METHODS.items() if family == "preference"]


def made_up(arm: str, seed: int, kl: list[float], true: list[float]) -> dict:
    points = [
        {"step": i, "kl": k, "true": t, "proxy": 1.0 + i, "sampled_tokens": 0, "trained_tokens": i, "seconds": 0.1 * i}
        for i, (k, t) in enumerate(zip(kl, true, strict=True))
    ]
    return {"arm": arm, "seed": seed, "points": points, "logs": {}}


def outcome() -> dict:
    runs = [made_up("DPO", 0, [0, 1, 4], [0.5, 0.7, 0.2]), made_up("DPO", 1, [0, 2, 6], [0.5, 0.6, 0.3])]
    runs += [made_up("mine", 0, [0, 1, 2], [0.5, 0.6, 0.6]), made_up("mine", 1, [0, 1, 2], [0.5, 0.8, 0.7])]
    settings = {"arms": {"DPO": {}, "mine": {"online_iterations": 2}}}
    comparisons = [{"arm": "mine", "against": "DPO", "mean": 0.4, "low": 0.4, "high": 0.4}]
    return {"curves": curves(runs), "settings": settings, "comparisons": comparisons, "seeds": [0, 1]}


def test_table_tells_where_the_true_reward_was_best_and_what_it_lost():
    dpo, mine = table(outcome()).splitlines()[2:]
    assert dpo == "| DPO | offline | 5.00 | 3.000 | 0.250 | 0.650 | 1.50 | 0.400 |  |"
    assert mine == "| mine | online | 2.00 | 3.000 | 0.650 | 0.700 | 1.00 | 0.050 | +0.400 [+0.400, +0.400] |"
    assert lost(outcome(), "DPO").mean == pytest.approx(0.4)


def test_plot_is_drawn(tmp_path):
    overoptimization.draw(outcome(), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.mode == "P" and image.width > 1000


def test_every_preference_method_takes_part():
    class Args:
        methods = []

    assert list(chosen_methods(Args)) == FAMILY
    arms = experiment(tuple(FAMILY)).arms
    assert list(arms) == [*PLAIN, *FAMILY] and set(SETTINGS) <= set(FAMILY)
    assert all(arms[name].methods == (name,) for name in FAMILY)


@pytest.mark.parametrize("argv", ["lp_reg", "--seeds 0", "--wrong"])
def test_wrong_arguments_are_refused(argv):
    with pytest.raises(UsageError):
        overoptimization.main(argv.split())


def test_command_runs_and_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PAPERTRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    argv = ["overoptimization", "rpo", "--quick", "--jobs", "1", "--work_dir", "work"]
    assert main(argv) == 0
    folder = tmp_path / "runs/claims/quick"
    made = json.loads((folder / "overoptimization.json").read_text())
    assert set(made["curves"]) == {*PLAIN, "rpo"}
    first = {name: of_seeds[0][0] for name, of_seeds in made["curves"]["DPO"].items()}
    assert first["kl"] == pytest.approx(0.0, abs=1e-4) and first["proxy"] > first["true"]
    assert (folder / "overoptimization.png").exists() and "| rpo | offline |" in capsys.readouterr().out
    # Finished runs are read, not made again
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert main(argv) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}


def test_page_says_what_was_measured():
    measured = read(ROOT / "claims/results")
    told = section(measured) if measured else "Not measured yet."
    assert told in (ROOT / "docs/evidence.md").read_text(), "run `python scripts/write_method_index.py`"
