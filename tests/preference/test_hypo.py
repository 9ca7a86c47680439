import itertools
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from trl import DPOConfig, DPOTrainer

from papertrl import HypoDPOConfig, HypoDPOTrainer
from papertrl.losses.preference.hypo import online_kl_weights
from papertrl.samplers.decoding.rollout import warn_of_generate
from papertrl.trainers.preference import hypo, sampling
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    pairs,
    perturbed,
    recorded,
    weights,
)

SHORT = {"hypo_kl_coef": 0.3, "hypo_kl_max_new_tokens": 5, "beta": 0.1}


# --- Weights ----------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(2, 5).flatmap(
        lambda k: st.lists(st.lists(st.floats(-20, 20), min_size=k, max_size=k), min_size=1, max_size=4)
    ),
    clip=st.none() | st.floats(0.1, 10),
)
def test_weights_leave_one_out(rows, clip):
    bounded = [[k if clip is None else max(-clip, min(clip, k)) for k in row] for row in rows]
    log_ratios = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    reinforce = online_kl_weights(log_ratios, "reinforce", clip)
    assert torch.equal(reinforce, torch.tensor(bounded, dtype=torch.float64))
    expected = [[k - sum(row[:i] + row[i + 1 :]) / (len(row) - 1) for i, k in enumerate(row)] for row in bounded]
    rloo = online_kl_weights(log_ratios, "rloo", clip)
    torch.testing.assert_close(rloo, torch.tensor(expected, dtype=torch.float64))
    assert not rloo.requires_grad
    assert not reinforce.requires_grad
    # Samples that agree teach nothing
    assert online_kl_weights(torch.full((2, 3), 7.0)).abs().max() == 0


@pytest.mark.parametrize("estimator", ["rloo", "reinforce"])
def test_surrogate_has_the_gradient_of_the_kl(estimator):
    # The expectation over all pairs of samples, exactly
    logits = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    logps = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logps.exp() * (logps - ref_logps)).sum(), logits, retain_graph=True)
    surrogate = 0.0
    for draw in itertools.product(range(3), repeat=2):
        drawn = logps[list(draw)]
        weight = online_kl_weights((drawn.detach() - ref_logps[list(draw)])[None], estimator)[0]
        surrogate = surrogate + drawn.sum().exp().detach() * (weight * drawn).mean()
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, expected)


# --- Sampling ---------------------------------------------------------------------------------------------------


def sample(model, prompts, seeds, max_new_tokens=4, eos=(2,)):
    mask = torch.ones_like(prompts) if isinstance(prompts, torch.Tensor) else prompts[1]
    ids = prompts if isinstance(prompts, torch.Tensor) else prompts[0]
    return sampling.sample_completions(model, ids, mask, list(seeds), max_new_tokens, 0, list(eos))


