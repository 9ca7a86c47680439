"""Configs of methods: earlier names of fields, and fields that meet when configs merge."""

import dataclasses
import pickle

import pytest

from papertrl import DlerGRPOConfig, LpRegGRPOConfig, PolicyConfig
from papertrl.core.compose import compose
from papertrl.core.configuration import ComponentConfig, merge_configs, method_config, method_field

from .harness.table import settings


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
