"""Guided rollouts: each token's law against plain forward passes, rows that leave, importance weights, refusals."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from papertrl import GuideGRPOTrainer, Rlg, RlgConfig, compose
from papertrl.core.catalogue import load_trainer
from papertrl.samplers.decoding.rlg import GuidedRows
from papertrl.samplers.decoding.rollout import sample_rollouts

from ..harness.resuming import SAVING, assert_resumes
from ..harness.rollouts import checksum, distributions, frozen, gradients, make, metric, run, sampled
from ..harness.table import LORA, dataset, every_fourth, history, settings, weights

GUIDED = compose("grpo", Rlg)
TRAINED = {"rlg_train": True, "learning_rate": 2e-2, "per_device_train_batch_size": 8}
# Ragged, one of them with a token that also pads
PROMPTS = [[7, 15, 9, 23], [11], [12, 8, 0, 30, 5]]


def guided_by_hand(base, trained, scale):
    """p_w from two rows of log-probabilities, in float64."""
    mixed = (1 - scale) * base.double() + scale * trained.double()
    return torch.log_softmax(mixed, -1)


@pytest.fixture(scope="module")
def moved(policy_path):
    """The model of the tests, moved away from where it was."""
    model = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("scale", [-0.5, 0.0, 1.6])
def test_rows_are_drawn_from_the_mixture_while_others_leave(scale, policy_path, moved):
    """Prompts are read once, repeated, and finished rows leave: no row's law may depend on it."""
    base = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    torch.manual_seed(0)
    rollouts = sample_rollouts(
        moved,
        PROMPTS,
        [6, 5, 7],
        GenerationConfig(do_sample=True, max_new_tokens=10, top_k=0),
        processors=LogitsProcessorList([GuidedRows(base, scale)]),
    )
    lengths = {len(ids) for ids in rollouts.completion_ids}
    assert len(lengths) > 2
    prompts = [prompt for prompt, count in zip(PROMPTS, (6, 5, 7), strict=True) for _ in range(count)]
    for prompt, ids, logps in zip(prompts, rollouts.completion_ids, rollouts.logprobs, strict=True):
        with torch.no_grad():
            rows = [
                torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1], -1)
                for model in (base, moved)
            ]
        expected = guided_by_hand(*rows, scale).gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1)
        assert logps == pytest.approx(expected.tolist(), abs=2e-4)


def check_law(batch, model, base, scale, temperature=0.9):
    """That the log-probabilities of a batch are those of the guided law at a temperature."""
    rows = [torch.log_softmax(distributions(m, batch), -1) for m in (base, model)]
    mixed = torch.log_softmax(guided_by_hand(*rows, scale) / temperature, -1)
    expected, mask = sampled(mixed.float(), batch), batch["completion_mask"].bool()
    found = batch["sampling_per_token_logps"]
    torch.testing.assert_close(found[mask], expected[mask], atol=5e-4, rtol=1e-3)
    return expected


def test_training_rollouts_are_guided_and_weighted(policy_path, tmp_path):
    trainer = run(GUIDED, policy_path, tmp_path, temperature=0.9, rlg_max_ratio=1.2, **TRAINED)
    base = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    clipped = 0
    for number, (_, batch, model, _) in enumerate(trainer.generations):
        law = check_law(batch, model, base, 1.6)
        mask = batch["completion_mask"].bool()
        old = sampled(distributions(model, batch, 0.9), batch)
        expected = (old - law).exp().clamp(max=1.2)[mask]
        torch.testing.assert_close(batch["importance_sampling_ratio"][mask], expected, atol=1e-3, rtol=1e-3)
        assert (batch["importance_sampling_ratio"][~mask] == 1).all()
        clipped += int((expected == 1.2).sum())
        difference = (old - law)[mask]
        kl = (difference.exp() - difference - 1).mean().item()
        assert metric(trainer, "rlg/kl_trained")[number] == pytest.approx(kl, rel=2e-2, abs=1e-5)
    assert clipped > 0 and metric(trainer, "rlg/kl_trained")[-1] > 1e-3 > metric(trainer, "rlg/kl_trained")[0]
    assert all(not parameter.requires_grad for parameter in trainer.slots[0]._base_model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(trainer.slots[0]._base_model.parameters(), base.parameters(), strict=True)
    )


def test_gradient_is_that_of_the_weighted_loss(policy_path, tmp_path):
    trainer = run(GUIDED, policy_path, tmp_path, num_iterations=2, steps_per_generation=2, max_steps=4, **TRAINED)
    trainer.current_gradient_accumulation_steps = 2
    checked = 0
    for batch, model, _ in list(trainer.micro_batches):
        logps = sampled(distributions(model, batch), batch)
        ratio = (logps - batch["old_per_token_logps"]).exp()
        advantages = batch["advantages"].unsqueeze(1)
        clipped = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        weighted = clipped * batch["importance_sampling_ratio"] * batch["loss_mask"]
        expected = gradients(-weighted.sum() / batch["num_items_in_batch"], model)
        trainer.model.load_state_dict(model.state_dict())
        found = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], rtol=5e-3, atol=5e-6)
        checked += bool((batch["importance_sampling_ratio"] != 1).any())
    assert checked > 1


