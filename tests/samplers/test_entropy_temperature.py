"""The temperature by entropy: its processor, alone and as a part of HAPO, in real runs; resumed, refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOTrainer

from papertrl import DeepsearchGRPOTrainer, EntropyTemperature, EntropyTemperatureConfig, HapoGRPOTrainer, compose
from papertrl.core.catalogue import load_trainer
from papertrl.job.arguments import make_trainer_class
from papertrl.losses.policy.hapo import entropy_scale, normalized_entropy
from papertrl.samplers.decoding.entropy_temperature import EntropyTemperatureProcessor

from ..harness.resuming import SAVING, assert_resumes
from ..harness.rollouts import checksum, distributions, make, metric, run, sampled
from ..harness.table import dataset, history, settings, weights
from ..policy.test_hapo import entropies_of, h_by_hand, reference_of, tokens_of

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
ALONE = compose("grpo", EntropyTemperature)
# What else HAPO does, off
OTHER_PARTS_OFF = {"hapo_token_group_average": False, "hapo_adv_beta": 0.0, "hapo_clip_alpha": 0.0}


@given(shapes, st.floats(0.3, 2.0), st.floats(0, 0.9))
def test_each_row_is_drawn_at_its_own_temperature(shape, temperature, tau):
    rows, vocab, seed = shape
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, vocab + 1, generator=g, dtype=torch.float64)
    logits[:, 0] = -torch.inf
    scale = entropy_scale(torch.rand(9, generator=g, dtype=torch.float64), 0.7)
    processor = EntropyTemperatureProcessor(scale, tau, temperature)
    found = torch.softmax(processor(None, logits) / temperature, -1)
    for i in range(rows):
        p = torch.softmax(logits[i] / temperature, 0).tolist()
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        h = normalized_entropy(torch.tensor([entropy], dtype=torch.float64), *scale).item()
        expected = torch.softmax(logits[i] / (temperature * (1 + tau * h)), 0)
        torch.testing.assert_close(found[i], expected, atol=1e-6, rtol=1e-5)


def keeping_logps(trainer_class):
    """Subclass that keeps the log-probabilities with which tokens were drawn."""

    class Keeping(trainer_class):
        drawn = ()

        def _generate_single_turn(self, *args, **kwargs):
            ids, logps = super()._generate_single_turn(*args, **kwargs)
            self.drawn = [*self.drawn, logps]
            return ids, logps

    return Keeping


@pytest.mark.parametrize("trainer_class", [ALONE, HapoGRPOTrainer])
def test_tokens_are_drawn_at_the_temperature_of_their_entropy(trainer_class, policy_path, tmp_path):
    options = {"temperature": 0.8, "hapo_temperature_tau": 0.6, "per_device_train_batch_size": 8}
    trainer = run(keeping_logps(trainer_class), policy_path, tmp_path, **options)
    assert len(trainer.generations) == 3
    largest = 0.0
    for number, (_, batch, model, _) in enumerate(trainer.generations):
        raw = distributions(model, batch, 1.0)
        entropies = entropies_of(model, batch, 0.8)
        places = tokens_of(batch)
        hs = [0.0] * len(places)
        if number > 0:
            reference = reference_of(trainer.generations[number - 1], 0.8)
            hs = h_by_hand([entropies[p].item() for p in places], reference, 0.8)
        for (i, t), h in zip(places, hs, strict=True):
            expected = torch.log_softmax(raw[i, t] / (0.8 * (1 + 0.6 * h)), 0)[batch["completion_ids"][i, t]]
            assert trainer.drawn[number][i][t] == pytest.approx(expected.item(), abs=2e-4)
            assert batch["sampling_per_token_logps"][i, t].item() == pytest.approx(expected.item(), abs=2e-4)
            largest = max(largest, abs(h))
    assert largest > 0.5
    low, high = metric(trainer, "hapo/temperature_min"), metric(trainer, "hapo/temperature_max")
    assert len(low) == 2 and all(0.8 * 0.4 - 1e-6 <= a < b <= 0.8 * 1.6 + 1e-6 for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize("trainer_class", [ALONE, HapoGRPOTrainer])
def test_evaluation_samples_at_the_plain_temperature(trainer_class, policy_path, tmp_path):
    trainer = make(keeping_logps(trainer_class), policy_path, tmp_path, hapo_temperature_tau=0.6)
    (component,) = trainer.slots.of("decoding")
    component.scale = torch.tensor([0.0, -1.0, 1.0])
    kept = component.scale.clone()
    trainer.evaluate(dataset("policy").select(range(4)))
    for number, (_, batch, model, _) in enumerate(trainer.generations):
        logps = sampled(distributions(model, batch), batch)
        for i, t in tokens_of(batch):
            assert trainer.drawn[number][i][t] == pytest.approx(logps[i, t].item(), abs=2e-4)
    assert torch.equal(component.scale, kept)


def test_hapo_with_its_other_parts_off_is_the_component_alone(policy_path, tmp_path):
    same = {"epsilon_high": 0.28, "delta": 10.0, "learning_rate": 1e-2}
    hapo = run(HapoGRPOTrainer, policy_path, tmp_path / "hapo", **same, **OTHER_PARTS_OFF)
    alone = run(ALONE, policy_path, tmp_path / "alone", **same)
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(hapo).items())
    assert history(hapo) == history(alone)
    assert [method.name for method in HapoGRPOTrainer.methods] == ["hapo"]


def test_hapo_measures_the_same_with_and_without_the_temperature(policy_path, tmp_path):
    """The first batch is drawn alike: what the tokens' entropies are measured by is the same, whoever does it."""
    scales = []
    for tau in (0.0, 0.5):
        folder = tmp_path / str(tau)
        trainer = run(HapoGRPOTrainer, policy_path, folder, hapo_temperature_tau=tau, max_steps=1)
        batch = trainer.generations[0][1]
        scales.append([batch[f"statistics/hapo/{name}"] for name in ("pivot", "lowest", "highest")])
    for plain, tempered in zip(*scales, strict=True):
        assert torch.equal(plain, tempered)


