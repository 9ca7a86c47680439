"""One behavior suite over the catalogue: a method that is declared gets every test, whatever its kind."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import math
import pickle
from functools import cache
from itertools import combinations as pairs_of
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import concatenate_datasets

import papertrl
from papertrl.core.catalogue import (
    DECLARATIONS,
    METHODS,
    class_stem,
    combinations,
    entry_of,
    find,
    load,
    load_trainer,
    method_table,
)
from papertrl.core.compose import compose
from papertrl.core.configuration import field_default, introduced
from papertrl.core.declaration import Method
from papertrl.core.family import FAMILIES
from papertrl.core.slots import SLOTS
from papertrl.core.stages import remedy
from papertrl.evidence import load_claim
from papertrl.trainers.policy.base import PolicyTrainer

from .harness.blocks import blocks, culprits
from .harness.table import (
    CASES,
    CHOICE_OF_TRL,
    COMPONENTS,
    INERT,
    INERT_IN_PART,
    MATTER,
    OBJECTIVES,
    REPEATED,
    active,
    active_config,
    adapter,
    build,
    dataset,
    digit_parity,
    every_fourth,
    history,
    logged,
    model_path,
    objectives_of,
    parents,
    reward_of,
    settings,
    weights,
)

ROOT = Path(__file__).parents[1]
PACKAGE = {family.name: f"trainers/{family.name}" for family in FAMILIES.values()}
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


# --- Declarations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTIVES)
def test_files_of_an_objective_stand_where_the_name_says(name):
    family = DECLARATIONS[name].family
    for place in ("losses", "trainers"):
        assert (ROOT / place / family / f"{name}.py").is_file()
    assert (ROOT / "recipes" / f"{name}.yaml").is_file()
    assert (ROOT / "tests" / family / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", COMPONENTS)
def test_files_of_a_component_stand_in_its_slots_room(name):
    room = SLOTS[DECLARATIONS[name].slot].room
    assert load(name).__module__ == f"{room}.{name}"
    assert list((ROOT / "tests").rglob(f"test_{name}.py"))


@pytest.mark.parametrize("name", METHODS)
def test_declaration_is_complete(name):
    declaration, part = DECLARATIONS[name], load(name)
    assert part.method is declaration and part.__name__ == entry_of(declaration)[1]
    assert declaration.summary and declaration.signal and declaration.neutral and declaration.paper.authors
    assert len(declaration.paper.authors) == len(set(declaration.paper.authors))
    config = part.config_class
    fields = {f.name for f in dataclasses.fields(config)}
    assert declaration.neutral.keys() <= fields
    for own in config.__annotations__:
        assert f"{own} (`" in config.__doc__
    for section in ("Relations:", "Paper:", "Example:"):
        assert section in part.__doc__
    citation = declaration.paper.citation
    assert declaration.paper.title in citation and declaration.paper.id in citation and "author" in citation


@pytest.mark.parametrize("name", OBJECTIVES)
def test_public_names_follow_from_the_declaration(name):
    trainer = load_trainer(name)
    stem = class_stem(name)
    assert (
        getattr(papertrl, stem + "Trainer") is trainer and getattr(papertrl, stem + "Config") is trainer.config_class
    )
    assert trainer._paper["citation"].startswith(DECLARATIONS[name].paper.citation)
    assert {"trl", "papertrl", trainer.family.plain} <= set(trainer._tag_names)


@pytest.mark.parametrize("name", METHODS)
def test_settings_of_the_declaration_are_fields(name):
    for family in {case.family for case in CASES if case.method == name}:
        trainer = next(case.trainer for case in CASES if case == type(case)(name, family))
        fields = {f.name for f in dataclasses.fields(trainer.config_class)}
        assert {*DECLARATIONS[name].neutral, *DECLARATIONS[name].active} <= fields


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_takes_its_neutral_settings_and_is_off(name):
    neutral = DECLARATIONS[name].neutral
    assert neutral and not load(name)(**neutral).on


@pytest.mark.parametrize("name", OBJECTIVES)
def test_settings_under_which_stages_are_off_are_fields(name):
    trainer = load(name)
    fields = {f.name for f in dataclasses.fields(trainer.config_class)}
    for off in (*trainer.__dict__.get("extends", {}).values(), *trainer.__dict__.get("replaces", {}).values()):
        for way in off if isinstance(off, tuple) else (off,):
            assert way.keys() <= fields


@pytest.mark.parametrize("name", METHODS)
def test_fields_carry_the_methods_prefix(name):
    base = {} if DECLARATIONS[name].kind == "component" else introduced(FAMILIES_BASE[DECLARATIONS[name].family])
    components = [c.config_class for c in getattr(load(name), "components", ())]
    carried = {field for config in components for field in introduced(config)}
    for field, owner in introduced(load(name).config_class).items():
        if field not in base and field not in carried and "TrainingArguments" not in str(owner.__mro__):
            assert field.startswith(DECLARATIONS[name].prefix + "_")


@pytest.mark.parametrize("name", METHODS)
def test_example_in_the_docstring_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = load(name)
    module = importlib.import_module(part.__module__)
    (example,) = [e for e in doctest.DocTestFinder(recurse=False).find(part, module=module) if e.examples]
    # Those of the policy family name a model of the Hub
    skipped = [e for e in example.examples if doctest.SKIP in e.options]
    report = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert found.failed == 0, "".join(report)
    assert found.attempted > (0 if skipped else 2)


def test_catalogue_finds_and_suggests():
    assert find("LP-Reg") == "lp_reg"
    with pytest.raises(ValueError, match="Did you mean 'lp_reg'"):
        find("lp_regg")
    assert all(f"`{name}`" in method_table() for name in METHODS)
    assert {find(family.plain) for family in FAMILIES.values()} == {"grpo", "dpo", "sft", "reward"}


FAMILIES_BASE = {family.name: load(family.plain).config_class for family in FAMILIES.values()}


def out_of_range(valid, default):
    """Values that a field's declaration does not accept, of each of its bounds."""
    if valid.choices is not None:
        yield "nothing_like_it"
        return
    yield "text"
    yield math.nan
    for bound, step in ((valid.ge, -1), (valid.le, 1)):
        if bound is not None:
            yield bound + step
    for bound in (valid.gt, valid.lt):
        if bound is not None and math.isfinite(bound):
            yield bound
    if not valid.optional:
        yield None


