import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from papertrl import Lion, LionConfig, compose
from papertrl.core.declaration import Method
from papertrl.core.slots import Component
from papertrl.optimizers.lion import LionOptimizer

from ..harness.table import build, dataset, logged, model_path, settings, weights


@given(
    st.lists(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    st.floats(0, 0.95),
    st.floats(0, 0.99),
    st.floats(0, 0.5),
)
def test_steps_are_the_papers_program(gradients, first, second, decay):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = LionOptimizer([weight], lr=0.1, betas=(first, second), weight_decay=decay)
    theta, momentum = np.array([1.0, -2.0, 0.5]), np.zeros(3)
    for gradient in gradients:
        g = np.array(gradient)
        update = np.sign(first * momentum + (1 - first) * g)
        weight.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        theta = theta - 0.1 * (update + decay * theta)
        momentum = second * momentum + (1 - second) * g
        np.testing.assert_allclose(weight.detach().numpy(), theta, atol=1e-12)


def test_parameters_without_gradient_and_their_state_stay():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = LionOptimizer([weight], lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert weight.tolist() == [1.0, 1.0] and not optimizer.state


@pytest.mark.parametrize("family", ["grpo", "dpo", "sft"])
def test_the_trainer_steps_by_lion(family, request, tmp_path):
    trainer_class = compose(family, Lion)
    args = trainer_class.config_class(**settings(trainer_class.family, tmp_path, max_steps=1))
    trainer = build(trainer_class, trainer_class.family, model_path(trainer_class.family, request), args)
    before = weights(trainer)
    trainer.train()
    moved = torch.cat([(value - before[name]).flatten().abs() for name, value in weights(trainer).items()])
    rate = logged(trainer, "learning_rate")[0]
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], rate), rtol=1e-3, atol=1e-6)


def test_bare_trl_trainers_take_it_through_both_doors(tiny_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    args = SFTConfig(**settings("supervised", tmp_path / "sft"))
    sft = SFTTrainer(
        model,
        args,
        train_dataset=dataset("supervised"),
        optimizer_cls_and_kwargs=Lion().optimizer_cls_and_kwargs(args, model),
    )
    sft.train()
    assert isinstance(sft.optimizer.optimizer, LionOptimizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    args = DPOConfig(**settings("preference", tmp_path / "dpo"))
    data = dataset("preference").select_columns(["prompt", "chosen", "rejected"])
    dpo = DPOTrainer(model, args=args, train_dataset=data, optimizers=(Lion().optimizer(model, args), None))
    dpo.train()
    assert isinstance(dpo.optimizer.optimizer, LionOptimizer)


class OtherOptimizer(Component):
    method = Method("other_optimizer", kind="component", slot="optimizer")
    config_class = type("OtherConfig", (LionConfig.__mro__[1],), {})


def test_the_slot_holds_one(tiny_path, tmp_path):
    trainer_class = compose("sft", Lion)
    args = trainer_class.config_class(**settings("supervised", tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    with pytest.raises(ValueError, match="component 'lion' brings an optimizer, and one is passed too"):
        trainer_class(
            model,
            args,
            train_dataset=dataset("supervised"),
            optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None),
        )
    two = compose("sft", Lion, OtherOptimizer)
    message = r"'lion' and 'other_optimizer' do not combine.*slot 'optimizer'.*lion_beta1=None"
    with pytest.raises(ValueError, match=message):
        two(tiny_path, two.config_class(**settings("supervised", tmp_path)), train_dataset=dataset("supervised"))