def test_sampled_by_another_stage_it_acts_all_the_same(policy_path, tmp_path):
    """A method that replaces the stage *roll out* samples with the processors too."""
    trainer_class = compose(DeepsearchGRPOTrainer, EntropyTemperature)
    options = {"tree_width": 4, "tree_max_depth": 4, "per_device_train_batch_size": 8}
    trainer = run(trainer_class, policy_path, tmp_path, **options)
    assert len(metric(trainer, "hapo/temperature_max")) == 2


def test_off_is_the_family_without_it(policy_path, tmp_path):
    off = run(ALONE, policy_path, tmp_path / "off", hapo_temperature_tau=0.0)
    plain = run(load_trainer("grpo"), policy_path, tmp_path / "plain")
    assert list(off.slots) == []
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(off).items())
    assert history(off) == history(plain)


def test_state_survives_a_round_trip(policy_path, tmp_path):
    trainer = run(ALONE, policy_path, tmp_path)
    (component,) = trainer.slots.of("decoding")
    other = make(ALONE, policy_path, tmp_path)
    (fresh,) = other.slots.of("decoding")
    assert fresh.state_dict() == {"scale": None}
    fresh.load_state_dict(component.state_dict())
    assert torch.equal(fresh.scale, component.scale)
    fresh.load_state_dict({"scale": None})
    assert fresh.scale is None


@pytest.mark.parametrize("trainer_class", [ALONE, HapoGRPOTrainer])
def test_a_killed_run_resumes(trainer_class, policy_path, tmp_path):
    def make_trainer(folder):
        args = trainer_class.config_class(**settings("policy", folder, hapo_temperature_tau=0.5, **SAVING))
        return trainer_class(policy_path, checksum, args, train_dataset=dataset("policy"))

    assert_resumes(make_trainer, tmp_path)


def test_the_command_line_names_it():
    trainer_class = make_trainer_class(["grpo", "entropy_temperature"])
    assert trainer_class.components == (EntropyTemperature,) and issubclass(trainer_class, GRPOTrainer)
    assert [method.name for method in trainer_class.methods] == ["entropy_temperature"]


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer_class", [ALONE, HapoGRPOTrainer])
def test_a_model_without_the_rollout_loop_is_refused(trainer_class, policy_path, tmp_path, monkeypatch):
    monkeypatch.setattr("papertrl.trainers.policy.sampling.supported", lambda *_: "of a test")
    with pytest.raises(ValueError, match="`hapo_temperature_tau` must be 0 with this model"):
        run(trainer_class, policy_path, tmp_path)
    assert metric(run(trainer_class, policy_path, tmp_path, hapo_temperature_tau=0.0), "loss")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_vllm": True}, "`use_vllm` must be False, got True.*hapo_temperature_tau=0"),
        ({"fast_rollouts": False}, "`fast_rollouts` must be True, got False.*hapo_temperature_tau=0"),
        (
            {"use_transformers_continuous_batching": True},
            "`use_transformers_continuous_batching` must be False, got True.*hapo_temperature_tau=0",
        ),
    ],
)
def test_other_samplers_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ALONE.config_class(**settings("policy", tmp_path, **values))
    ALONE.config_class(**settings("policy", tmp_path, hapo_temperature_tau=0.0, **values))


@pytest.mark.parametrize("plain", ["dpo", "sft"])
def test_other_families_are_refused(plain):
    with pytest.raises(TypeError, match=r"Components \['entropy_temperature'\] do not serve the family"):
        compose(plain, EntropyTemperature)


def test_a_rollout_function_is_refused(policy_path, tmp_path):
    args = ALONE.config_class(**settings("policy", tmp_path))
    with pytest.raises(ValueError, match=r"`rollout_func` samples by itself.*hapo_temperature_tau=0"):
        ALONE(policy_path, checksum, args, train_dataset=dataset("policy"), rollout_func=lambda prompts, trainer: {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hapo_entropy_quantile": 1.1}, r"`hapo_entropy_quantile` must be a number in \[0, 1\], got 1.1"),
        ({"hapo_temperature_tau": 1.0}, r"`hapo_temperature_tau` must be a number in \[0, 1\), got 1.0"),
        ({"hapo_temperature_tau": math.nan}, r"`hapo_temperature_tau` must be a number in \[0, 1\), got nan"),
        ({"hapo_sign": "none"}, "`hapo_sign` must be one of 'signed', 'released', got 'none'"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        EntropyTemperatureConfig(**values)
