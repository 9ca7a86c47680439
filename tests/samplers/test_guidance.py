"""Guidance: exact against brute force, each end equal to its model, adapters, padding, refusals."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LogitsProcessorList

from papertrl.samplers.decoding.guidance import (
    GuidanceLogitsProcessor,
    Voice,
    draw_token,
    guided_logprobs,
    guided_tokens,
    kl_divergence,
)

PROMPT = [7, 15, 9, 23]


def brute_force(base, trained, scale, alpha=0.0):
    """Plain-loop oracle: product of powers, renormalised, over tokens possible in both."""
    p, q = (np.exp(np.asarray(row, dtype=np.float64) - np.max(row)) for row in (base, trained))
    p, q = p / p.sum(), q / q.sum()
    weights = []
    for a, b in zip(p, q, strict=True):
        kept = a > 0 and b > 0 and b >= alpha * q.max()
        weights.append(a ** (1 - scale) * b**scale if kept else 0.0)
    return np.array(weights) / sum(weights)


@pytest.fixture(scope="module")
def pair(policy_path):
    """A base model and one moved away from it."""
    base, trained = (AutoModelForCausalLM.from_pretrained(policy_path).eval() for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return base, trained


@pytest.fixture(scope="module")
def adapted(policy_path):
    """A LoRA model whose adapter does something."""
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(policy_path), config).eval()


def greedy(model, prompt=PROMPT, count=12, **kwargs):
    inputs = torch.tensor([prompt])
    output = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=count, **kwargs
    )
    ends = model.generation_config.eos_token_id
    return [token for token in output[0, len(prompt) :].tolist() if token not in ends]


def stream(base, trained, scale, count=12, **kwargs):
    model = (base or trained).model
    tokens = guided_tokens(
        base,
        trained,
        PROMPT,
        scale,
        max_new_tokens=count,
        eos_token_ids=model.generation_config.eos_token_id,
        **kwargs,
    )
    return [step.token for step in tokens]


@given(
    st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=2, max_size=7),
    st.floats(-1, 3),
    st.sampled_from([0.0, 0.01, 0.3]),
)
def test_equals_brute_force(rows, scale, alpha):
    base, trained = map(list, zip(*rows, strict=True))
    expected = brute_force(base, trained, scale, 0.0 if scale in (0, 1) else alpha)
    actual = guided_logprobs(torch.tensor(base), torch.tensor(trained), scale, alpha).exp().numpy()
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.floats(-2, 2)), min_size=2, max_size=6),
    st.floats(0.3, 3),
    st.floats(-1, 3),
)
def test_is_the_optimum_of_the_rescaled_penalty(rows, beta, scale):
    base, rewards = (torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True))
    trained = base.log_softmax(-1) + rewards / beta
    expected = (base.log_softmax(-1) + scale * rewards / beta).softmax(-1)
    torch.testing.assert_close(guided_logprobs(base, trained, scale).exp(), expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("scale", [-0.5, 0.5, 1.6, 3.0])
def test_excluded_tokens_stay_excluded(scale):
    base = torch.tensor([0.0, -torch.inf, 1.0, 0.5])
    trained = torch.tensor([1.0, 2.0, -torch.inf, 0.0])
    mixed = guided_logprobs(base, trained, scale)
    assert mixed[1] == mixed[2] == -torch.inf
    assert mixed.exp().sum() == pytest.approx(1, abs=1e-5)


def test_no_token_in_common_falls_back_to_the_trained_model():
    base = torch.tensor([0.0, -torch.inf])
    trained = torch.tensor([-torch.inf, 0.0])
    assert guided_logprobs(base, trained, 1.6).exp().tolist() == [0, 1]


def test_padded_vocabulary_is_cropped():
    base, trained = torch.randn(2, 5), torch.randn(2, 8)
    torch.testing.assert_close(guided_logprobs(base, trained, 1.6), guided_logprobs(base, trained[:, :5], 1.6))


def test_kl_against_a_loop():
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.5, 0.25]])
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(0.5 * np.log(2))


@pytest.mark.parametrize("scale, alpha, name", [(float("nan"), 0, "scale"), (2.0, 1.0, "plausibility_alpha")])
def test_refuses_settings(pair, scale, alpha, name):
    with pytest.raises(ValueError, match=name):
        guided_logprobs(torch.zeros(2), torch.zeros(2), scale, alpha)
    with pytest.raises(ValueError, match=name):
        GuidanceLogitsProcessor(pair[0], scale, plausibility_alpha=alpha)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_each_end_is_its_model(pair, scale):
    base, trained = pair
    expected = greedy(trained if scale else base)
    assert greedy(trained) != greedy(base)
    assert stream(Voice(base), Voice(trained), scale, temperature=0) == expected
    processor = LogitsProcessorList([GuidanceLogitsProcessor(base, scale)])
    assert greedy(trained, logits_processor=processor) == expected


@pytest.mark.parametrize("scale", [0.5, 1.6])
def test_decoding_follows_the_mixture_without_a_cache(pair, scale):
    base, trained = pair
    sequence, ends = list(PROMPT), trained.generation_config.eos_token_id
    with torch.no_grad():
        for _ in range(12):
            rows = [model(torch.tensor([sequence])).logits[0, -1].numpy() for model in pair]
            token = int(brute_force(*rows, scale).argmax())
            if token in ends:
                break
            sequence.append(token)
    expected = sequence[len(PROMPT) :]
    assert stream(Voice(base), Voice(trained), scale, temperature=0) == expected
    processor = LogitsProcessorList([GuidanceLogitsProcessor(base, scale)])
    assert greedy(trained, logits_processor=processor) == expected


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1.6])
def test_adapter_on_and_off_equals_two_models(policy_path, adapted, scale):
    base = AutoModelForCausalLM.from_pretrained(policy_path).eval()
    shared = stream(Voice(adapted, without_adapter=True), Voice(adapted), scale, temperature=0)
    apart = stream(Voice(base), Voice(adapted), scale, temperature=0)
    assert shared == apart
    processor = LogitsProcessorList([GuidanceLogitsProcessor(adapted, scale)])
    ends = adapted.generation_config.eos_token_id
    inputs = torch.tensor([PROMPT])
    output = adapted.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=12,
        logits_processor=processor,
    )
    assert [token for token in output[0, len(PROMPT) :].tolist() if token not in ends] == apart


def test_padding_does_not_leak(pair):
    base, trained = pair
    pad = trained.config.pad_token_id
    short = greedy(trained, logits_processor=LogitsProcessorList([GuidanceLogitsProcessor(base, 1.6)]))
    inputs = torch.tensor([[pad, pad, *PROMPT], [5, 30, 11, 8, 40, 12]])
    mask = (inputs != pad).long()
    output = trained.generate(
        inputs,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=12,
        logits_processor=LogitsProcessorList([GuidanceLogitsProcessor(base, 1.6, mask)]),
    )
    ends = [*trained.generation_config.eos_token_id, pad]
    assert [token for token in output[0, inputs.shape[1] :].tolist() if token not in ends] == short


def test_refuses_beams_and_reuse(pair):
    base, trained = pair
    processor = GuidanceLogitsProcessor(base, 1.6)
    greedy(trained, logits_processor=LogitsProcessorList([processor]))
    with pytest.raises(ValueError, match="num_beams"):
        greedy(trained, prompt=[9, 9, 9], logits_processor=LogitsProcessorList([processor]))


def test_streams_interleave_on_one_network(adapted):
    """Two streams over one network, token by token in turn, are those of each alone."""
    voices = Voice(adapted, without_adapter=True), Voice(adapted)
    alone = [stream(*voices, scale, temperature=1.0, seed=3) for scale in (0, 1)]
    ends = adapted.generation_config.eos_token_id
    streams = [
        guided_tokens(*voices, PROMPT, scale, max_new_tokens=12, eos_token_ids=ends, temperature=1.0, seed=3)
        for scale in (0, 1)
    ]
    together = [[], []]
    for _ in range(12):
        for tokens, each in zip(together, streams, strict=True):
            tokens += [step.token for step in [next(each, None)] if step is not None]
    assert together == alone


def test_divergences_vanish_at_each_end_of_the_mixture(pair):
    base, trained = map(Voice, pair)
    near = {w: next(guided_tokens(base, trained, PROMPT, w, max_new_tokens=1)) for w in (1e-3, 1 - 1e-3)}
    assert near[1e-3].kl_base < 1e-4 < near[1e-3].kl_trained
    assert near[1 - 1e-3].kl_trained < 1e-4 < near[1 - 1e-3].kl_base


def test_draws_follow_the_probabilities():
    logprobs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_token(logprobs, 1.0, 1.0, generator) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    kept = [draw_token(logprobs, 1.0, 0.75, generator) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(kept, minlength=4) / 4000, [0.625, 0.375, 0, 0], atol=0.03)
    assert draw_token(logprobs, 0.0, 1.0, generator) == 0


@pytest.mark.parametrize(
    "changed, message",
    [({"prompt_ids": []}, "prompt_ids"), ({"top_p": 0.0}, "top_p"), ({"base": None}, "base model")],
)
def test_stream_refuses(pair, changed, message):
    arguments = {"base": Voice(pair[0]), "trained": Voice(pair[1]), "prompt_ids": PROMPT, "scale": 1.6} | changed
    with pytest.raises(ValueError, match=message):
        next(guided_tokens(**arguments, max_new_tokens=1))