@pytest.mark.parametrize("name", [*METHODS, *(f.plain for f in FAMILIES.values())])
def test_values_out_of_range_are_refused_by_name(name, tmp_path):
    case = next((case for case in CASES if case.method == name), None)
    config = case.trainer.config_class if case else load(name).config_class
    own = set(introduced(load(name).config_class))
    family = case.family if case else load(name).family
    accepted = config(**settings(family, tmp_path))
    for f in dataclasses.fields(config):
        valid = f.metadata.get("valid")
        if valid is None or f.name not in own | set(config.__annotations__):
            continue
        for value in out_of_range(valid, getattr(accepted, f.name)):
            setattr(accepted, f.name, value)
            with pytest.raises(ValueError, match=f"`{f.name}`"):
                accepted.validate()
            setattr(accepted, f.name, getattr(config(**settings(family, tmp_path)), f.name))


# --- At default settings --------------------------------------------------------------------------------------------


# The gradient itself is what weights move by
PLAIN = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}


@pytest.fixture(scope="module")
def base_runs(request, tmp_path_factory):
    """Weights that the family's base comes to, before and after, with TRL's fields as in the config of a method."""
    made = {}

    def run(family: str, given, data, reward):
        base = load(FAMILIES[family].plain)
        args = base.config_class(**settings(family, tmp_path_factory.mktemp("base"), **PLAIN))
        names = [f.name for f in dataclasses.fields(parents(family)[1]) if f.name != "output_dir"]
        changed = {name: getattr(given, name) for name in names if getattr(given, name) != getattr(args, name)}
        key = family, str(changed), len(data), str(reward)
        if key not in made:
            vars(args).update(changed)
            trainer = build(base, family, model_path(family, request), args, data=data, reward=reward)
            before = weights(trainer)
            trainer.train()
            made[key] = before, weights(trainer)
        return made[key]

    return run


