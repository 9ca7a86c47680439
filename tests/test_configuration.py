"""Configs of methods: earlier names of fields, and fields that meet when configs merge."""

import dataclasses
import itertools
import pickle

import pytest
from trl import GRPOConfig

from papertrl import D3sGRPOConfig, DlerGRPOConfig, LpRegGRPOConfig, PolicyConfig
from papertrl.core.catalogue import load
from papertrl.core.compose import compose
from papertrl.core.configuration import ComponentConfig, field_default, merge_configs, method_config, method_field
from papertrl.core.family import FAMILIES
from papertrl.job.arguments import make_parser

from .harness.table import CASES, OBJECTIVES, build, settings


@method_config
class OneConfig(ComponentConfig):
    """One."""

    shared_rate: float = method_field(1.0, "A rate.", ge=0)


@method_config
class OtherConfig(ComponentConfig):
    """Other."""

    shared_rate: float = method_field(2.0, "Another rate.", ge=0)


def test_an_earlier_name_is_taken_with_a_warning(tmp_path):
    with pytest.warns(UserWarning, match="`truncation_length` is now called `dler_truncation_length`"):
        args = DlerGRPOConfig(**settings("policy", tmp_path), truncation_length=3)
    assert args.dler_truncation_length == args.truncation_length == 3
    assert "truncation_length" not in {f.name for f in dataclasses.fields(args)}


def test_an_earlier_name_is_set_with_a_warning(tmp_path):
    args = DlerGRPOConfig(**settings("policy", tmp_path))
    with pytest.warns(UserWarning, match="`truncation_length` is now called `dler_truncation_length`"):
        args.truncation_length = 5
    assert args.dler_truncation_length == 5 and "truncation_length" not in vars(args)


def test_a_config_changed_after_it_was_made_is_checked_again(tmp_path):
    args = DlerGRPOConfig(**settings("policy", tmp_path))
    args.dler_truncation_length = 0
    with pytest.raises(ValueError, match=r"`dler_truncation_length`.*got 0"):
        DlerGRPOConfig.adopt(args)


def test_an_earlier_name_reaches_composed_configs(tmp_path):
    config = compose("lp_reg", "dler").config_class
    with pytest.warns(UserWarning, match="dler_truncation_length"):
        args = config(**settings("policy", tmp_path), truncation_length=3)
    assert pickle.loads(pickle.dumps(args)).dler_truncation_length == 3


def test_a_field_is_not_given_under_both_names(tmp_path):
    with pytest.raises(ValueError, match="`dler_truncation_length` is given twice"):
        DlerGRPOConfig(**settings("policy", tmp_path), truncation_length=3, dler_truncation_length=4)


def test_what_was_never_a_name_is_none(tmp_path):
    args = LpRegGRPOConfig(**settings("policy", tmp_path))
    with pytest.raises(AttributeError, match="'LpRegGRPOConfig' has no field 'truncation_length'"):
        _ = args.truncation_length
    with pytest.raises(TypeError, match="unexpected keyword"):
        LpRegGRPOConfig(**settings("policy", tmp_path), truncation_length=3)


def test_two_configs_do_not_introduce_one_field():
    with pytest.raises(TypeError, match="`shared_rate` is a field of both `OneConfig` and `OtherConfig`"):
        merge_configs("Both", (PolicyConfig, OneConfig, OtherConfig))
    merged = merge_configs("Single", (PolicyConfig, OneConfig))
    assert {f.name for f in dataclasses.fields(merged)} > {"shared_rate", "fast_rollouts"}


def test_values_of_components_are_checked_in_a_trainers_config(tmp_path):
    config = merge_configs("Single", (PolicyConfig, OneConfig))
    with pytest.raises(ValueError, match="`shared_rate` must be"):
        config(**settings("policy", tmp_path), shared_rate=-1.0)
    with pytest.raises(ValueError, match="`shared_rate` must be"):
        config(**settings("policy", tmp_path), shared_rate="fast")


# --- Defaults that meet ---------------------------------------------------------------------------------------------


def defaults(config):
    return {f.name: field_default(f) for f in dataclasses.fields(config)}


@pytest.mark.parametrize("family", FAMILIES)
def test_no_combination_of_the_catalogue_has_defaults_that_depend_on_the_order(family):
    """Every pair that meets in a field, and all methods at once."""
    plain = load(FAMILIES[family].plain).config_class
    usual = plain.__dataclass_fields__
    parts = {case.method: load(case.method).config_class for case in CASES if case.family == family}
    own = {
        name: {f.name for f in dataclasses.fields(config) if f.name in usual and usual[f.name] is not f}
        for name, config in parts.items()
        if name in OBJECTIVES
    }
    meeting = [pair for pair in itertools.combinations(own, 2) if own[pair[0]] & own[pair[1]]]
    for names in [*meeting, tuple(parts)]:
        first, second = (
            merge_configs("Composed", (*(parts[name] for name in order), plain)) for order in (names, names[::-1])
        )
        assert defaults(first) == defaults(second), names
        assert first.differing_defaults == second.differing_defaults
        helps = [{f.name: f.metadata.get("help") for f in dataclasses.fields(config)} for config in (first, second)]
        assert helps[0] == helps[1]
        for name in names:
            for field in own.get(name, ()):
                values = {defaults(parts[other])[field] for other in names if field in own.get(other, ())}
                decides = min(
                    (parts[other] for other in names if field in own.get(other, ())), key=lambda c: c.__name__
                )
                assert defaults(first)[field] == defaults(decides)[field]
                assert (field in first.differing_defaults) == (len(values) > 1)


