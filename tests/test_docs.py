"""The pages for people say what the code does: their examples run, their tables are complete."""

import dataclasses
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from papertrl.core.catalogue import BASES, METHODS, method_table
from papertrl.evidence.tables import evidence_sections, read_results, summary_table
from papertrl.trainers.policy.base import PolicyTrainer
from papertrl.trainers.policy.record import RolloutRecord, ScoredBatch
from papertrl.trainers.preference.base import PreferenceTrainer
from papertrl.trainers.supervised.base import SupervisedTrainer

from . import suite, test_catalogue

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^(`{{3,}}){language}\n(.*?)^\1$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [source for _, source in found]


def run_as_module(source: str, path: str) -> types.ModuleType:
    """Execute `source` as if it stood at `path` of the repository."""
    name = "papertrl." + path.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    sys.modules[name] = module
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def test_stages_page_names_every_stage_and_field():
    text = (ROOT / "docs/stages.md").read_text()
    policy, rest = text.split("## Preference:")
    preference, supervised = rest.split("## Supervised:")
    for trainer, part in ((PolicyTrainer, policy), (PreferenceTrainer, preference), (SupervisedTrainer, supervised)):
        assert re.findall(r"^\| `(\w+)` \| `\w+\(", part, flags=re.MULTILINE) == list(trainer.stages)
    for record in (ScoredBatch, RolloutRecord):
        for f in dataclasses.fields(record):
            assert f"`{f.name}`" in policy


def test_stages_page_says_who_uses_a_stage():
    rows = re.findall(r"^\| `(\w+)` \| `\w+\(.*\| ([^|]*) \|$", (ROOT / "docs/stages.md").read_text(), re.MULTILINE)
    told = {(stage, name) for stage, users in rows for name in re.findall(r"`(\w+)`", users)}
    from papertrl.core.catalogue import load_trainer

    real = {
        (stage, name)
        for name in METHODS
        for stage in (*load_trainer(name).method.extends, *load_trainer(name).method.replaces)
    }
    assert told == real


def test_stages_page_example_runs():
    for source in blocks("docs/stages.md", "python"):
        exec(compile(source, "docs/stages.md", "exec"), {})


def test_adding_a_method_works_as_told(monkeypatch, request, tmp_path):
    sources = {}
    for source in blocks("docs/adding_a_method.md", "python"):
        path = source.splitlines()[0].removeprefix("# ")
        sources[path] = source
    monkeypatch.setitem(METHODS, "w_reinforce", "policy")
    monkeypatch.setitem(suite.ACTIVE, "w_reinforce", {})
    names = ["losses/policy/w_reinforce.py", "trainers/policy/w_reinforce.py", "tests/policy/test_w_reinforce.py"]
    for path in names:
        module = run_as_module(sources[path], path)
    module.test_weigh_positive_is_the_papers_rule()
    recipe = yaml.safe_load(blocks("docs/adding_a_method.md", "yaml")[0])
    trainer = sys.modules["papertrl.trainers.policy.w_reinforce"].WReinforceGRPOTrainer
    assert recipe.pop("method") == "w_reinforce"
    trainer.config_class(output_dir=str(tmp_path), use_cpu=True, **recipe)
    # The page promises the whole suite for one line in a table
    monkeypatch.setattr("papertrl._EXPORTS", __import__("papertrl.core.catalogue", fromlist=["exports"]).exports())
    test_catalogue.test_declaration_is_complete("w_reinforce")
    test_catalogue.test_neutral_equals_trl("w_reinforce", request, tmp_path / "neutral")
    test_catalogue.test_mechanism_fires("w_reinforce", request, tmp_path / "fires")
    test_catalogue.test_resume_equals_uninterrupted("w_reinforce", request, tmp_path / "resume")
    test_catalogue.test_pair_trains(("w_reinforce", "dler"), request, tmp_path / "pair")


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_method_table_is_up_to_date(page):
    assert method_table() in (ROOT / page).read_text(), "run `python scripts/write_method_index.py`"


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_bases_are_exported():
    import papertrl

    assert all(hasattr(papertrl, base) for base in BASES.values())


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md"])
def test_evidence_table_is_up_to_date(page):
    results = read_results(ROOT / "claims/results")
    text = (ROOT / page).read_text()
    assert summary_table(results) in text, "run `python scripts/write_method_index.py`"
    if page != "README.md":
        assert evidence_sections(results) in text, "run `python scripts/write_method_index.py`"