@pytest.mark.parametrize("name", METHODS)
def test_a_method_acts_at_default_settings_or_says_that_it_does_not(name, request, tmp_path, caplog, base_runs):
    """
    At its defaults, the logged signal tells of a method, and so do gradient or choice, against the base with the same
    values of TRL's fields; else one warning names the method and the setting under which it acts.
    """
    case = next(case for case in CASES if case.method == name)
    family, trainer_class = case.family, case.trainer
    data = concatenate_datasets([dataset(family)] * (2 if name in REPEATED else 1))
    reward = [digit_parity, every_fourth] if name == "dynamic_reward_weighting" else reward_of(trainer_class)
    defaults = {f.name: field_default(f) for f in dataclasses.fields(trainer_class.config_class)}
    short = {field: 6 for field in defaults if field.endswith("max_new_tokens")}
    short["max_steps"] = max(2, defaults.get("online_iterations", 0))
    # Few steps of few rows may by chance have nothing for a method to do
    for seed in (3, 42, 43, 44):
        caplog.clear()
        args = trainer_class.config_class(
            **settings(family, tmp_path / str(seed), **PLAIN | short | MATTER.get(name, {}), seed=seed)
        )
        with caplog.at_level("WARNING"):
            trainer = build(trainer_class, family, model_path(family, request), args, data=data, reward=reward)
            trainer.train()
        signal, found = logged(trainer, case.declaration.signal), weights(trainer)
        assert all(map(math.isfinite, signal))
        start, expected = base_runs(family, args, data, reward)
        acts = departure(found, expected, start) > 1e-5
        if name in INERT or (any(signal) and (acts or name in CHOICE_OF_TRL)):
            break

    told = [record.getMessage() for record in caplog.records if f"'{name}'" in record.getMessage()]
    if name in INERT:
        assert not acts and len(told) == 1 and INERT[name] in told[0]
        return
    assert any(signal)
    assert len(told) == (name in INERT_IN_PART) and all(INERT_IN_PART[name] in text for text in told)
    if name in CHOICE_OF_TRL:
        assert not acts
        defaults = load(FAMILIES[family].plain).config_class(**settings(family, tmp_path, **PLAIN))
        acts = departure(found, base_runs(family, defaults, data, reward)[1], start) > 1e-5
    assert acts


def departure(found, expected, start) -> float:
    """How far weights are from those of another run, as a share of the way that the latter went."""
    if found.keys() != expected.keys():
        return math.inf
    apart = sum((found[key] - expected[key]).square().sum() for key in found)
    return float(apart / sum((expected[key] - start[key]).square().sum() for key in found)) ** 0.5


UNSTAGED = [case for case in CASES if case.family != "policy" and case.method not in COMPONENTS]


@pytest.mark.parametrize(
    "trainer_class",
    [*(case.trainer for case in UNSTAGED), load(FAMILIES["reward"].plain)],
    ids=lambda cls: cls.__name__,
)
def test_what_a_loss_does_not_read_is_refused_by_name(trainer_class, request, tmp_path):
    """Label smoothing of transformers, which TRL's losses of pairs ignore, and the stages replace."""
    family = trainer_class.family.name
    with pytest.raises(ValueError, match="`label_smoothing_factor`"):
        args = trainer_class.config_class(**settings(family, tmp_path, label_smoothing_factor=0.2))
        build(trainer_class, family, model_path(family, request), args)


# --- Equal to TRL, drop-in ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_runs(request, tmp_path_factory):
    """A run of TRL's own trainer of each family, made once: weights and log."""
    made = {}

    def run(family: str):
        if family not in made:
            parent, config = parents(family)
            args = config(**settings(family, tmp_path_factory.mktemp("trl")))
            trainer = build(parent, family, model_path(family, request), args)
            trainer.train()
            made[family] = weights(trainer), history(trainer)
        return made[family]

    return run


@over_cases
def test_neutral_equals_trl(case, request, tmp_path, trl_runs):
    expected, theirs = trl_runs(case.family)
    args = case.trainer.config_class.adopt(parents(case.family)[1](**settings(case.family, tmp_path)))
    for field, value in {**case.declaration.neutral, **FAMILIES[case.family].exact}.items():
        setattr(args, field, value)
    model, data = model_path(case.family, request), dataset(case.family)
    trainer = build(case.trainer, case.family, model, args, data=data)
    trainer.train()
    for key, value in weights(trainer).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    for ours_entry, theirs_entry in zip(history(trainer), theirs, strict=True):
        assert {k: ours_entry[k] for k in theirs_entry} == pytest.approx(theirs_entry, rel=1e-6, abs=1e-7)


