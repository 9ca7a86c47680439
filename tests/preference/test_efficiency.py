"""The prompt of a pair is computed once; log-probabilities and gradients stay those of TRL."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from papertrl.core.catalogue import load_trainer
from papertrl.trainers.preference.base import PreferenceTrainer
from papertrl.trainers.preference.sharing import pair_inputs
from papertrl.trainers.shared_prefix import add_shared_prefix

from ..harness.pairs import first_batch, loss_and_gradients, make_trainer, of_trl, perturbed, recorded


def make_pair(tiny_path, tokenizer, tmp_path, **options):
    theirs = make_trainer(DPOTrainer, tiny_path, tokenizer, tmp_path / "trl", config_class=DPOConfig, **options)
    ours = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path / "ours", share_prompts=True, **options)
    assert ours.sharing
    return theirs, ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"use_weighting": True},
        {"ld_alpha": 0.5},
        {"max_length": 7},
        {"max_length": 7, "truncation_mode": "keep_end"},
        {"precompute_ref_log_probs": True},
    ],
    ids=lambda o: "+".join(o) or "default",
)
def test_step_equals_trl(options, tiny_path, tokenizer, tmp_path):
    theirs, ours = make_pair(tiny_path, tokenizer, tmp_path, **options)
    batch = first_batch(theirs)
    if options.get("precompute_ref_log_probs"):
        batch |= {key: torch.randn(4) - 5 for key in ("ref_chosen_logps", "ref_rejected_logps")}
    (expected_loss, expected), (loss, found) = (loss_and_gradients(t, dict(batch)) for t in (theirs, ours))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    scale = max(g.abs().max() for g in expected.values())
    assert scale > 1e-3
    for name, value in found.items():
        assert (value - expected[name]).abs().max() <= 1e-5 * scale, name
    assert of_trl(recorded(ours)) == pytest.approx(recorded(theirs), rel=1e-4, abs=1e-5)


def test_each_prompt_runs_once_for_policy_and_reference(tiny_path, tokenizer, tmp_path):
    _, ours = make_pair(tiny_path, tokenizer, tmp_path)
    batch = first_batch(ours)
    tokens = {"policy": 0, "reference": 0}
    for role, model in (("policy", ours.model), ("reference", ours.ref_model)):

        def count(module, args, kwargs, role=role):
            tokens[role] += kwargs["input_ids"].numel()

        model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    loss_and_gradients(ours, batch)
    assert 0 < tokens["policy"] == tokens["reference"] < batch["input_ids"].numel()


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4),
    st.integers(0, 3),
)
def test_layout_there_and_back(pairs, padding):
    """Scores land where TRL has them, whatever the lengths; checked with a score that names its token."""
    rows = [(p, c, i) for i, (p, c, _) in enumerate(pairs)] + [(p, r, i) for i, (p, _, r) in enumerate(pairs)]
    length = max(p + c for p, c, _ in rows) + padding
    ids, mask, completion = (torch.zeros(len(rows), length, dtype=torch.long) for _ in range(3))
    for row, (p, c, i) in enumerate(rows):
        ids[row, :p] = 100 * (i + 1) + torch.arange(p)
        ids[row, p : p + c] = 1000 * (row + 1) + torch.arange(c)
        mask[row, : p + c], completion[row, p : p + c] = 1, 1
    inputs, place = pair_inputs(ids, mask, completion)
    prefix = inputs["shared_prefix"]
    assert len(prefix.input_ids) == len(pairs)
    scores = inputs["input_ids"].float() * prefix.label_mask
    placed = place({"log_probs": scores})["log_probs"]
    assert (placed == (ids * completion)[:, 1:]).all()
    for row, (p, _, i) in enumerate(rows):
        prompt = prefix.input_ids[prefix.index[row]][prefix.attention_mask[prefix.index[row]].bool()]
        assert prompt.tolist() == [100 * (i + 1) + j for j in range(p)]
        positions = prefix.position_ids[prefix.index[row]][-p:]
        assert positions.tolist() == list(range(p)) and inputs["position_ids"][row, 0] == min(p, length - 1)


def test_a_row_without_prompt_takes_the_plain_way():
    ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert pair_inputs(ids, mask, mask)[0] is None


def test_padding_cannot_leak(tiny_path, tokenizer, tmp_path):
    model = perturbed(tiny_path)
    add_shared_prefix(model)
    trainer = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path)
    batch = first_batch(trainer)
    noise = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 17)
    results = []
    for ids in (batch["input_ids"], noise):
        inputs, place = pair_inputs(ids, batch["attention_mask"], batch["completion_mask"])
        results.append(place(model(**inputs).scores)["log_probs"])
    assert torch.equal(*results)


@pytest.mark.parametrize("values", [{"bf16": True}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}])
@pytest.mark.parametrize("name", ["rpo", "hypo"])
def test_methods_train_with_sharing(name, values, tiny_path, tokenizer, tmp_path):
    options = {"hypo_kl_coef": 0.1, "hypo_kl_max_new_tokens": 4} if name == "hypo" else {}
    trainer = make_trainer(load_trainer(name), tiny_path, tokenizer, tmp_path, share_prompts=True, **options, **values)
    assert trainer.sharing
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_gradient_checkpointing_is_logged_as_a_reason(tiny_path, tokenizer, tmp_path, caplog):
    trainer = make_trainer(
        PreferenceTrainer, tiny_path, tokenizer, tmp_path, share_prompts=True, gradient_checkpointing=True
    )
    assert not trainer.sharing and "turns off the cache" in caplog.text
    trainer.train()
