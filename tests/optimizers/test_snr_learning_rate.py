"""The learning rate by the gradient's signal-to-noise ratio: in every family, in bare trainers, resumed, refused."""

import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from papertrl import OblrPoGRPOTrainer, SnrLearningRate, SnrLearningRateConfig, compose
from papertrl.core.catalogue import load_trainer

from ..harness.resuming import SAVING, assert_resumes
from ..harness.rollouts import checksum
from ..harness.table import dataset, history, settings, weights
from ..policy.test_oblr_po import begins_late

SFT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "max_length": 32}
SETTINGS = {"snr_ema": 0.7, "snr_min_multiplier": 0.05}


class Witness(TrainerCallback):
    """Keeps the rate at which each step is made, and that of the schedule."""

    def __init__(self):
        self.rates, self.scheduled, self.found = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.scheduled.append(lr_scheduler.get_last_lr()[0])

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        self.found.append(optimizer.param_groups[0]["lr"])


def recorded(trainer_class):
    """Subclass that keeps, update by update, the gradients of the micro-batches, as far as they are compared."""

    class Recorded(trainer_class):
        def training_step(self, model, *args, **kwargs):
            before = gradient_of(model)
            if not before.any():
                self.updates = [*getattr(self, "updates", []), []]
            loss = super().training_step(model, *args, **kwargs)
            self.updates[-1].append(gradient_of(model) - before)
            return loss

    return Recorded


def gradient_of(model):
    tracked = [p for name, p in model.named_parameters() if re.search(r"layers\.1\.|embed_tokens", name)]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in tracked]
    return torch.cat([part.flatten() for part in parts]).double()


def multipliers_by_hand(updates, ema=0.7, minimum=0.05):
    """The card's rule, from the gradients of the micro-batches of each update of a run."""
    square = noise = 0.0
    found = []
    for rows in updates:
        update, each = sum(rows), len(rows)
        scatter = sum((row - update / each).square().sum() for row in rows) / (each - 1)
        square = ema * square + (1 - ema) * update.square().sum().item()
        noise = ema * noise + (1 - ema) * each * scatter.item()
        signal = max(square - noise, 0.0)
        found.append(max(signal / (signal + noise), minimum))
    return found


def supervised(trainer_class, path, folder, callbacks=(), **values):
    config = getattr(trainer_class, "config_class", SFTConfig)
    args = config(**(settings("supervised", folder, **SFT) | values))
    return trainer_class(path, args=args, train_dataset=dataset("supervised"), callbacks=list(callbacks))


def check_rule(trainer, witness, sizes):
    assert [len(rows) for rows in trainer.updates] == sizes
    expected = multipliers_by_hand(trainer.updates)
    found = [entry["oblr_po/lr_multiplier"] for entry in trainer.state.log_history if "loss" in entry]
    assert found == pytest.approx(expected, rel=1e-3)
    assert min(expected) < 0.9 and len(set(found)) > 1
    rates = [scheduled * multiplier for scheduled, multiplier in zip(witness.scheduled, found, strict=True)]
    assert witness.rates == pytest.approx(rates, rel=1e-6)


def test_rate_of_a_supervised_run(tiny_path, tmp_path):
    witness = Witness()
    trainer_class = recorded(compose("sft", SnrLearningRate))
    trainer = supervised(trainer_class, tiny_path, tmp_path, [witness], max_steps=4, **SETTINGS)
    trainer.train()
    # An epoch of eight micro-batches ends with a smaller update
    check_rule(trainer, witness, [3, 3, 2, 3])


def test_rate_of_a_bare_supervised_trainer(tiny_path, tmp_path):
    witness = Witness()
    callback = SnrLearningRate(**SETTINGS).callback()
    trainer = supervised(recorded(SFTTrainer), tiny_path, tmp_path, [callback, witness], max_steps=4)
    trainer.train()
    check_rule(trainer, witness, [3, 3, 2, 3])
    # As the component does in our trainer
    ours = supervised(compose("sft", SnrLearningRate), tiny_path, tmp_path / "ours", max_steps=4, **SETTINGS)
    ours.train()
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, weights(trainer)[name], rtol=1e-5, atol=1e-7)
    assert callback.component._handles == []


def test_rate_of_a_bare_group_trainer(policy_path, tmp_path):
    witness = Witness()
    callback = SnrLearningRate(**SETTINGS).callback()
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 16, "num_generations": 16}
    args = GRPOConfig(**settings("policy", tmp_path, **options, max_steps=4))
    data = Dataset.from_dict({"prompt": ["1+2="] * 16})
    trainer = recorded(GRPOTrainer)(policy_path, begins_late, args, train_dataset=data, callbacks=[callback, witness])
    trainer.train()
    check_rule(trainer, witness, [4, 4, 4, 4])


def test_schedulers_go_on_from_the_rate_without_the_multiplier(tiny_path, tmp_path):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    for number, (trainer_class, callbacks) in enumerate(
        (
            (compose("sft", SnrLearningRate), []),
            (SFTTrainer, [SnrLearningRate().callback()]),
        )
    ):
        witness = Witness()
        config = getattr(trainer_class, "config_class", SFTConfig)
        args = config(**(settings("supervised", tmp_path / str(number), **SFT) | options))
        data = dataset("supervised")
        trainer = trainer_class(
            tiny_path, args=args, train_dataset=data, eval_dataset=data.select([0, 1]), callbacks=[*callbacks, witness]
        )
        trainer.train()
        assert max(witness.rates) < 1e-3 and witness.found == [1e-3] * 4