@over_cases
def test_drop_in_for_trl(case, request, tmp_path):
    parent, config = parents(case.family)
    args = config(**settings(case.family, tmp_path))
    before = dict(args.__dict__)
    trainer = build(case.trainer, case.family, model_path(case.family, request), args)
    assert isinstance(trainer.args, case.trainer.config_class) and isinstance(trainer, parent)
    for f in dataclasses.fields(case.trainer.config_class):
        if f.name not in before:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            assert getattr(trainer.args, f.name) == default
    assert args.__dict__ == before


# --- One run each: it acts, stays finite, resumes, and refuses strangers --------------------------------------------


@over_cases
def test_acts_and_resumes(case, request, tmp_path):
    trainer_class, model = case.trainer, model_path(case.family, request)
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    whole = trained(trainer_class, [case.method], model, tmp_path, **run)
    # It acts
    signal = logged(whole, case.declaration.signal)
    assert signal and max(signal) > 0
    losses = logged(whole, "loss")
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    # It resumes as if nothing had happened
    assert_resumes(whole, trainer_class, [case.method], model, tmp_path, 2, run)
    refuses_strangers(case, request, tmp_path)


def trained(trainer_class, names, model, output_dir, **values):
    args = active_config(trainer_class, names, output_dir, **values)
    trainer = build(trainer_class, trainer_class.family, model, args, reward=reward_of(trainer_class))
    trainer.train()
    return trainer


def assert_resumes(whole, trainer_class, names, model, tmp_path, at, run):
    # Like a fresh process: nothing of the first trainer is left but the files
    torch.manual_seed(12345)
    args = active_config(trainer_class, names, tmp_path / "again", **run)
    again = build(trainer_class, trainer_class.family, model, args, reward=reward_of(trainer_class))
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    expected = weights(whole)
    for key, value in weights(again).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    steps = [entry for entry in history(whole) if "loss" in entry]
    assert [entry for entry in history(again) if "loss" in entry] == steps


def refuses_strangers(case, request, tmp_path):
    """A checkpoint is not taken by another method, nor when it is damaged."""
    checkpoint = tmp_path / "checkpoint-1"
    base = load(FAMILIES[case.family].plain)
    model = model_path(case.family, request)
    stranger = build(base, case.family, model, base.config_class(**settings(case.family, tmp_path / "other")))
    names = [m.name for m in case.trainer.methods]
    with pytest.raises(ValueError, match=rf"written by methods \['{names[0]}'"):
        stranger.train(resume_from_checkpoint=str(checkpoint))
    args = active_config(case.trainer, [case.method], tmp_path / "damaged")
    again = build(case.trainer, case.family, model, args)
    (weights_file,) = checkpoint.glob("*model.safetensors")
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        again.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="not a folder"):
        again.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", objectives_of("policy"))
def test_resume_inside_a_generation_batch(name, request, tmp_path):
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2}
    run |= {"steps_per_generation": 4, "num_iterations": 2}
    if name in ("dler", "hapo", "hpt_upge", "lp_reg"):
        run["max_tokens_per_micro_batch"] = 30
    model = model_path("policy", request)
    whole = trained(load(name), [name], model, tmp_path, **run)
    assert_resumes(whole, load(name), [name], model, tmp_path, 3, run)


def test_resume_in_a_later_epoch(request, tmp_path):
    # 16 prompts, 8 an optimizer step: the second epoch begins after two steps
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}
    run["per_device_train_batch_size"] = 16
    model = model_path("policy", request)
    whole = trained(load("d3s"), ["d3s"], model, tmp_path, **run)
    assert_resumes(whole, load("d3s"), ["d3s"], model, tmp_path, 3, run)


@over_cases
def test_an_adapter_alone_is_trained(case, request, tmp_path):
    """With PEFT, the base model's weights stay, to the bit, and the mechanism still runs."""
    if case.method == "norm_tuning":
        pytest.skip("trains weights of the model itself, and refuses adapters: test_norm_tuning.py")
    args = active_config(case.trainer, [case.method], tmp_path, max_steps=4)
    model = model_path(case.family, request)
    peft_config = adapter(case.family)
    trainer = build(case.trainer, case.family, model, args, reward=reward_of(case.trainer), peft_config=peft_config)
    before = weights(trainer)
    trainer.train()
    changed = {key for key, value in weights(trainer).items() if not torch.equal(value, before[key])}
    assert changed and all("lora" in key or "modules_to_save" in key for key in changed)
    assert case.declaration.signal in set().union(*trainer.state.log_history)


