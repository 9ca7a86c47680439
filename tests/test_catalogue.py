"""One behavior suite over the table of methods and of pairs: a new method adds a row and gets every test."""

import ast
import dataclasses
import doctest
import importlib
import inspect
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
import yaml

import papertrl
from papertrl.core.catalogue import COMBINATIONS, METHODS, class_stem, find, load_trainer, method_table
from papertrl.core.compose import compose
from papertrl.evidence import load_claim

from .suite import (
    ACTIVE,
    LORA,
    PARENTS,
    PLAIN_OF,
    active_config,
    build,
    history,
    methods_of,
    model_path,
    reward_of,
    settings,
    weights,
)

ROOT = Path(__file__).parents[1]
PAIRS = [pair for family in PARENTS for pair in itertools.combinations(methods_of(family), 2)]
# Both replace the stage; the last is how the message says to resolve it
INCOMPATIBLE = {
    ("lite_ppo", "dler"): ("scale", {"dler_advantage_whitening": "none"}),
    ("lite_ppo", "hapo"): ("scale", {"hapo_token_group_average": False}),
    ("dler", "hapo"): ("scale", {"dler_advantage_whitening": "none"}),
    ("oblr_po", "hapo"): ("baseline", {"hapo_token_group_average": False}),
    ("guide_grpo", "scaf_grpo"): ("repair", {"scaf_exempt_ratio": 1.0}),
    ("lite_ppo", "disco"): ("scale", {"disco_score": "none"}),
    ("dler", "disco"): ("scale", {"disco_score": "none"}),
    ("disco", "hapo"): ("scale", {"disco_score": "none"}),
    ("disco", "deepsearch"): ("spread", {"disco_score": "none"}),
    ("constrained_rlhf", "dynamic_reward_weighting"): ("combine_rewards", {"weighting_mode": "none"}),
    ("constrained_rlhf", "two_stage_math"): ("combine_rewards", {"constraint_thresholds": None}),
    ("dynamic_reward_weighting", "two_stage_math"): ("combine_rewards", {"weighting_mode": "none"}),
    ("drift", "rlhf_workflow"): ("pair", {"online_iterations": 0}),
    ("drift", "rso"): ("pair", {"rso_pairing": "none"}),
    ("rlhf_workflow", "rso"): ("pair", {"rso_pairing": "none"}),
    ("drift", "upo"): ("pair", {"upo_pairing": "none"}),
    ("rlhf_workflow", "upo"): ("pair", {"upo_pairing": "none"}),
    ("rso", "upo"): ("pair", {"upo_pairing": "none"}),
    ("irpo", "srpo"): ("pair_losses", {"srpo_alpha": None}),
}


@pytest.mark.parametrize("name", METHODS)
def test_files_stand_where_the_name_says(name):
    family = METHODS[name]
    for place in ("losses", "trainers"):
        assert (ROOT / place / family / f"{name}.py").is_file()
    assert (ROOT / "recipes" / f"{name}.yaml").is_file()
    assert (ROOT / "tests" / family / f"test_{name}.py").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_declaration_is_complete(name):
    trainer = load_trainer(name)
    config = trainer.config_class
    assert trainer.__name__ == class_stem(name) + "Trainer" and config.__name__ == class_stem(name) + "Config"
    assert getattr(papertrl, trainer.__name__) is trainer and getattr(papertrl, config.__name__) is config
    assert trainer.method.name == name and trainer.method.summary and trainer.method.signal
    fields = {f.name for f in dataclasses.fields(config)}
    assert trainer.method.neutral and trainer.method.neutral.keys() <= fields
    for stage, given_up in trainer.method.replaces.items():
        assert stage in trainer.stages and given_up.keys() <= fields
    assert trainer._paper["title"] in trainer._paper["citation"] and trainer._paper["id"] in trainer._paper["citation"]
    assert {"trl", "papertrl"} <= set(trainer._tag_names)
    for own in config.__annotations__:
        assert f"{own} (`" in config.__doc__
    for section in ("Relations:", "Paper:", "Example:"):
        assert section in trainer.__doc__


@pytest.mark.parametrize("name", METHODS)
def test_example_in_the_docstring_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(f"papertrl.trainers.{METHODS[name]}.{name}")
    (example,) = [e for e in doctest.DocTestFinder().find(load_trainer(name), module=module) if e.examples]
    # Those of the policy family name a model of the Hub
    skipped = [e for e in example.examples if doctest.SKIP in e.options]
    assert bool(skipped) == (METHODS[name] == "policy")
    report = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert found.failed == 0, "".join(report)
    assert skipped or found.attempted > 5


