import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import SFTConfig, SFTTrainer

from papertrl import AsftSFTTrainer, ImplicitRewardSFTConfig, ImplicitRewardSFTTrainer, compose
from papertrl.losses.supervised.implicit_reward_sft import (
    DIVERGENCES,
    FLOORS,
    sequence_utility,
    utility,
    utility_slope,
)

from ..harness.sums import assert_close, first_batch, history, loss_and_gradients, make, sums, tiny_llama, weights
from .test_asft import LORA, all_logits, drift


def tuned(tokenizer, folder, trainer_class=ImplicitRewardSFTTrainer, **options):
    return make(trainer_class, trainer_class.config_class, tokenizer, folder, **options)


# --- Utilities, from the paper's table in plain numbers --------------------------------------------------------------


def phi(x, divergence):
    x = max(x, FLOORS[divergence])
    return {
        "tv": lambda: x,
        "pearson_chi2": lambda: x - x * x / 4,
        "squared_hellinger": lambda: x / (1 + x),
        "jensen_shannon": lambda: math.log(2 - math.exp(-x)),
        "reverse_kl": lambda: -math.exp(-x - 1),
    }[divergence]()


@given(st.lists(st.floats(-40, 40), min_size=1, max_size=8), st.sampled_from(DIVERGENCES))
def test_utility_is_the_table_s(values, divergence):
    x = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = utility(x, divergence)
    assert found.tolist() == pytest.approx([phi(value, divergence) for value in values], rel=1e-9, abs=1e-12)
    found.sum().backward()
    torch.testing.assert_close(utility_slope(x, divergence), x.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_utilities_are_concave_and_start_as_sft(divergence):
    x = torch.linspace(max(FLOORS[divergence], -4), 4, 200, dtype=torch.float64)
    slope = utility_slope(x, divergence)
    assert (slope.diff() <= 0).all()
    start = utility_slope(torch.zeros(1), divergence).item()
    assert start == pytest.approx(math.exp(-1) if divergence == "reverse_kl" else 1.0)
    numeric = (utility(x + 1e-6, divergence) - utility(x, divergence)) / 1e-6
    torch.testing.assert_close(numeric, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_utility_of_extreme_rewards_is_finite(divergence):
    x = torch.tensor([-1e4, -200.0, -1.0, 0.0, 200.0, 1e4], requires_grad=True)
    found = utility(x, divergence)
    found.sum().backward()
    assert found.isfinite().all() and x.grad.isfinite().all() and utility_slope(x, divergence).isfinite().all()


def test_unknown_divergence():
    with pytest.raises(ValueError, match=r"`divergence` must be one of .*got 'forward_kl'"):
        utility(torch.zeros(2), "forward_kl")


@st.composite
def packed(draw):
    rows, time, examples = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))

    def table(elements):
        return draw(st.lists(st.lists(elements, min_size=time, max_size=time), min_size=rows, max_size=rows))

    return table(st.floats(-2, 2)), table(st.booleans()), table(st.integers(0, examples - 1)), examples


@given(packed(), st.sampled_from(DIVERGENCES))
def test_sequence_utility_has_value_and_gradient_of_the_sums(batch, divergence):
    values, mask, ids, examples = batch
    places = [(r, t) for r in range(len(values)) for t in range(len(values[0])) if mask[r][t]]
    x, direct = (torch.tensor(values, dtype=torch.float64, requires_grad=True) for _ in range(2))
    total = 0.0
    for e in range(examples):
        own = [direct[r, t] for r, t in places if ids[r][t] == e]
        if own:
            total = total + utility(sum(own), divergence)
    found = sequence_utility(x * torch.tensor(mask), torch.tensor(mask), torch.tensor(ids), examples, divergence)
    assert found.detach().sum().item() == pytest.approx(float(torch.as_tensor(total).detach()), rel=1e-9, abs=1e-9)
    assert all(found[r, t] == 0 for r in range(len(values)) for t in range(len(values[0])) if not mask[r][t])
    found.sum().backward()
    if places:
        total.backward()
        torch.testing.assert_close(x.grad, direct.grad)


# --- The loss in the trainer -----------------------------------------------------------------------------------------