# --- Together -------------------------------------------------------------------------------------------------------


def combined_config(names, output_dir, **values):
    trainer_class = compose(*names)
    return trainer_class, active_config(trainer_class, names, output_dir, **values)


@cache
def do_combine(first: str, second: str) -> bool:
    """Whether two methods combine where both act: read from their defaults, without a trainer or a config."""
    if list(METHODS).index(first) > list(METHODS).index(second):
        return do_combine(second, first)
    trainer_class = compose(first, second)
    args = SimpleNamespace(**{f.name: field_default(f) for f in dataclasses.fields(trainer_class.config_class)})
    vars(args).update(active([first, second], trainer_class))
    try:
        trainer_class.refuse_clashes(args)
    except ValueError:
        return False
    return True


BLOCKS = {family: blocks(objectives_of(family), do_combine) for family in FAMILIES}
# Methods whose terms come from gradient-carrying passes over sequences that they sampled
PASSES_OF_THEIR_OWN = {"hypo", "xpo"}
CLASHES = [pair for family in FAMILIES for pair in pairs_of(objectives_of(family), 2) if not do_combine(*pair)]
ALL_BLOCKS = [block for found in BLOCKS.values() for block in found]


def run_both_ways(names, request, tmp_path):
    """Train methods in the order given and in the reverse: all act, weights and logs are equal to the bit."""
    found = []
    for order in (list(names), list(names)[::-1]):
        trainer_class, args = combined_config(order, tmp_path / order[0], max_steps=2)
        model = model_path(trainer_class.family, request)
        trainer = build(trainer_class, trainer_class.family, model, args, reward=reward_of(trainer_class))
        trainer.train()
        seen = set().union(*trainer.state.log_history)
        missing = [name for name in names if DECLARATIONS[name].signal not in seen]
        assert not missing, f"{missing} did not act in {order}"
        assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
        found.append(trainer)
    # Gradients of several further passes add up in the order in which these were made
    rounding = 1e-7 if len(PASSES_OF_THEIR_OWN & set(names)) > 1 else 0
    first, second = map(weights, found)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert value.isfinite().all()
        torch.testing.assert_close(value, second[key], rtol=0, atol=rounding)
    for one, other in zip(*map(history, found), strict=True):
        assert one == (pytest.approx(other, rel=1e-6, abs=1e-7) if rounding else other)


@pytest.mark.parametrize("block", ALL_BLOCKS, ids="+".join)
def test_a_block_of_methods_trains_in_both_orders(block, request, tmp_path):
    try:
        run_both_ways(block, request, tmp_path / "block")
    except Exception as error:
        left = culprits(block, lambda part: run_both_ways(part, request, tmp_path / "-".join(part)))
        raise AssertionError(f"{' + '.join(left)} fail together: {error}") from error


class Halves(PolicyTrainer):
    """A user's method on top of others."""

    method = Method("halves", family="policy")
    extends = {"score": {}}

    def score(self, scored):
        self.log_metric("halves/rows", float(len(scored.lengths)))
        return super().score(scored) / 2


class Decides(PolicyTrainer):
    """A user's method that leaves no other its say in the stage, but for those around it."""

    method = Method("decides", family="policy")
    replaces = {"score": {}}

    def score(self, scored):
        self.log_metric("decides/rows", float(len(scored.lengths)))
        return scored.rewards / 2


class OnTop(load_trainer("dler")):
    def score(self, scored):
        return super().score(scored) / 2


class InPlace(load_trainer("dler")):
    def score(self, scored):
        return scored.rewards / 2


def cut_answers(trainer_class, request, tmp_path):
    """Weights and history of a run in which DLER's stage `score` takes rewards away."""
    values = {"max_completion_length": 3, "max_steps": 2}
    trainer = build(
        trainer_class,
        "policy",
        model_path("policy", request),
        trainer_class.config_class(**settings("policy", tmp_path, **values)),
    )
    trainer.train()
    return weights(trainer), history(trainer)


@pytest.mark.parametrize("theirs", [Halves, Decides])
def test_a_users_method_acts_with_ours_in_both_orders(theirs, request, tmp_path):
    dler = load_trainer("dler")
    results = [cut_answers(compose(*order), request, tmp_path) for order in ((theirs, dler), (dler, theirs))]
    for key, value in results[0][0].items():
        assert torch.equal(value, results[1][0][key])
    assert results[0][1] == results[1][1]
    assert {f"{theirs.method.name}/rows", "dler/truncated_fraction"} <= results[0][1][0].keys()


