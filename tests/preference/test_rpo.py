from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

from papertrl import RpoDPOConfig, RpoDPOTrainer
from papertrl.losses.preference.rpo import sequence_nll
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    recorded,
    warmed,
    weights,
)


@st.composite
def token_batches(draw):
    rows, time = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    values = draw(st.lists(st.lists(st.floats(-5, 0), min_size=time, max_size=time), min_size=rows, max_size=rows))
    mask = draw(st.lists(st.lists(st.integers(0, 1), min_size=time, max_size=time), min_size=rows, max_size=rows))
    return values, mask


@given(batch=token_batches(), per_token=st.booleans())
def test_nll_is_the_sum_or_mean_over_tokens(batch, per_token):
    values, mask = batch
    expected = []
    for row, keep in zip(values, mask, strict=True):
        tokens = [-v for v, k in zip(row, keep, strict=True) if k]
        expected.append(sum(tokens) / (len(tokens) if per_token and tokens else 1))
    tensor, mask = torch.tensor(values, dtype=torch.float64, requires_grad=True), torch.tensor(mask)
    found = sequence_nll(tensor, mask, per_token)
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    counts = mask.sum(1, keepdim=True).clamp(min=1) if per_token else 1
    torch.testing.assert_close(tensor.grad, -mask.double() / counts)


def imitation(record, aggregation):
    """The term by plain loops over the chosen rows."""
    mask = record.shift_completion_mask
    rows = [
        [-record.per_token_logps[i, t] for t in range(mask.shape[1]) if mask[i, t]] for i in range(mask.shape[0] // 2)
    ]
    if aggregation == "cumulative":
        return sum(sum(row) for row in rows) / len(rows)
    if aggregation == "sequence_mean":
        return sum(sum(row) / max(1, len(row)) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / max(1, sum(map(len, rows)))


AGGREGATIONS = {"cumulative": 0.5 * 0.3, "sequence_mean": 0.7, "token_mean": 0.7}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("option", [{}, {"ld_alpha": 0.3, "use_weighting": True}, {"f_divergence_type": "forward_kl"}])
@pytest.mark.parametrize("empty", [False, True])
def test_loss_and_gradient_are_dpo_plus_imitation(aggregation, option, empty, tiny_path, tokenizer, tmp_path):
    options = {"beta": 0.3, **option}
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, **options)
    trainer = make_trainer(
        RpoDPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path,
        rpo_aggregation=aggregation,
        rpo_eta=0.5,
        rpo_coef=0.7,
        **options,
    )
    batch = first_batch(trainer)
    if empty:
        batch["completion_mask"][:4] = 0
    (base_loss, base_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (base, trainer))
    record = trainer.statistics(trainer.model, batch)
    term = AGGREGATIONS[aggregation] * imitation(record, aggregation)
    torch.testing.assert_close(loss, base_loss + term)
    assert all(g.isfinite().all() for g in gradients.values())
    metrics = recorded(trainer)
    assert metrics["loss/pair"] == pytest.approx(base_loss.item(), rel=1e-5)
    if empty:
        assert_same_tensors(gradients, base_gradients)
        assert metrics["loss/rpo_nll"] == 0
        return
    assert metrics["loss/rpo_nll"] == pytest.approx(term.item() / AGGREGATIONS[aggregation], rel=1e-4)
    term.backward()
    torch.testing.assert_close(
        {n: base_gradients[n] + p.grad for n, p in trainer.model.named_parameters()}, gradients, rtol=1e-4, atol=1e-6
    )


def test_token_mean_on_one_process_is_trl_s_sft_loss(tiny_path, tokenizer, tmp_path):
    parent = make_trainer(
        DPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path,
        config_class=DPOConfig,
        beta=0.01,
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.2],
    )
    trainer = make_trainer(RpoDPOTrainer, tiny_path, tokenizer, tmp_path, rpo_aggregation="token_mean")
    batch = first_batch(parent)
    torch.testing.assert_close(loss_and_gradients(trainer, batch), loss_and_gradients(parent, batch))


def test_neutral_is_dpo(tiny_path, tokenizer, tmp_path):
    parent = make_trainer(DPOTrainer, tiny_path, tokenizer, tmp_path, config_class=DPOConfig)
    trainer = make_trainer(RpoDPOTrainer, tiny_path, tokenizer, tmp_path, **RpoDPOTrainer.method.neutral)
    batch = first_batch(parent)
    (parent_loss, parent_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (parent, trainer))
    assert torch.equal(parent_loss, loss)
    assert_same_tensors(parent_gradients, gradients)
    assert recorded(trainer).keys() - recorded(parent).keys() == {"rewards/optimized_margins"}
    parent.train(), trainer.train()
    assert_same_tensors(weights(parent), weights(trainer))


def test_keeps_the_chosen_completion_likely_where_dpo_does_not(tiny_path, tokenizer, tmp_path):
    # Chosen and rejected share all tokens but one
    chosen = ["1234567", "2345671", "3456712", "4567123"]
    rejected = ["1234867", "2348671", "3486712", "4867123"]
    dataset = Dataset.from_dict({"prompt": ["1", "2", "3", "4"] * 8, "chosen": chosen * 8, "rejected": rejected * 8})
    start = warmed(tiny_path, tokenizer, [p + c for p, c in zip("1234" * 2, chosen + rejected, strict=True)])
    logps = {}
    for eta in (0.0, 0.5):
        trainer = make_trainer(
            RpoDPOTrainer,
            tiny_path,
            tokenizer,
            tmp_path,
            deepcopy(start),
            deepcopy(start),
            dataset=dataset,
            beta=0.1,
            rpo_eta=eta,
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
        )
        trainer.train()
        logps[eta] = [row["logps/chosen"] for row in history(trainer) if "logps/chosen" in row]
        margins = [row["rewards/margins"] for row in history(trainer) if "rewards/margins" in row]
        assert margins[-1] > margins[0] + 0.2
    assert logps[0.0][-1] < logps[0.0][0] - 3
    assert logps[0.5][-1] >= logps[0.5][0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("rpo_eta", -1.0), ("rpo_coef", -0.5), ("rpo_coef", float("nan")), ("rpo_aggregation", "mean"), ("beta", 0.0)],
)
def test_refuses_values_out_of_range(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        RpoDPOConfig(str(tmp_path), **{field: value}, bf16=False, use_cpu=True)