def log_ratios(trainer, tokenizer, batch):
    """Per row the labels' log π_θ / π_ref, from full logits."""
    found = []
    for model in (trainer.model, tiny_llama(tokenizer)):
        logps = all_logits(model, batch).log_softmax(-1)
        labels = batch["labels"]
        found.append(
            [
                [logps[row, t, labels[row, t + 1]] for t in range(labels.shape[1] - 1) if labels[row, t + 1] != -100]
                for row in range(labels.shape[0])
            ]
        )
    policy, reference = found
    return [[p - q.detach() for p, q in zip(*rows, strict=True)] for rows in zip(policy, reference, strict=True)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_loss_and_gradient_are_the_formula(divergence, level, tokenizer, tmp_path):
    scaled = divergence != "tv"
    trainer = tuned(
        tokenizer,
        tmp_path,
        implicit_divergence=divergence,
        implicit_divergence_level=level,
        implicit_beta=0.3,
        implicit_scale_by_beta=scaled,
    )
    drift(trainer)
    batch = first_batch(trainer)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    loss, found = loss_and_gradients(trainer, num_items_in_batch=labels)
    logged = {name: float(values[0]) for name, values in trainer._metrics["train"].items()}

    trainer.model.zero_grad()
    rows = [[0.3 * ratio for ratio in row] for row in log_ratios(trainer, tokenizer, batch)]
    rewards = [x for row in rows for x in row] if level == "token" else [sum(row) for row in rows]
    expected = -sum(utility(x, divergence) for x in rewards) / len(rewards) / (0.3 if scaled else 1.0)
    expected.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    assert_close(found, gradients, rtol=2e-3, atol=1e-6)
    values = [float(x.detach()) for x in rewards]
    floor = FLOORS[divergence]
    assert logged["implicit_reward/mean"] == pytest.approx(sum(values) / len(values), rel=1e-3, abs=1e-5)
    assert logged["implicit_reward/clamped_fraction"] == pytest.approx(sum(x < floor for x in values) / len(values))
    slopes = utility_slope(torch.tensor(values), divergence)
    start = utility_slope(torch.zeros(1), divergence)
    assert logged["implicit_reward/slope"] == pytest.approx(slopes.mean().item(), rel=1e-3, abs=1e-5)
    reweighting = (slopes / start - 1).abs().mean().item()
    assert logged["implicit_reward/reweighting"] == pytest.approx(reweighting, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_tv_has_the_gradient_of_sft_times_beta(beta, tokenizer, tmp_path):
    trainer = tuned(tokenizer, tmp_path, implicit_divergence="tv", implicit_scale_by_beta=False, implicit_beta=beta)
    theirs = make(SFTTrainer, SFTConfig, tokenizer, tmp_path)
    for each in (trainer, theirs):
        drift(each)
    _, found = loss_and_gradients(trainer)
    _, gradients = loss_and_gradients(theirs)
    assert_close(found, {n: beta * g for n, g in gradients.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", ["pearson_chi2", "squared_hellinger", "jensen_shannon", "reverse_kl"])
def test_starts_with_the_gradient_of_sft(divergence, tokenizer, tmp_path):
    trainer = tuned(tokenizer, tmp_path, implicit_divergence=divergence, implicit_beta=0.7)
    _, found = loss_and_gradients(trainer)
    _, gradients = loss_and_gradients(make(SFTTrainer, SFTConfig, tokenizer, tmp_path))
    factor = math.exp(-1) if divergence == "reverse_kl" else 1.0
    assert_close(found, {n: factor * g for n, g in gradients.items()}, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_padding_cannot_leak_and_no_labels_is_zero(level, tokenizer, tmp_path):
    trainer = tuned(tokenizer, tmp_path, implicit_divergence_level=level)
    drift(trainer)
    batch = first_batch(trainer)
    padded = batch["attention_mask"] == 0
    assert padded.any()
    clean = trainer.compute_loss(trainer.model, dict(batch))
    spoiled = batch | {"input_ids": batch["input_ids"].masked_fill(padded, 17)}
    assert torch.equal(trainer.compute_loss(trainer.model, spoiled), clean)
    empty = trainer.compute_loss(trainer.model, batch | {"labels": torch.full_like(batch["labels"], -100)})
    empty.backward()
    assert empty.item() == 0.0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in trainer.model.parameters())


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_accumulation_equals_one_batch(level, tokenizer, tmp_path):
    options = {"optim": "sgd", "learning_rate": 0.5, "implicit_divergence_level": level}
    whole = tuned(tokenizer, tmp_path, per_device_train_batch_size=8, **options)
    split = tuned(tokenizer, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    start = weights(whole)
    whole.train()
    split.train()
    assert_close(weights(split), weights(whole), rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(start[n], w, atol=1e-3) for n, w in weights(whole).items())


@pytest.mark.parametrize("options", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_sequences_in_one_row_equal_padded_ones(options, tokenizer, tmp_path):
    fields = {
        "data": sums(4),
        "implicit_divergence_level": "sequence",
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_steps": 2,
    }
    padded = tuned(tokenizer, tmp_path, **fields)
    flat = tuned(tokenizer, tmp_path, **fields, **options)
    padded.train()
    flat.train()
    assert_close(weights(flat), weights(padded), rtol=1e-3, atol=1e-5)
    for name in ("loss", "implicit_reward/mean", "implicit_reward/slope"):
        assert history(flat)[1][name] == pytest.approx(history(padded)[1][name], rel=1e-3, abs=1e-5)


def test_evaluation_is_the_mean_over_its_own_examples(tokenizer, tmp_path):
    trainer = tuned(
        tokenizer,
        tmp_path,
        implicit_divergence_level="sequence",
        trainer_kwargs={"eval_dataset": sums(4)},
        per_device_eval_batch_size=4,
    )
    trainer.train()
    metrics = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    rewards = [0.1 * float(sum(row).detach()) for row in log_ratios(trainer, tokenizer, batch)]
    expected = -sum(phi(x, "pearson_chi2") for x in rewards) / len(rewards) / 0.1
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-3)


def test_with_lora_the_base_model_is_the_reference(tokenizer, tmp_path):
    trainer = tuned(tokenizer, tmp_path, trainer_kwargs={"peft_config": LORA})
    assert trainer.ref_model is None
    trainer.train()
    rewards = [row["implicit_reward/mean"] for row in history(trainer) if "implicit_reward/mean" in row]
    assert rewards[0] == 0.0 and rewards[-1] > 0


def test_neutral_makes_no_reference_pass(tokenizer, tmp_path):
    trainer = tuned(tokenizer, tmp_path, **ImplicitRewardSFTTrainer.method.neutral)
    assert trainer.ref_model is None
    trainer.train()
    assert not any("implicit_reward" in name for row in history(trainer) for name in row)


def test_asft_s_weight_weighs_each_label_of_a_sequence(tokenizer, tmp_path):
    both = compose(ImplicitRewardSFTTrainer, AsftSFTTrainer)
    trainer = tuned(
        tokenizer, tmp_path, both, implicit_divergence_level="sequence", implicit_beta=0.3, asft_anchor_coef=0.0
    )
    drift(trainer)
    batch = first_batch(trainer)
    labels = int((batch["labels"][:, 1:] != -100).sum())
    _, found = loss_and_gradients(trainer, num_items_in_batch=labels)

    trainer.model.zero_grad()
    logps = all_logits(trainer.model, batch).log_softmax(-1)
    total = 0.0
    for row, ratios in enumerate(log_ratios(trainer, tokenizer, batch)):
        slope = 1 - 0.3 * float(sum(ratios).detach()) / 2
        for t in range(logps.shape[1] - 1):
            label = batch["labels"][row, t + 1]
            if label != -100:
                logp = logps[row, t, label]
                total = total - slope * logp.detach().exp() * logp / logps.shape[0]
    total.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert_close(found, gradients, rtol=2e-3, atol=1e-6)


def test_stays_closer_to_the_initial_model_than_sft(tokenizer, tmp_path):
    """On labels that the model could learn by heart, the concave utility stops where SFT goes on."""
    gains = {}
    for divergence in ("tv", "pearson_chi2"):
        trainer = tuned(
            tokenizer,
            tmp_path,
            implicit_divergence=divergence,
            implicit_scale_by_beta=True,
            implicit_divergence_level="sequence",
            implicit_beta=0.5,
            max_steps=60,
        )
        trainer.train()
        gains[divergence] = [row for row in history(trainer) if "implicit_reward/mean" in row][-1]
    assert gains["tv"]["implicit_reward/mean"] > 2.5
    # The utility peaks at 2
    assert 1.0 < gains["pearson_chi2"]["implicit_reward/mean"] < 2.2
    assert gains["pearson_chi2"]["implicit_reward/reweighting"] > 0.5
    assert gains["tv"]["implicit_reward/reweighting"] == 0.0


# --- Config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("implicit_divergence", "forward_kl"),
        ("implicit_divergence_level", "row"),
        ("implicit_beta", 0.0),
        ("implicit_beta", math.nan),
    ],
)
def test_bad_value(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        ImplicitRewardSFTConfig(output_dir=str(tmp_path), use_cpu=True, **{field: value})


def test_refuses_sequences_without_boundaries(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True, "packing": True, "packing_strategy": "wrapped"}
    with pytest.raises(ValueError, match="`implicit_divergence_level='sequence'` needs to know where sequences end"):
        ImplicitRewardSFTConfig(**options, implicit_divergence_level="sequence")
    ImplicitRewardSFTConfig(**options)


def test_beta_depends_on_the_level(tmp_path):
    options = {"output_dir": str(tmp_path), "use_cpu": True}
    assert ImplicitRewardSFTConfig(**options).implicit_reward_beta == 1.0
    assert ImplicitRewardSFTConfig(**options, implicit_divergence_level="sequence").implicit_reward_beta == 0.1
    assert ImplicitRewardSFTConfig(**options, implicit_beta=0.7).implicit_reward_beta == 0.7
    assert ImplicitRewardSFTConfig(**options).learning_rate == 5e-6