def test_samples_follow_the_softmax_whatever_the_generation_config_says(tiny_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path, attention_dropout=0.5).train()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(6)
    misleading = GenerationConfig(do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, pad_token_id=0)
    model.generation_config = misleading
    prompt = torch.tensor([[5, 9, 11]])
    n = 6000
    ids, _, completion_mask = sample(model, prompt.repeat(n, 1), range(n), max_new_tokens=1)
    assert model.training
    assert model.generation_config is misleading
    assert completion_mask.sum(1).eq(1).all()
    probabilities = model.eval()(input_ids=prompt).logits[0, -1].softmax(-1)
    assert probabilities.max() < 0.6
    counts = torch.bincount(ids[:, 3], minlength=len(probabilities))
    likely = probabilities * n > 5
    chi_square = ((counts - n * probabilities)[likely].square() / (n * probabilities[likely])).sum().item()
    degrees = likely.sum().item() - 1
    assert degrees >= 10
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_a_row_s_completion_depends_on_its_seed_alone(tiny_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    ids, mask = torch.tensor([[0, 5, 9], [7, 8, 4], [0, 0, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    before = torch.random.get_rng_state()
    together = sample(model, (ids, mask), [11, 12, 13], max_new_tokens=6)
    torch.manual_seed(5)
    alone = sample(model, (ids[:1, 1:], mask[:1, 1:]), [11], max_new_tokens=6)
    length = alone[1].sum()
    assert torch.equal(together[0][0, :length], alone[0][0, :length])
    assert together[1][0].sum() == length
    torch.random.set_rng_state(before)
    other = sample(model, (ids, mask), [21, 12, 13], max_new_tokens=6)
    assert torch.equal(other[0][1:], together[0][1:])
    assert not torch.equal(other[0][0], together[0][0])
    # Prompts come first, unpadded; the global generator has not moved
    assert together[0][0, :2].tolist() == [5, 9]
    assert together[0][2, :1].tolist() == [6]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("replaced", [False, True])
def test_tokens_are_those_of_generate_also_when_rows_leave(replaced, tiny_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    rows = [[5, 9]] * 3 + [[7, 8, 4]] * 3 + [[6]]
    ids, mask = sampling.left_pad(rows, 0, "cpu")
    ends, seeds = list(range(2, 14)), list(range(50, 57))
    config = GenerationConfig(max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=ends)
    with sampling.plain_generation(model), torch.no_grad():
        expected = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([sampling.KeyedGumbel(seeds, ids.device)]),
        )[:, 3:]
    calls, generate = [], model.generate
    if replaced:
        model.generate = lambda *args, **kwargs: (calls.append(kwargs), generate(*args, **kwargs))[1]
    prefilled = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: prefilled.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    warn_of_generate.cache_clear()
    tokens, _, completion = sample(model, (ids, mask), seeds, max_new_tokens=9, eos=ends)
    lengths = completion.sum(1).tolist()
    assert len(set(lengths)) > 2
    for row, kept, theirs, length in zip(tokens, completion.bool(), expected, lengths, strict=True):
        assert row[kept].tolist() == theirs[:length].tolist()
    assert len(calls) == replaced
    assert ("has its own `generate`" in caplog.text) == replaced
    assert ((7, 3) in prefilled) == replaced and ((3, 3) in prefilled) != replaced


def test_seeds_tell_runs_steps_pairs_and_samples_apart():
    ids = torch.tensor([[5, 6, 7, 0], [5, 6, 8, 0], [5, 6, 9, 0], [5, 6, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    seeds = sampling.sample_seeds(0, 3, ids, mask, 2)
    everything = seeds + sampling.sample_seeds(1, 3, ids, mask, 2) + sampling.sample_seeds(0, 4, ids, mask, 2)
    assert len(seeds) == 4
    assert len(set(everything)) == 12
    # Not on padding or on the other pairs of the micro-batch
    wider = [torch.nn.functional.pad(rows[[1, 3]], (0, 3)) for rows in (ids, mask)]
    assert sampling.sample_seeds(0, 3, *wider, 2) == seeds[2:]


@given(
    prompt_lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    completion_lengths=st.lists(st.integers(0, 4), min_size=4, max_size=4),
)
def test_prompts_are_recovered(prompt_lengths, completion_lengths):
    width = max(1, max(p + c for p, c in zip(prompt_lengths, completion_lengths, strict=False)))
    ids, attention, completion = [], [], []
    for row, (p, c) in enumerate(zip(prompt_lengths, completion_lengths, strict=False)):
        ids.append([10 * (row + 1) + t for t in range(p)] + [99] * c + [0] * (width - p - c))
        attention.append([1] * (p + c) + [0] * (width - p - c))
        completion.append([0] * p + [1] * c + [0] * (width - p - c))
    found, mask, present = sampling.left_padded_prompts(*map(torch.tensor, (ids, attention, completion)), 0)
    for row, p in enumerate(prompt_lengths):
        assert present[row] == (p > 0)
        assert mask[row].tolist() == [0] * (mask.shape[1] - max(1, p)) + [1] * max(1, p)
        if p:
            assert found[row, -p:].tolist() == [10 * (row + 1) + t for t in range(p)]
            assert (found[row, :-p] == 0).all()


def test_completions_end_with_the_first_eos():
    ids = torch.tensor([[5, 2, 7, 2], [5, 6, 7, 8], [3, 2, 0, 0]])
    assert sampling.completions_until_eos(ids, [2, 3]).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


# --- The step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["rloo", "reinforce"])
@pytest.mark.parametrize("lora", [False, True])
def test_loss_and_gradient_are_dpo_plus_surrogate(estimator, lora, tiny_path, tokenizer, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    options = {"peft_config": adapter} if lora else {}
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, beta=0.1, **options)
    trainer = make_trainer(
        HypoDPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path,
        **options,
        **SHORT,
        hypo_kl_estimator=estimator,
        hypo_kl_num_samples=3,
        hypo_kl_clip=0.2,
    )
    batch = first_batch(trainer)
    (base_loss, base_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (base, trainer))
    metrics = recorded(trainer)
    trainer.model.train()
    samples = trainer.sample(batch)["hypo"]
    assert samples.input_ids.shape[0] == 12
    # By plain loops, over logits without any head
    surrogate, ratios = 0.0, []
    for prompt in range(4):
        policy_logps, ref_logps = [], []
        for row in range(3 * prompt, 3 * prompt + 3):
            length = samples.attention_mask[row].sum()
            ids = samples.input_ids[row : row + 1, :length]
            start = int((samples.completion_mask[row] == 0)[:length].sum())
            policy = trainer.model(input_ids=ids).logits.log_softmax(-1)[0]
            if not lora:
                other = trainer.ref_model(input_ids=ids).logits.log_softmax(-1)[0].detach()
            else:
                with trainer.model.disable_adapter(), torch.no_grad():
                    other = trainer.model(input_ids=ids).logits.log_softmax(-1)[0]
            tokens = ids[0].tolist()
            policy_logps.append(sum(policy[t - 1, tokens[t]] for t in range(start, int(length))))
            ref_logps.append(sum(other[t - 1, tokens[t]] for t in range(start, int(length))))
        k = [p.item() - r.item() for p, r in zip(policy_logps, ref_logps, strict=True)]
        ratios += k
        k = [max(-0.2, min(0.2, value)) for value in k]
        for i in range(3):
            weight = k[i] - (sum(k) - k[i]) / 2 if estimator == "rloo" else k[i]
            surrogate = surrogate + weight * policy_logps[i] / 12
    torch.testing.assert_close(loss, base_loss + 0.3 * surrogate.detach(), rtol=1e-4, atol=1e-5)
    trainer.model.zero_grad()
    (0.3 * surrogate).backward()
    expected = {n: base_gradients[n] + p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=2e-5)
    assert any((gradients[n] - base_gradients[n]).abs().max() > 1e-4 for n in gradients)
    mean = sum(ratios) / 12
    assert metrics["online_kl/mean"] == pytest.approx(mean, abs=1e-4)
    assert metrics["online_kl/std"] == pytest.approx(math.sqrt(sum((r - mean) ** 2 for r in ratios) / 12), rel=1e-3)
    assert metrics["online_kl/clip_ratio"] == pytest.approx(sum(abs(r) > 0.2 for r in ratios) / 12)
    assert metrics["completions/mean_length"] == pytest.approx(samples.completion_mask.sum().item() / 12)
    assert metrics["loss/online_kl"] == pytest.approx(surrogate.item(), rel=1e-3, abs=1e-5)
    assert metrics["loss/pair"] == pytest.approx(base_loss.item(), rel=1e-5)


def test_adapter_that_is_sampled_is_the_active_one(tiny_path, tokenizer, tmp_path):
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    trainer = make_trainer(HypoDPOTrainer, tiny_path, tokenizer, tmp_path, peft_config=adapter, **SHORT)
    batch = first_batch(trainer)
    trainer.model.train()
    found = trainer.sample(batch)["hypo"].input_ids
    with trainer.model.disable_adapter():
        without = trainer.sample(batch)["hypo"].input_ids
    merged = trainer.model.merge_and_unload()
    half = [batch[name][:4] for name in ("input_ids", "attention_mask", "completion_mask")]
    ids, mask, _ = sampling.left_padded_prompts(*half, 0)
    seeds = sampling.sample_seeds(trainer.args.seed, 0, batch["input_ids"], batch["attention_mask"], 2)
    expected, *_ = sample(merged, (ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)), seeds, 5)
    assert torch.equal(found, expected)
    assert found.shape != without.shape or not torch.equal(found, without)


def test_pair_without_prompt_has_no_samples(tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(HypoDPOTrainer, tiny_path, tokenizer, tmp_path, **SHORT)
    batch = first_batch(trainer)
    batch["completion_mask"][[0, 4]] = batch["attention_mask"][[0, 4]]
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.isfinite()
    record = trainer.statistics(trainer.model, batch)
    record.samples = trainer.sample(batch)
    term = trainer.extra_terms(trainer.model, record)[-1]
    assert term.mask.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    # No pair with a prompt: a zero that is connected to the graph
    batch["completion_mask"] = batch["attention_mask"].clone()
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients.values())


def counting(monkeypatch):
    calls = []
    original = sampling.sample_completions
    monkeypatch.setattr(hypo, "sample_completions", lambda *args: (calls.append(args), original(*args))[1])
    return calls


def test_neutral_is_dpo_and_generates_nothing(tiny_path, tokenizer, tmp_path, monkeypatch):
    calls = counting(monkeypatch)
    parent = make_trainer(DPOTrainer, tiny_path, tokenizer, tmp_path, config_class=DPOConfig)
    trainer = make_trainer(HypoDPOTrainer, tiny_path, tokenizer, tmp_path, **HypoDPOTrainer.method.neutral)
    batch = first_batch(parent)
    (parent_loss, parent_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (parent, trainer))
    assert torch.equal(parent_loss, loss)
    assert_same_tensors(parent_gradients, gradients)
    assert recorded(trainer).keys() - recorded(parent).keys() == {"rewards/optimized_margins"}
    parent.train(), trainer.train()
    assert_same_tensors(weights(parent), weights(trainer))
    assert not calls


def test_samples_every_few_steps_and_never_in_evaluation(tiny_path, tokenizer, tmp_path, monkeypatch):
    calls = counting(monkeypatch)
    trainer = make_trainer(
        HypoDPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path,
        **SHORT,
        hypo_kl_every=2,
        max_steps=4,
        gradient_accumulation_steps=2,
        eval_dataset=pairs(1),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    # Steps 0 and 2, two micro-batches each
    assert len(calls) == 4
    acting = ["loss/online_kl" in row for row in history(trainer) if "loss" in row]
    assert acting == [True, False, True, False]
    assert not any("eval_loss/online_kl" in row for row in history(trainer))
    # A new step draws anew
    assert calls[0][3] != calls[2][3]


def test_penalty_keeps_the_policy_near_the_reference(tiny_path, tokenizer, tmp_path):
    # Pairs say nothing about prompts' other answers; the divergence is measured on the policy's own samples
    divergence = {}
    dataset = Dataset.from_dict({"prompt": ["1", "2", "3", "4"] * 8, "chosen": ["1"] * 32, "rejected": ["2"] * 32})
    for coef in (0.0, 0.3):
        trainer = make_trainer(
            HypoDPOTrainer,
            tiny_path,
            tokenizer,
            tmp_path,
            AutoModelForCausalLM.from_pretrained(tiny_path),
            dataset=dataset,
            hypo_kl_coef=coef,
            hypo_kl_num_samples=4,
            hypo_kl_max_new_tokens=3,
            beta=0.1,
            max_steps=30,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
        )
        trainer.train()
        rows = history(trainer)
        assert rows[-2]["rewards/accuracies"] == 1
        prompt = torch.tensor([tokenizer.encode("1", add_special_tokens=False)]).repeat(256, 1)
        sequences = sample(trainer.model, prompt, range(256), 3)
        with torch.no_grad():
            logps = [trainer.score_sequences(trainer.model, *sequences, role=r) for r in ("policy", "reference")]
        divergence[coef] = (logps[0] - logps[1]).sum(1).mean().item()
    assert divergence[0.3] < 0.6 * divergence[0.0]


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hypo_kl_num_samples": 1},
            "`hypo_kl_estimator='rloo'` needs `hypo_kl_num_samples` of at least 2, got 1",
        ),
        ({"hypo_kl_num_samples": 0}, "`hypo_kl_num_samples` must be a number in"),
        ({"hypo_kl_coef": -0.1}, r"`hypo_kl_coef` must be a number in .* got -0.1"),
        ({"hypo_kl_clip": 0.0}, "`hypo_kl_clip` must be a number in .* or None, got 0.0"),
        ({"hypo_kl_every": 0}, "`hypo_kl_every` must be"),
        ({"hypo_kl_estimator": "grpo"}, "`hypo_kl_estimator` must be one of 'rloo', 'reinforce', got 'grpo'"),
        ({"truncation_mode": "keep_end"}, "needs `truncation_mode='keep_start'`, got 'keep_end'"),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HypoDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)


def test_one_sample_is_enough_without_baseline(tmp_path):
    config = HypoDPOConfig(
        str(tmp_path), hypo_kl_num_samples=1, hypo_kl_estimator="reinforce", bf16=False, use_cpu=True
    )
    assert config.hypo_kl_num_samples == 1


def test_needs_a_reference_for_the_samples(tiny_path, tokenizer, tmp_path):
    options = {"precompute_ref_log_probs": True, **SHORT}
    with pytest.raises(ValueError, match="`precompute_ref_log_probs=True` does not keep"):
        make_trainer(HypoDPOTrainer, tiny_path, tokenizer, tmp_path, **options)
    kept = make_trainer(
        HypoDPOTrainer, tiny_path, tokenizer, tmp_path, perturbed(tiny_path), perturbed(tiny_path, 2), **options
    )
    kept.train()
    assert history(kept)[0]["completions/mean_length"] > 0