def test_catalogue_finds_and_suggests():
    assert find("LP-Reg") == "lp_reg"
    with pytest.raises(ValueError, match="Did you mean 'lp_reg'"):
        find("lp_regg")
    assert all(f"`{name}`" in method_table() for name in METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_neutral_equals_trl(name, request, tmp_path):
    family = METHODS[name]
    parent, parent_config = PARENTS[family]
    ours = load_trainer(name)
    model = model_path(family, request)
    theirs = build(parent, family, model, parent_config(**settings(family, tmp_path / "trl")))
    theirs.train()
    args = ours.config_class.adopt(parent_config(**settings(family, tmp_path / "ours")))
    for field, value in (ours.method.neutral | PLAIN_OF[family]).items():
        setattr(args, field, value)
    trainer = build(ours, family, model, args)
    trainer.train()
    expected = weights(theirs)
    for key, value in weights(trainer).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    for ours_entry, theirs_entry in zip(history(trainer), history(theirs), strict=True):
        assert {k: ours_entry[k] for k in theirs_entry} == pytest.approx(theirs_entry, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_drop_in_for_trl(name, request, tmp_path):
    family = METHODS[name]
    trainer_class = load_trainer(name)
    args = PARENTS[family][1](**settings(family, tmp_path))
    before = dict(args.__dict__)
    trainer = build(trainer_class, family, model_path(family, request), args)
    assert isinstance(trainer.args, trainer_class.config_class) and isinstance(trainer, PARENTS[family][0])
    for f in dataclasses.fields(trainer_class.config_class):
        if f.name not in before:
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            assert getattr(trainer.args, f.name) == default
    assert args.__dict__ == before


@pytest.mark.parametrize("name", METHODS)
def test_mechanism_fires(name, request, tmp_path):
    trainer_class = load_trainer(name)
    family = METHODS[name]
    args = active_config(trainer_class, [name], tmp_path, max_steps=4)
    trainer = build(trainer_class, family, model_path(family, request), args, reward=reward_of(trainer_class))
    trainer.train()
    signal = trainer_class.method.signal
    values = [entry[signal] for entry in trainer.state.log_history if entry.get(signal) is not None]
    assert values and max(values) > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and all(math.isfinite(loss) for loss in losses)


def resumed_equals_uninterrupted(trainer_class, names, request, tmp_path, at, **values):
    family = trainer_class.family
    model = model_path(family, request)
    reward = reward_of(trainer_class)
    run = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2} | values
    whole = build(trainer_class, family, model, active_config(trainer_class, names, tmp_path, **run), reward=reward)
    whole.train()
    # Like a fresh process: nothing of the first trainer is left but the files
    torch.manual_seed(12345)
    args = active_config(trainer_class, names, tmp_path / "again", **run)
    again = build(trainer_class, family, model, args, reward=reward)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    expected = weights(whole)
    for key, value in weights(again).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    steps = [entry for entry in history(whole) if "loss" in entry]
    assert [entry for entry in history(again) if "loss" in entry] == steps


@pytest.mark.parametrize("name", METHODS)
def test_resume_equals_uninterrupted(name, request, tmp_path):
    resumed_equals_uninterrupted(load_trainer(name), [name], request, tmp_path, at=2)


@pytest.mark.parametrize("name", methods_of("policy"))
def test_resume_inside_a_generation_batch(name, request, tmp_path):
    resumed_equals_uninterrupted(
        load_trainer(name), [name], request, tmp_path, at=3, steps_per_generation=4, num_iterations=2
    )


def test_resume_in_a_later_epoch(request, tmp_path):
    # 16 prompts, 8 an optimizer step: the second epoch begins after two steps
    resumed_equals_uninterrupted(load_trainer("d3s"), ["d3s"], request, tmp_path, at=3, per_device_train_batch_size=16)


def test_resume_of_a_combination(request, tmp_path):
    names = ["lp_reg", "d3s", "dler", "gain_rl"]
    resumed_equals_uninterrupted(compose(*map(load_trainer, names)), names, request, tmp_path, at=3)


@pytest.mark.parametrize("name", METHODS)
def test_an_adapter_alone_is_trained(name, request, tmp_path):
    """With PEFT, the base model's weights stay, to the bit, and the mechanism still runs."""
    trainer_class = load_trainer(name)
    family = METHODS[name]
    args = active_config(trainer_class, [name], tmp_path, max_steps=2)
    model = model_path(family, request)
    trainer = build(trainer_class, family, model, args, reward=reward_of(trainer_class), peft_config=LORA)
    before = weights(trainer)
    trainer.train()
    changed = {key for key, value in weights(trainer).items() if not torch.equal(value, before[key])}
    assert changed and all("lora" in key for key in changed)
    assert trainer_class.method.signal in set().union(*trainer.state.log_history)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in INCOMPATIBLE], ids="+".join)
def test_pair_trains(pair, request, tmp_path):
    trainer_class = compose(*map(load_trainer, pair))
    family = trainer_class.family
    args = active_config(trainer_class, list(pair), tmp_path, max_steps=2)
    trainer = build(trainer_class, family, model_path(family, request), args, reward=reward_of(trainer_class))
    trainer.train()
    logged = set().union(*trainer.state.log_history)
    for name in pair:
        assert load_trainer(name).method.signal in logged
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert all(value.isfinite().all() for value in weights(trainer).values())


