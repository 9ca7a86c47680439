"""The pages for people say what the code does: their examples run, their tables are complete."""

import dataclasses
import doctest
import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

import papertrl
from papertrl import compose
from papertrl.core import catalogue, declaration
from papertrl.core.family import FAMILIES
from papertrl.trainers.method import MethodTrainer
from papertrl.trainers.policy.base import PolicyTrainer
from papertrl.trainers.policy.record import RolloutRecord, ScoredBatch

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


def script() -> types.ModuleType:
    """`scripts/write_method_index.py`."""
    spec = importlib.util.spec_from_file_location("write_method_index", ROOT / "scripts/write_method_index.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stages_told() -> dict[str, list[str]]:
    """Stages in the tables of docs/stages.md, by the base class in the heading above."""
    told = {}
    for section in re.split(r"^## ", (ROOT / "docs/stages.md").read_text(), flags=re.MULTILINE)[1:]:
        if named := re.search(r"`(\w+)", section.partition("\n")[0]):
            told[named[1]] = re.findall(r"^\| `(\w+)` \| `\w+\(", section, flags=re.MULTILINE)
    return told


def test_stages_page_names_every_stage_and_field():
    told = stages_told()
    common = told.pop(MethodTrainer.__name__)
    for family in FAMILIES.values():
        if importlib.util.find_spec(family.module) is None:
            continue
        stages = list(getattr(importlib.import_module(family.module), family.base).stages)
        assert told[family.base] == [stage for stage in stages if stage in told[family.base]]
        assert {*told[family.base], *common} >= set(stages) >= set(common)
    text = (ROOT / "docs/stages.md").read_text()
    for record in (ScoredBatch, RolloutRecord):
        for f in dataclasses.fields(record):
            assert f"`{f.name}`" in text


def test_pages_are_as_the_script_writes_them():
    for path, text in script().pages().items():
        assert path.read_text() == text, "run `python scripts/write_method_index.py`"


def test_the_script_sees_who_acts_in_a_stage():
    users_of = script().users_of
    assert {"dler", "lite_ppo"} <= set(users_of(FAMILIES["policy"], "scale"))
    assert users_of(FAMILIES["supervised"], "token_loss") == ["implicit_reward_sft"]
    page = "## Policy: `PolicyTrainer(GRPOTrainer)`\n\n| `score` | `score(scored)` | rewards | `somebody` |"
    assert script().with_users(page).endswith("| rewards | `dler` |")


def test_the_script_counts_verdicts():
    results = {"a": {"verdict": "holds"}, "b": {"verdict": "reversed"}, "c": {"verdict": "holds"}}
    assert script().counts("Some", ["a", "b", "c", "d"], results) == "| Some | 4 | 2 | 0 | 1 | 1 |"
    with pytest.raises(SystemExit, match="no place for 'counts'"):
        script().with_text("no marks", "counts", "")


def even_digits(completions, **kwargs):
    return [float(sum(c.isdigit() for c in text) % 2 == 0) for text in completions]


ROWS = Dataset.from_dict({"prompt": [f"{i}+{i + 1}=" for i in range(8)]})


def short_run(output_dir, **settings) -> dict:
    common = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    machine = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "seed": 3, "learning_rate": 1e-3}
    sizes = {"per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 8}
    return {"output_dir": str(output_dir)} | common | machine | sizes | settings


def trained(trainer_class: type, model: str, args, reward=even_digits):
    trainer = trainer_class(model, [reward], args, train_dataset=ROWS)
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_stages_page_examples_run(policy_path, tmp_path):
    args = PolicyTrainer.config_class(**short_run(tmp_path))
    names = {"model": policy_path, "reward": [even_digits], "args": args, "dataset": ROWS}
    for source in blocks("docs/stages.md", "python"):
        exec(compile(source, "docs/stages.md", "exec"), names)
    assert names["trainer"].user_stages["scale"].function is names["careful"]
    names["trainer"].train()


def test_readme_combination_runs():
    (source,) = [source for source in blocks("README.md", "python") if "class MyTrainer" in source]
    names: dict = {}
    exec(
        compile(source.replace('output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False'), "README.md", "exec"),
        names,
    )
    by_hand, composed = source.partition("MyTrainer = ")[0], names["MyTrainer"]
    exec(compile(by_hand, "README.md", "exec"), names)
    assert names["MyTrainer"].methods == composed.methods and len(composed.methods) == 4
    assert names["args"].lp_reg_rho == 0.01


@pytest.fixture
def declare(monkeypatch, tmp_path):
    """Declare the method of a page, as if its TOML file were in `methods/`."""
    folder = tmp_path / "methods"
    folder.mkdir()
    monkeypatch.setattr(declaration, "METHODS_FOLDER", folder)

    def declared_by(page: str) -> str:
        (text,) = [source for source in blocks(page, "toml") if source.startswith("# methods/")]
        name = text.splitlines()[0].removeprefix("# methods/").removesuffix(".toml")
        (folder / f"{name}.toml").write_text(text)
        method = declaration.declared(name)
        monkeypatch.setitem(catalogue.DECLARATIONS, name, method)
        monkeypatch.setitem(catalogue.METHODS, name, method.family or method.slot)
        return name

    yield declared_by
    catalogue.load.cache_clear()
    catalogue.load_trainer.cache_clear()


def sources_of(page: str) -> dict[str, str]:
    """Python files that a page writes, by path."""
    return {source.splitlines()[0].removeprefix("# "): source for source in blocks(page, "python")}


def test_adding_a_method_works_as_told(declare, policy_path, tmp_path):
    assert declare("docs/adding_a_method.md") == "w_reinforce"
    sources = sources_of("docs/adding_a_method.md")
    for path in ("losses/policy/w_reinforce.py", "trainers/policy/w_reinforce.py"):
        run_as_module(sources[path], path)
    run_as_module(
        sources["tests/policy/test_w_reinforce.py"], "tests/policy/test_w_reinforce.py"
    ).test_weigh_positive_is_the_papers_rule()
    trainer_class, config = papertrl.WReinforceGRPOTrainer, papertrl.WReinforceGRPOConfig
    assert compose("w_reinforce") is trainer_class
    claim = run_as_module(sources["claims/w_reinforce.py"], "claims/w_reinforce.py").CLAIM
    assert claim.method == "w_reinforce" and claim.family is trainer_class.family
    recipe = yaml.safe_load(blocks("docs/adding_a_method.md", "yaml")[0])
    assert recipe.pop("method") == "w_reinforce"
    config(output_dir=str(tmp_path), use_cpu=True, **recipe)
    # Neutral equals TRL, the mechanism acts, and it combines
    exact = dict(PolicyTrainer.family.exact)
    neutral = trained(
        trainer_class, policy_path, config(**short_run(tmp_path, **exact, **trainer_class.method.neutral))
    )
    theirs = trained(GRPOTrainer, policy_path, GRPOConfig(**short_run(tmp_path)))
    for ours, parent in zip(neutral.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(ours, parent, rtol=0, atol=0)
    both = compose("w_reinforce", "dler")
    for made in (trainer_class, both):
        assert (
            max(
                logged(
                    trained(made, policy_path, made.config_class(**short_run(tmp_path))), trainer_class.method.signal
                )
            )
            > 0
        )


def test_adding_a_component_works_as_told(declare, policy_path, tmp_path):
    assert declare("docs/adding_a_component.md") == "sgdr"
    sources = sources_of("docs/adding_a_component.md")
    module = run_as_module(sources["optimizers/sgdr.py"], "optimizers/sgdr.py")
    oracle = run_as_module(sources["tests/optimizers/test_sgdr.py"], "tests/optimizers/test_sgdr.py")
    for period, growth in ((1, 1), (3, 1), (2, 3)):
        oracle.test_cycles_restart_and_grow(period, growth)
    (example,) = [e for e in doctest.DocTestFinder(recurse=False).find(module.Sgdr, module=module) if e.examples]
    assert doctest.DocTestRunner().run(example).failed == 0
    made = compose("grpo", "sgdr")
    trainer = trained(made, policy_path, made.config_class(**short_run(tmp_path, sgdr_period=2)))
    assert logged(trainer, "sgdr/factor") == pytest.approx([module.Sgdr(sgdr_period=2).factor(i) for i in range(3)])


def test_links_between_pages_lead_somewhere():
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_index_with_a_sentence():
    rows = dict(
        re.findall(r"^\| \[(\w+\.md)\]\(\1\) \| (.+) \|$", (ROOT / "docs/README.md").read_text(), re.MULTILINE)
    )
    assert set(rows) == {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert all(len(told) > 20 for told in rows.values())


def test_bases_are_exported():
    for family in FAMILIES.values():
        assert family.base in papertrl.__all__
        if importlib.util.find_spec(family.module) is not None:
            assert getattr(papertrl, family.base).family is family
