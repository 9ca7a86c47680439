"""The prompt of a pair is computed once; log-probabilities and gradients stay those of TRL."""

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer

from papertrl.core.catalogue import load_trainer
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import first_batch, loss_and_gradients, make_trainer, of_trl, recorded


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
        {"gradient_checkpointing": True},
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


def test_a_row_without_prompt_takes_the_plain_way(tiny_path, tokenizer, tmp_path):
    theirs, ours = make_pair(tiny_path, tokenizer, tmp_path)
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    mask = torch.ones_like(ids)
    seen = []
    ours.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for completion in (mask, torch.tensor([[0, 1, 1], [0, 1, 1]])):
        found = ours.score_sequences(ours.model, ids, mask, completion)
        logps = theirs.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        expected = logps.gather(-1, ids[:, 1:, None]).squeeze(-1) * completion[:, 1:]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # Packed are the prompt once, and of each completion the token that predicts another
    assert seen == [(2, 3), (1, 3)]


def test_padding_cannot_leak(tiny_path, tokenizer, tmp_path):
    _, ours = make_pair(tiny_path, tokenizer, tmp_path)
    batch = first_batch(ours)
    mask, completion = batch["attention_mask"], batch["completion_mask"]
    assert (mask == 0).any()
    noise = torch.where(mask.bool(), batch["input_ids"], 17)
    one, other = (ours.score_sequences(ours.model, ids, mask, completion) for ids in (batch["input_ids"], noise))
    assert torch.equal(one, other) and (one != 0).any()


@pytest.mark.parametrize("values", [{"bf16": True}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}])
@pytest.mark.parametrize("name", ["rpo", "hypo"])
def test_methods_train_with_sharing(name, values, tiny_path, tokenizer, tmp_path):
    options = {"hypo_kl_coef": 0.1, "hypo_kl_max_new_tokens": 4} if name == "hypo" else {}
    trainer = make_trainer(load_trainer(name), tiny_path, tokenizer, tmp_path, share_prompts=True, **options, **values)
    assert trainer.sharing
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