@pytest.mark.parametrize("order", itertools.permutations(["lp_reg", "dler", "hapo", "gain_rl"]), ids="+".join)
def test_one_rule_decides_over_defaults_of_several_methods(order):
    found = defaults(compose(*order).config_class)
    # Two say so, one says otherwise; two agree; one has it alone
    assert found["epsilon_high"] == 0.28
    assert found["delta"] == 10.0 and found["beta"] == 5e-4 and found["epsilon"] == 1.0


@pytest.mark.parametrize("order", [("ln_dpo", "irpo"), ("irpo", "ln_dpo")], ids="+".join)
def test_defaults_that_differ_are_told(order, tiny_path, tmp_path, caplog):
    trainer_class = compose(*order)
    help = next(action.help for action in make_parser(trainer_class)._actions if action.dest == "beta")
    assert "1.0 of `IrpoDPOConfig`, 2.0 of `LnDPOConfig`" in help
    trainer = build(
        trainer_class, "preference", tiny_path, trainer_class.config_class(**settings("preference", tmp_path))
    )
    assert trainer.args.beta == 1.0
    assert [r.message for r in caplog.records if "`beta` is 1.0" in r.message and "Set it" in r.message]
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "| `beta` | `1.0` |" in card
    assert "defaults for `beta` differ (`1.0` of `IrpoDPOConfig`, `2.0` of `LnDPOConfig`)" in card


def test_ranges_of_all_methods_are_checked_whatever_the_order(tmp_path):
    for order in (("lp_reg", "dler"), ("dler", "lp_reg")):
        with pytest.raises(ValueError, match="`delta` must be"):
            compose(*order).config_class(**settings("policy", tmp_path), delta=0.5)
        with pytest.raises(ValueError, match="`epsilon_high` must be"):
            compose(*order).config_class(**settings("policy", tmp_path), epsilon_high=-1.0)


# --- Configs of other trainers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "given", "fields", "remedy"),
    [
        (("lp_reg",), ("d3s",), "d3s_sample_ratio_start", r"compose\(LpRegGRPOTrainer, D3sGRPOTrainer\)"),
        (("lp_reg",), ("d3s", "lp_reg"), "d3s_scope", r"compose\(LpRegGRPOTrainer, D3sGRPOTrainer\)"),
        (("grpo",), ("gain_rl",), "gain_sigma", r"compose\(PolicyTrainer, GainRl\)"),
        (
            ("lp_reg", "dler"),
            ("hapo",),
            "hapo_adv_beta",
            r"compose\(LpRegGRPOTrainer, DlerGRPOTrainer, HapoGRPOTrainer",
        ),
        (("dpo",), ("ln_dpo",), "ln_", r"compose\(LnDPOTrainer\)"),
        (("ln_dpo",), ("hypo",), "hypo_kl_coef", r"compose\(LnDPOTrainer, HypoDPOTrainer\)"),
        (("sft",), ("asft",), "asft_", r"compose\(AsftSFTTrainer\)"),
        (("reward",), ("lion", "reward"), "lion_", r"compose\(.*Lion\)"),
    ],
)
def test_settings_of_another_trainer_are_refused(trainer, given, fields, remedy, tmp_path):
    """Whatever their values: their defaults are settings under which a method acts."""
    trainer_class, config = compose(*trainer), compose(*given).config_class
    args = config(**settings(trainer_class.family, tmp_path))
    with pytest.raises(TypeError, match=f"{fields}.*would do nothing in `{trainer_class.__name__}`.*{remedy}"):
        trainer_class.make_config(args, None)


def test_settings_of_all_methods_are_taken_by_their_combination(policy_path, tmp_path):
    trainer_class = compose("lp_reg", "d3s")
    for base in (GRPOConfig, PolicyConfig, LpRegGRPOConfig, D3sGRPOConfig):
        args = trainer_class.make_config(base(**settings("policy", tmp_path)), None)
        assert type(args) is trainer_class.config_class
    trainer = build(trainer_class, "policy", policy_path, trainer_class.config_class(**settings("policy", tmp_path)))
    trainer.train()
    assert {"lp_reg", "d3s"} <= {name.split("/")[0] for name in set().union(*trainer.state.log_history)}