@pytest.mark.parametrize("family", ["policy", "supervised"])
def test_off_is_the_family_without_it(family, tiny_path, policy_path, tmp_path):
    results = []
    plain = {"policy": "grpo", "supervised": "sft"}[family]
    for number, trainer_class in enumerate((load_trainer(plain), compose(plain, SnrLearningRate))):
        values = {"snr_lr": False} if number else {}
        args = trainer_class.config_class(**settings(family, tmp_path / str(number), **values))
        rewards = {"reward_funcs": checksum} if family == "policy" else {}
        path = policy_path if family == "policy" else tiny_path
        trainer = trainer_class(path, args=args, train_dataset=dataset(family), **rewards)
        assert list(trainer.slots) == []
        trainer.train()
        results.append((weights(trainer), history(trainer)))
    (expected, logs), (found, other) = results
    assert all(torch.equal(value, found[name]) for name, value in expected.items()) and logs == other


def test_a_method_that_carries_it_equals_the_component_alone(policy_path, tmp_path):
    results = []
    for number, trainer_class in enumerate((OblrPoGRPOTrainer, compose("grpo", SnrLearningRate))):
        values = {"scale_rewards": "group"} if number else {"oblr_weight": "none", "scale_rewards": "group"}
        args = trainer_class.config_class(**settings("policy", tmp_path / str(number), **values))
        trainer = trainer_class(policy_path, checksum, args, train_dataset=dataset("policy"))
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert [method.name for method in OblrPoGRPOTrainer.methods] == ["oblr_po"]


def test_state_survives_a_round_trip(tiny_path, tmp_path):
    trainer = supervised(compose("sft", SnrLearningRate), tiny_path, tmp_path, **SETTINGS)
    trainer.train()
    (component,) = trainer.slots.of("schedule")
    state = component.state_dict()
    other = supervised(compose("sft", SnrLearningRate), tiny_path, tmp_path, **SETTINGS)
    (fresh,) = other.slots.of("schedule")
    assert not torch.equal(fresh.state_dict()["moments"], state["moments"])
    fresh.load_state_dict(state)
    assert torch.equal(fresh.state_dict()["moments"], state["moments"])


def test_a_supervised_run_resumes(tiny_path, tmp_path):
    trainer_class = compose("sft", SnrLearningRate)
    assert_resumes(lambda folder: supervised(trainer_class, tiny_path, folder, **SETTINGS, **SAVING), tmp_path)


@pytest.mark.parametrize("restore", [False, True])
def test_a_bare_run_resumes(restore, tiny_path, tmp_path):
    def make(folder):
        callback = SnrLearningRate(**SETTINGS).callback()
        options = SAVING | {"restore_callback_states_from_checkpoint": restore}
        return supervised(SFTTrainer, tiny_path, folder, [callback], **options)

    # TRL counts the tokens of a resumed run anew
    assert_resumes(make, tmp_path, but="num_tokens")


def test_a_policy_run_resumes(policy_path, tmp_path):
    trainer_class = compose("grpo", SnrLearningRate)

    def make(folder):
        args = trainer_class.config_class(**settings("policy", folder, **SAVING))
        return trainer_class(policy_path, checksum, args, train_dataset=dataset("policy"))

    assert_resumes(make, tmp_path)


def test_one_micro_batch_leaves_the_rate(tiny_path, tmp_path):
    results = []
    callback = SnrLearningRate().callback()
    for number, callbacks in enumerate(([], [callback])):
        trainer = supervised(
            SFTTrainer, tiny_path, tmp_path / str(number), callbacks, gradient_accumulation_steps=1, max_steps=2
        )
        trainer.train()
        results.append(weights(trainer))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"snr_ema": 1.0}, r"`snr_ema` must be a number in \[0, 1\), got 1.0"),
        ({"snr_ema": math.nan}, r"`snr_ema` must be a number in \[0, 1\), got nan"),
        ({"snr_min_multiplier": -0.1}, r"`snr_min_multiplier` must be a number in \[0, 1\], got -0.1"),
        ({"snr_min_multiplier": 1.1}, r"`snr_min_multiplier` must be a number in \[0, 1\], got 1.1"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SnrLearningRateConfig(**values)
    with pytest.raises(ValueError, match=message):
        SnrLearningRate(**values)


def test_a_pattern_without_a_parameter_is_refused(tiny_path, tmp_path):
    message = r"`snr_params` must match the name .* got 'lm_hed'"
    with pytest.raises(ValueError, match=message):
        supervised(compose("sft", SnrLearningRate), tiny_path, tmp_path, snr_params="lm_hed")
    with pytest.raises(ValueError, match=message):
        supervised(SFTTrainer, tiny_path, tmp_path, [SnrLearningRate(snr_params="lm_hed").callback()]).train()


def test_sharded_parameters_are_refused(tiny_path, tmp_path):
    trainer = supervised(compose("sft", SnrLearningRate), tiny_path, tmp_path)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"DeepSpeed and FSDP shard\. Set `snr_lr=False`"):
        SnrLearningRate().attach(trainer)


def test_a_bare_trainer_of_several_processes_is_refused(tiny_path, tmp_path):
    class Args:
        world_size, deepspeed, fsdp = 2, None, None

    callback = SnrLearningRate().callback()
    with pytest.raises(ValueError, match=r"one process, got 2 processes.*compose"):
        callback.on_train_begin(Args, None, None, model=None)