@pytest.mark.parametrize("mine", [OnTop, InPlace])
def test_a_users_subclass_acts_on_a_method_or_in_its_place(mine, request, tmp_path):
    _, (first, *_) = cut_answers(mine, request, tmp_path)
    assert ("dler/truncated_fraction" in first) == (mine is OnTop)


def test_a_users_subclass_is_refused_where_it_would_silence_another_method(tmp_path):
    args = compose(Halves, "dler").config_class(**settings("policy", tmp_path))
    for parts in ((OnTop, Halves), (Halves, OnTop), (Halves, InPlace)):
        compose(*parts).refuse_clashes(args)
    with pytest.raises(ValueError, match=r"`InPlace.score` of the stage 'score' calls no .*'Halves'.*list the class"):
        compose(InPlace, Halves).refuse_clashes(args)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_that_combines_meets_in_a_block(family):
    met = {frozenset(pair) for block in BLOCKS[family] for pair in pairs_of(block, 2)}
    for pair in pairs_of(objectives_of(family), 2):
        assert (frozenset(pair) in met) == do_combine(*pair)


@pytest.mark.parametrize("pair", CLASHES, ids="+".join)
def test_a_clash_names_both_the_stage_and_a_remedy_that_works(pair, tmp_path):
    trainer_class, args = combined_config(pair, tmp_path)
    both = [
        stage
        for stage in trainer_class.stages
        if len(trainer_class.deciding(stage, args)) > 1
        or ({"disco"} & set(pair) and trainer_class.acting(stage, args))
    ]
    with pytest.raises(ValueError, match=f"'{pair[0]}'.*'{pair[1]}'|'{pair[1]}'.*'{pair[0]}'") as refused:
        trainer_class.refuse_clashes(args)
    assert any(f"stage '{stage}'" in str(refused.value) for stage in both)
    # Following the advice until there is none: each time one of the two gives a stage up
    for _ in range(6):
        try:
            trainer_class.refuse_clashes(args)
            break
        except ValueError as error:
            ways = [
                off
                for owner in trainer_class.owners()
                for off in owner.__dict__.get("replaces", {}).values()
                if remedy(off) and remedy(off) in str(error)
            ]
            assert ways, f"no remedy in: {error}"
            way = ways[0][0] if isinstance(ways[0], tuple) else ways[0]
            for field, value in way.items():
                setattr(args, field, value)
    trainer_class.refuse_clashes(args)


@pytest.mark.parametrize("family", FAMILIES)
def test_components_of_all_slots_ride_together(family, request, tmp_path):
    fitting = [case.method for case in CASES if case.family == family and case.method in COMPONENTS]
    single = {
        slot: next(n for n in fitting if DECLARATIONS[n].slot == slot)
        for slot in SLOTS
        if SLOTS[slot].single and any(DECLARATIONS[n].slot == slot for n in fitting)
    }
    names = [n for n in fitting if not SLOTS[DECLARATIONS[n].slot].single or n in single.values()]
    results = []
    for order in (names, names[::-1]):
        trainer_class = compose(FAMILIES[family].plain, *order)
        args = active_config(trainer_class, names, tmp_path / order[0], max_steps=2)
        trainer = build(trainer_class, family, model_path(family, request), args)
        trainer.train()
        seen = set().union(*trainer.state.log_history)
        assert {DECLARATIONS[n].signal for n in names} <= seen
        results.append(weights(trainer))
    if not {"soft_overlong"} & set(names):
        for key, value in results[0].items():
            torch.testing.assert_close(value, results[1][key], rtol=0, atol=0)


def test_composed_config_takes_one_default_in_either_order_and_survives_pickle(tmp_path):
    first, second = compose("lp_reg", "dler").config_class, compose("dler", "lp_reg").config_class
    # DLER's, whose config comes first in the alphabet
    assert first(**settings("policy", tmp_path)).epsilon_high == second(**settings("policy", tmp_path)).epsilon_high
    assert first(**settings("policy", tmp_path)).epsilon_high == 0.28
    # A default that only one of them overrides holds in either order
    assert first(**settings("policy", tmp_path)).delta == second(**settings("policy", tmp_path)).delta == 10.0
    args = first(**settings("policy", tmp_path, lp_reg_rho=0.5))
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()
    args = compose("lp_reg", "gain_rl").config_class(**settings("policy", tmp_path, gain_sigma=3))
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()