def test_evaluations_are_guided_and_training_is_not(policy_path, tmp_path):
    options = {"learning_rate": 2e-2, "per_device_train_batch_size": 8, "temperature": 0.9}
    data = dataset("policy").select(range(8))
    plain = run(load_trainer("grpo"), policy_path, tmp_path / "plain", **options)
    trainer = run(GUIDED, policy_path, tmp_path / "guided", eval_data=data, **options)
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(trainer).items())
    assert history(trainer) == history(plain)
    trainer.generations.clear()
    found = trainer.evaluate()
    assert found["eval_rlg/kl_trained"] > 1e-3
    base = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    for _, batch, model, _ in trainer.generations:
        assert "importance_sampling_ratio" not in batch
        check_law(batch, model, base, 1.6)


def test_without_its_adapter_the_model_is_its_own_base(policy_path, tmp_path):
    args = GUIDED.config_class(**settings("policy", tmp_path, **TRAINED))
    trainer = GUIDED(policy_path, checksum, args, train_dataset=dataset("policy"), peft_config=LORA)
    (component,) = trainer.slots.of("decoding")
    assert component._base_model is trainer.model
    trainer.train()
    kl = metric(trainer, "rlg/kl_trained")
    assert kl[0] < 1e-6 < 1e-4 < kl[-1]
    assert all(module.requires_grad for name, module in trainer.model.named_parameters() if "lora" in name)


def test_another_base_model(policy_path, tmp_path, moved, tokenizer):
    folder = tmp_path / "base"
    moved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    trainer = run(
        GUIDED, policy_path, tmp_path, temperature=0.9, rlg_base_model=str(folder), **(TRAINED | {"max_steps": 1})
    )
    (_, batch, model, _) = trainer.generations[0]
    check_law(batch, model, frozen(moved), 1.6)


def test_rows_sampled_under_a_hint_are_weighted_under_it(policy_path, tmp_path):
    trainer_class = compose(GuideGRPOTrainer, Rlg)
    options = TRAINED | {"guide_max_resample_batches": 0, "temperature": 0.9, "rlg_max_ratio": 100.0}
    trainer = run(trainer_class, policy_path, tmp_path, every_fourth, **options)
    base = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    hinted = [(batch, model) for _, batch, model, _ in trainer.generations if "sampled_prompt_ids" in batch]
    assert hinted
    for batch, model in hinted:
        under = {f"prompt_{part}": batch[f"sampled_prompt_{part}"] for part in ("ids", "mask")}
        law = check_law(batch | under, model, base, 1.6)
        old = sampled(distributions(model, batch | under, 0.9), batch)
        mask = batch["completion_mask"].bool()
        torch.testing.assert_close(
            batch["importance_sampling_ratio"][mask], (old - law).exp()[mask], atol=2e-3, rtol=2e-3
        )


def test_off_is_the_family_without_it(policy_path, tmp_path):
    off = run(GUIDED, policy_path, tmp_path / "off", rlg_scale=1.0, rlg_train=True)
    plain = run(load_trainer("grpo"), policy_path, tmp_path / "plain")
    assert list(off.slots) == []
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(off).items())
    assert history(off) == history(plain)


def test_a_killed_run_resumes(policy_path, tmp_path):
    def make_trainer(folder):
        args = GUIDED.config_class(**settings("policy", folder, **(TRAINED | SAVING)))
        return GUIDED(policy_path, checksum, args, train_dataset=dataset("policy"))

    assert_resumes(make_trainer, tmp_path)


# --- Refusals ---------------------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused(policy_path, tmp_path, moved, tokenizer):
    folder = tmp_path / "base"
    moved.save_pretrained(folder)
    other = type(tokenizer).from_pretrained(policy_path)
    other.add_tokens(["<more>"])
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match="`rlg_base_model` must share the trained model's vocabulary"):
        make(GUIDED, policy_path, tmp_path, rlg_base_model=str(folder))


def test_a_model_without_a_name_needs_a_base(policy_path, tmp_path, moved, tokenizer):
    model = frozen(moved)
    model.config._name_or_path = ""
    args = GUIDED.config_class(**settings("policy", tmp_path))
    with pytest.raises(ValueError, match="`rlg_base_model` is missing"):
        GUIDED(model, checksum, args, train_dataset=dataset("policy"), processing_class=tokenizer)


def test_a_model_without_the_rollout_loop_is_refused(policy_path, tmp_path, monkeypatch):
    monkeypatch.setattr("papertrl.trainers.policy.sampling.supported", lambda *_: "of a test")
    with pytest.raises(ValueError, match="`rlg_scale` must be 1 with this model"):
        run(GUIDED, policy_path, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_vllm": True}, "`use_vllm` must be False, got True.*rlg_scale=1"),
        ({"fast_rollouts": False}, "`fast_rollouts` must be True, got False.*rlg_scale=1"),
        ({"rlg_scale": math.inf}, "`rlg_scale` must be a number"),
        ({"rlg_plausibility_alpha": 1.0}, r"`rlg_plausibility_alpha` must be a number in \[0, 1\), got 1.0"),
        ({"rlg_max_ratio": 0.5}, r"`rlg_max_ratio` must be a number in \[1, inf\), got 0.5"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GUIDED.config_class(**settings("policy", tmp_path, **values))


def test_other_families_are_refused():
    with pytest.raises(TypeError, match=r"Components \['rlg'\] do not serve the family supervised"):
        compose("sft", Rlg)
    assert RlgConfig().rlg_scale == 1.6
