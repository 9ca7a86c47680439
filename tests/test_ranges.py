"""Accepted values of the fields that come from TRL: refused early, by name, whoever makes the config."""

import dataclasses
import math

import pytest
from trl import DPOConfig, GRPOConfig, ModelConfig, RewardConfig, SFTConfig

from papertrl import LpRegGRPOConfig, PolicyConfig, PreferenceConfig, RewardModelConfig, SupervisedConfig
from papertrl.core.ranges import RANGES, check_ranges

POLICY = {"per_device_train_batch_size": 8, "bf16": False, "report_to": "none"}


@pytest.mark.parametrize(
    "field, value",
    [
        ("learning_rate", -1e-6),
        ("learning_rate", math.nan),
        ("learning_rate", "fast"),
        ("weight_decay", math.inf),
        ("warmup_steps", -3),
        ("adam_beta2", 1.0),
        ("adam_epsilon", -1e-8),
        ("max_grad_norm", -1.0),
        ("max_steps", 0),
        ("max_steps", -7),
        ("max_steps", 1e26),
        ("max_steps", 10**26),
        ("max_steps", 2.5),
        ("num_train_epochs", 0),
        ("num_train_epochs", math.inf),
        ("save_steps", 0),
        ("save_steps", -10),
        ("logging_steps", math.nan),
        ("eval_steps", -1),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", -8),
        ("gradient_accumulation_steps", 0),
        ("save_total_limit", -1),
        ("seed", -1),
        ("seed", 2**40),
        ("seed", True),
        ("dataloader_num_workers", -1),
        ("temperature", 0.0),
        ("temperature", -1),
        ("top_p", 3),
        ("top_p", 0),
        ("top_k", -5),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("num_generations", 1),
        ("num_iterations", 0),
        ("max_completion_length", 0),
        ("beta", -0.04),
        ("epsilon", -1),
        ("epsilon_high", -0.1),
        ("delta", 0),
        ("steps_per_generation", 0),
        ("reward_weights", [1.0, math.nan]),
        ("entropy_coef", math.inf),
        ("loss_type", "dapoo"),
        ("scale_rewards", "groups"),
        ("top_entropy_quantile", 20),
        ("vllm_gpu_memory_utilization", 1.5),
    ],
)
def test_policy_fields_out_of_range(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"^`{field}` must be .*got "):
        LpRegGRPOConfig(str(tmp_path), **{**POLICY, field: value})
    # As set on a config of TRL, which takes it
    given = GRPOConfig(str(tmp_path), **POLICY)
    setattr(given, field, value)
    with pytest.raises(ValueError, match=f"`{field}` must be .*got "):
        LpRegGRPOConfig.adopt(given)


@pytest.mark.parametrize(
    "config, field, value",
    [
        (PreferenceConfig, "beta", -0.1),
        (PreferenceConfig, "label_smoothing", 1.0),
        (PreferenceConfig, "ld_alpha", 2),
        (PreferenceConfig, "max_length", 0),
        (PreferenceConfig, "loss_weights", [math.inf]),
        (SupervisedConfig, "max_length", -1),
        (SupervisedConfig, "neftune_noise_alpha", -5),
        (RewardModelConfig, "center_rewards_coefficient", -0.01),
        (RewardModelConfig, "max_length", 0),
    ],
)
def test_fields_of_other_families(config, field, value, tmp_path):
    with pytest.raises(ValueError, match=f"^`{field}` must be .*got "):
        config(str(tmp_path), bf16=False, **{field: value})


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": -1, "num_train_epochs": 0.5},
        {"max_steps": 3, "num_train_epochs": 0},
        {"top_k": -1},
        {"top_k": 0, "min_p": 0.0},
        {"epsilon_high": math.inf, "delta": None, "max_grad_norm": 0.0},
        {"max_grad_norm": math.inf, "beta": 0, "learning_rate": 0},
        {"save_steps": 0.25, "logging_steps": 0.1, "warmup_steps": 0.05},
        {"save_strategy": "no", "save_steps": 0, "logging_strategy": "no", "logging_steps": 0},
        {"scale_rewards": False},
        {"max_completion_length": None, "save_total_limit": 0, "data_seed": None},
        {"seed": 2**32 - 1},
    ],
)
def test_what_trl_takes_is_taken(settings, tmp_path):
    config = PolicyConfig(str(tmp_path), **{**POLICY, **settings})
    theirs = GRPOConfig(str(tmp_path), **{**POLICY, **settings})
    assert all(getattr(config, name) == getattr(theirs, name) for name in settings)


@pytest.mark.parametrize("settings", [{"lora_r": 0}, {"lora_dropout": 1.0}, {"lora_alpha": -2}])
def test_adapters(settings):
    with pytest.raises(ValueError, match=rf"`{next(iter(settings))}` must be .*got "):
        check_ranges(ModelConfig(**settings))


def test_every_range_is_of_a_field_and_takes_its_default():
    classes = {cls.__name__: cls for cls in (GRPOConfig, DPOConfig, SFTConfig, RewardConfig, ModelConfig)}
    classes["TrainingArguments"] = GRPOConfig.__mro__[-2]
    assert classes["TrainingArguments"].__name__ == "TrainingArguments" and RANGES.keys() == classes.keys()
    for name, ranges in RANGES.items():
        known = {f.name: f for f in dataclasses.fields(classes[name])}
        for field, valid in ranges.items():
            assert valid.accepts(known[field].default), (name, field)