def test_inheritance_composes_as_compose_does():
    lp_reg, gain_rl = load_trainer("lp_reg"), load_trainer("gain_rl")

    class Mine(lp_reg, load_trainer("dler"), gain_rl):
        pass

    assert [m.name for m in Mine.methods] == ["lp_reg", "dler", "gain_rl"]
    assert Mine.methods == compose("lp_reg", "dler", "gain_rl").methods
    assert Mine.config_class.__name__ == "MineConfig"
    assert {"lp-reg", "dler", "gain-rl"} <= set(Mine._tag_names)
    assert all(m.paper.citation in Mine._paper["citation"] for m in Mine.methods)


def test_a_composed_class_is_composed_again():
    lp_reg, dler, d3s = map(load_trainer, ("lp_reg", "dler", "d3s"))
    both = compose(lp_reg, dler)
    for parts in ((dler, both), (both, dler), (both, compose(dler, d3s)), (d3s, both, lp_reg)):
        again = compose(*parts)
        names = [m.name for m in again.methods]
        assert set(names) == {m.name for part in parts for m in part.methods} and len(set(names)) == len(names)
    with pytest.raises(TypeError, match=r"\['lp_reg', 'dler'\] are parts of several of .* Name each method once"):
        compose(both, compose(dler, lp_reg))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_class_says_of_its_config_does_not_depend_on_the_order(family):
    """Functions of the class follow plain inheritance: nobody may leave `super()` out where another acts."""
    for pair in pairs_of(objectives_of(family), 2):
        if not do_combine(*pair):
            continue
        said = []
        for trainer_class in (compose(*pair), compose(*pair[::-1])):
            fields = dataclasses.fields(trainer_class.config_class)
            args = SimpleNamespace(**{f.name: field_default(f) for f in fields})
            vars(args).update(active(pair, trainer_class))
            functions = {f for found in trainer_class.stages.values() for f in found}
            asked = [f for f in functions if isinstance(inspect.getattr_static(trainer_class, f), classmethod)]
            said.append({f: found_by(getattr(trainer_class, f)(args)) for f in asked})
        assert said[0] == said[1] and said[0], pair


def found_by(answer):
    return sorted(answer) if isinstance(answer, (list, tuple)) else answer


def test_compose_refuses_what_does_not_combine():
    with pytest.raises(TypeError, match="different families"):
        compose("lp_reg", "rpo")
    with pytest.raises(TypeError, match="listed twice"):
        compose("lp_reg", "lp_reg")
    with pytest.raises(TypeError, match="at least one"):
        compose()
    with pytest.raises(TypeError, match="a trainer carries"):
        compose("lion")
    with pytest.raises(TypeError, match="have no method"):
        compose("grpo", "lp_reg")
    with pytest.raises(ValueError, match="Unknown method 'lp_rag'"):
        compose("lp_rag")


@pytest.mark.parametrize("name", combinations())
def test_a_combination_has_the_recipe_and_claim_that_its_name_says(name):
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    together = combinations()[name]
    assert tuple(recipe["methods"]) == together
    arms = load_claim(name).arms.values()
    # All together, and each alone
    assert {together} | {(method,) for method in together} <= {arm.methods for arm in arms}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_methods_use_one_name_for_different_things(family):
    """Methods meet in one class: what is not a stage needs a name that no other method has."""
    owners: dict[str, set[str]] = {}
    for name in objectives_of(family):
        trainer = load_trainer(name)
        base = load(FAMILIES[family].plain)
        attributes = [
            node for node in ast.walk(ast.parse(inspect.getsource(trainer))) if isinstance(node, ast.Attribute)
        ]
        stored = {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and is_self(node.value)}
        hidden = {attribute for attribute in stored if callable(getattr(base, attribute, None))}
        assert not hidden, f"{name} stores values under names of methods: {hidden}"
        for attribute in set(vars(trainer)) | stored:
            if not hasattr(base, attribute) and not attribute.startswith("__"):
                owners.setdefault(attribute, set()).add(name)
    clashes = {attribute: sorted(names) for attribute, names in owners.items() if len(names) > 1}
    assert not clashes, clashes