@pytest.mark.parametrize("pair", sorted(INCOMPATIBLE), ids="+".join)
def test_incompatible_pair_is_refused(pair, request, tmp_path):
    stage, resolution = INCOMPATIBLE[pair]
    trainer_class = compose(*map(load_trainer, pair))
    model = model_path(trainer_class.family, request)
    ((field, value),) = resolution.items()
    message = f"'{pair[0]}' and '{pair[1]}'.*stage '{stage}'.*{field}={value!r}"
    with pytest.raises(ValueError, match=message):
        build(trainer_class, trainer_class.family, model, active_config(trainer_class, list(pair), tmp_path))
    args = active_config(trainer_class, list(pair), tmp_path, **resolution, max_steps=2)
    build(trainer_class, trainer_class.family, model, args).train()


def test_order_of_listing_changes_nothing_but_shared_defaults(request, tmp_path):
    results = []
    for names in (["lp_reg", "d3s", "dler"], ["dler", "d3s", "lp_reg"]):
        trainer_class = compose(*map(load_trainer, names))
        same = {"epsilon_high": 0.3, "beta": 0.0, "delta": None, "epsilon": 0.2}
        args = active_config(trainer_class, names, tmp_path / names[0], **same)
        trainer = build(trainer_class, "policy", model_path("policy", request), args)
        trainer.train()
        results.append(weights(trainer))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=0, atol=0)


def test_composed_config_takes_the_first_default_and_survives_pickle(tmp_path):
    lp_reg, dler = load_trainer("lp_reg"), load_trainer("dler")
    first, second = compose(lp_reg, dler).config_class, compose(dler, lp_reg).config_class
    assert first(**settings("policy", tmp_path)).epsilon_high == 9.0
    assert second(**settings("policy", tmp_path)).epsilon_high == 0.28
    # A default that only one of them overrides holds in either order
    assert first(**settings("policy", tmp_path)).delta == second(**settings("policy", tmp_path)).delta == 10.0
    args = first(**settings("policy", tmp_path, lp_reg_rho=0.5))
    assert pickle.loads(pickle.dumps(args)).to_dict() == args.to_dict()


def test_inheritance_composes_as_compose_does():
    lp_reg, dler = load_trainer("lp_reg"), load_trainer("dler")

    class Mine(lp_reg, dler):
        pass

    assert [m.name for m in Mine.methods] == ["lp_reg", "dler"]
    assert Mine.config_class.__name__ == "MineConfig"
    assert {"lp-reg", "dler"} <= set(Mine._tag_names)
    assert all(t._paper["citation"] in Mine._paper["citation"] for t in (lp_reg, dler))


def test_compose_refuses_what_does_not_combine():
    with pytest.raises(TypeError, match="different families"):
        compose(load_trainer("lp_reg"), load_trainer("rpo"))
    with pytest.raises(TypeError, match="listed twice"):
        compose(load_trainer("lp_reg"), load_trainer("lp_reg"))
    with pytest.raises(TypeError, match="at least one"):
        compose()


@pytest.mark.parametrize("name", METHODS)
def test_resume_refuses_other_methods_and_damage(name, request, tmp_path):
    family = METHODS[name]
    trainer_class = load_trainer(name)
    args = active_config(trainer_class, [name], tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer = build(trainer_class, family, model_path(family, request), args)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    other = next(n for n in METHODS if METHODS[n] == family and n != name) if len(methods_of(family)) > 1 else None
    if other:
        stranger = build(
            load_trainer(other),
            family,
            model_path(family, request),
            active_config(load_trainer(other), [other], tmp_path / "other"),
        )
        with pytest.raises(ValueError, match=rf"written by methods \['{name}'\]"):
            stranger.train(resume_from_checkpoint=str(checkpoint))
    (weights_file,) = checkpoint.glob("*model.safetensors")
    weights_file.write_bytes(weights_file.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ValueError, match="not a folder"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_combination_has_the_recipe_and_claim_that_its_name_says(name):
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    assert tuple(recipe["methods"]) == COMBINATIONS[name]
    arms = load_claim(name).arms.values()
    # All together, and each alone
    assert {COMBINATIONS[name]} | {(method,) for method in COMBINATIONS[name]} <= {arm.methods for arm in arms}


def test_every_method_has_active_settings():
    assert ACTIVE.keys() == METHODS.keys()


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


@pytest.mark.parametrize("family", PARENTS)
def test_no_two_methods_use_one_name_for_different_things(family):
    """Methods meet in one class: what is not a stage needs a name that no other method has."""
    owners: dict[str, set[str]] = {}
    for name in methods_of(family):
        trainer = load_trainer(name)
        base = next(c for c in trainer.__mro__ if c.__module__.endswith(f"{family}.base"))
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
