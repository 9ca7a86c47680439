import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

from papertrl import LnDPOConfig, LnDPOTrainer
from papertrl.losses.preference.ln_dpo import length_divisor
from papertrl.losses.preference.pair_losses import call_pair_loss

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    pairs,
    recorded,
    weights,
)


@given(lengths=st.lists(st.integers(0, 50), min_size=1), power=st.floats(0, 1))
def test_divisor_is_a_power_of_the_length(lengths, power):
    found = length_divisor(torch.tensor(lengths), power)
    assert found.tolist() == pytest.approx([max(1, n) ** power for n in lengths], rel=1e-5)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_loss_and_gradient_are_the_equation(power, tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(LnDPOTrainer, tiny_path, tokenizer, tmp_path, beta=3.0, ln_dpo_length_norm_power=power)
    batch = first_batch(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)
    record = trainer.statistics(trainer.model, batch)
    total, token_gradients = 0.0, torch.zeros_like(record.per_token_logps)
    margins = []
    for w in range(4):
        rows = []
        for row in (w, w + 4):
            tokens = [t for t, k in enumerate(batch["completion_mask"][row, 1:].tolist()) if k]
            ratio = sum((record.per_token_logps[row, t] - record.ref_per_token_logps[row, t]).item() for t in tokens)
            rows.append((row, tokens, ratio / len(tokens) ** power))
        delta = rows[0][2] - rows[1][2]
        margins.append(3.0 * delta)
        slope = torch.sigmoid(torch.tensor(-3.0 * delta)).item()
        total += -torch.nn.functional.logsigmoid(torch.tensor(3.0 * delta)).item()
        for sign, (row, tokens, _) in zip((-1, 1), rows, strict=True):
            token_gradients[row, tokens] = sign * 3.0 / len(tokens) ** power * slope / 4
    assert loss.item() == pytest.approx(total / 4, rel=1e-5)
    record.per_token_logps.backward(token_gradients)
    torch.testing.assert_close(
        {n: p.grad for n, p in trainer.model.named_parameters()}, gradients, rtol=1e-4, atol=1e-6
    )
    metrics = recorded(trainer)
    assert metrics["rewards/optimized_margins"] == pytest.approx(sum(margins) / 4, rel=1e-4)
    assert metrics["length_norm/divisor"] > 1


@pytest.mark.parametrize("option", [{}, {"ld_alpha": 0.5}, {"f_divergence_type": "js_divergence"}])
def test_is_trl_s_sigmoid_norm_where_prompts_are_not_empty(option, tiny_path, tokenizer, tmp_path):
    parent = make_trainer(
        DPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path,
        config_class=DPOConfig,
        loss_type="sigmoid_norm",
        beta=2.0,
        **option,
    )
    trainer = make_trainer(LnDPOTrainer, tiny_path, tokenizer, tmp_path, **option)
    batch = first_batch(parent)
    torch.testing.assert_close(loss_and_gradients(trainer, batch), loss_and_gradients(parent, batch))


def test_counts_scored_tokens_and_survives_empty_completions(tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(LnDPOTrainer, tiny_path, tokenizer, tmp_path)
    batch = first_batch(trainer)
    # Pair 0 without prompt: its first token is not predicted. Pair 1 without chosen completion.
    batch["completion_mask"][[0, 4]] = batch["attention_mask"][[0, 4]]
    batch["completion_mask"][1] = 0
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())
    record = trainer.statistics(trainer.model, batch)
    chosen, _ = trainer.scores(record)
    scored = batch["attention_mask"][0].sum() - 1
    torch.testing.assert_close(chosen[0], record.logratios[0] / scored)
    assert chosen[1] == 0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "robust", "exo_pair", "discopop"])
def test_normalized_margin_reaches_every_loss_of_the_margin(loss_type, tiny_path, tokenizer, tmp_path):
    smoothing = 0.1 if loss_type in ("robust", "exo_pair") else 0.0
    trainer = make_trainer(
        LnDPOTrainer, tiny_path, tokenizer, tmp_path, loss_type=loss_type, label_smoothing=smoothing, beta=0.5
    )
    batch = first_batch(trainer)
    loss, _ = loss_and_gradients(trainer, batch)
    record = trainer.statistics(trainer.model, batch)
    per_token = record.logratios / batch["completion_mask"].sum(1)
    available = {"margin": per_token[:4] - per_token[4:], "beta": 0.5, "label_smoothing": 0.1, "discopop_tau": 0.05}
    torch.testing.assert_close(loss, call_pair_loss(loss_type, available).mean())


def test_neutral_is_dpo(tiny_path, tokenizer, tmp_path):
    parent = make_trainer(DPOTrainer, tiny_path, tokenizer, tmp_path, config_class=DPOConfig)
    trainer = make_trainer(LnDPOTrainer, tiny_path, tokenizer, tmp_path, **LnDPOTrainer.method.neutral)
    batch = first_batch(parent)
    (parent_loss, parent_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (parent, trainer))
    assert torch.equal(parent_loss, loss)
    assert_same_tensors(parent_gradients, gradients)
    assert recorded(trainer).keys() - recorded(parent).keys() == {"rewards/optimized_margins"}
    parent.train(), trainer.train()
    assert_same_tensors(weights(parent), weights(trainer))


def test_run_logs_the_normalized_margin(tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(
        LnDPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path,
        max_steps=8,
        eval_dataset=pairs(1),
        eval_strategy="steps",
        eval_steps=8,
    )
    trainer.train()
    rows = history(trainer)
    margins = [row["rewards/optimized_margins"] for row in rows if "rewards/optimized_margins" in row]
    assert len(margins) == 8
    assert margins[-1] > margins[0]
    assert all(row["length_norm/divisor"] > 1 for row in rows if "loss" in row)
    assert any("eval_rewards/optimized_margins" in row for row in rows)


@pytest.mark.parametrize(
    "name", ["ipo", "sigmoid_norm", "nca_pair", "bco_pair", "sppo_hard", "aot", "apo_zero", "apo_down"]
)
def test_refuses_losses_that_are_no_function_of_the_margin(name, tmp_path):
    with pytest.raises(ValueError, match=rf"`ln_dpo_length_norm_power=1.0` needs .*'sigmoid'.* got \['{name}'\]"):
        LnDPOConfig(str(tmp_path), loss_type=["sigmoid", name], bf16=False, use_cpu=True)
    config = LnDPOConfig(str(tmp_path), loss_type=[name], ln_dpo_length_norm_power=0.0, bf16=False, use_cpu=True)
    assert config.loss_type == [name]


@pytest.mark.parametrize(
    ("field", "value"), [("ln_dpo_length_norm_power", -0.1), ("ln_dpo_length_norm_power", 1.5), ("beta", 0.0)]
)
def test_refuses_values_out_of_range(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}` must be a number in .*got {value}"):
        LnDPOConfig(str(tmp_path), **{field: value}, bf16=False, use_cpu=True)
