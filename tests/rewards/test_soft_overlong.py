import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

from papertrl import PolicyTrainer, SoftOverlong, compose

from ..harness.table import active_config, build, dataset, digit_parity, logged, model_path, settings


@given(st.integers(2, 40), st.floats(0.05, 1), st.integers(1, 60))
def test_the_punishment_is_the_papers(longest, share, length):
    part = max(1, round(longest * share))
    expected = 0.0
    if length > longest:
        expected = -1.0
    elif length > longest - part:
        expected = (longest - part - length) / part
    (reward,) = SoftOverlong(soft_overlong_max_length=longest, soft_overlong_share=share).reward_funcs()
    assert reward(completion_ids=[[0] * length]) == pytest.approx([expected])


def test_it_is_a_reward_of_its_own_beside_the_users(request, tmp_path):
    trainer_class = compose(PolicyTrainer, SoftOverlong)
    args = active_config(trainer_class, ["soft_overlong"], tmp_path)
    trainer = build(trainer_class, "policy", model_path("policy", request), args)
    assert trainer.reward_func_names == ["digit_parity", "soft_overlong"]
    trainer.train()
    assert min(logged(trainer, "rewards/soft_overlong/mean")) < 0


def test_a_bare_trl_trainer_takes_the_reward(policy_path, tmp_path):
    rewards = [digit_parity, *SoftOverlong(soft_overlong_max_length=8).reward_funcs()]
    args = GRPOConfig(**settings("policy", tmp_path, max_steps=1))
    trainer = GRPOTrainer(policy_path, rewards, args, train_dataset=dataset("policy"))
    trainer.train()
    assert logged(trainer, "rewards/soft_overlong/mean")


def test_without_a_limit_there_is_nothing_to_warn_of():
    with pytest.raises(ValueError, match="`soft_overlong_max_length` must be set"):
        SoftOverlong().reward_funcs()
    with pytest.raises(TypeError, match="takes a config or settings"):
        SoftOverlong(SoftOverlong.config_class(), soft_overlong_share=0.5)
