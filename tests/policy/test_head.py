"""Kept mass of a filtered distribution against a loop over the vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.losses import head
from papertrl.losses.head import kept_mass, sum_of_squares


def probabilities_of(hidden, weight, bias, temperature, logit_scale, softcap):
    """Next-token distribution of one position, by the definition."""
    logits = []
    for v in range(weight.shape[0]):
        logit = sum(h * w for h, w in zip(hidden.tolist(), weight[v].tolist(), strict=True))
        logit = (logit + (0.0 if bias is None else bias[v].item())) * logit_scale
        logits.append((logit if softcap is None else softcap * math.tanh(logit / softcap)) / temperature)
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def brute(hidden, weight, bias, kappa, relative, temperature, logit_scale, softcap):
    """(log threshold, log kept mass) of one position, by the definition."""
    probabilities = probabilities_of(hidden, weight, bias, temperature, logit_scale, softcap)
    threshold = kappa * max(probabilities) if relative else kappa
    kept = sum(p for p in probabilities if p >= threshold)
    return math.log(threshold), math.log(kept) if kept > 0 else -math.inf


@given(
    st.integers(1, 5),
    st.integers(2, 9),
    st.integers(0, 2**31),
    st.floats(0.01, 0.9),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.7, 1.0, 1.6]),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([None, 2.0]),
)
def test_against_the_definition(tokens, vocab, seed, kappa, relative, with_bias, temperature, logit_scale, softcap):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(tokens, 3, generator=g), torch.randn(vocab, 3, generator=g)
    bias = torch.randn(vocab, generator=g) if with_bias else None
    found = kept_mass(hidden, weight, bias, kappa, relative, temperature, logit_scale, softcap)
    squares = sum_of_squares(hidden, weight, bias, temperature, logit_scale, softcap)
    for i in range(tokens):
        distribution = probabilities_of(hidden[i], weight, bias, temperature, logit_scale, softcap)
        assert squares[i].item() == pytest.approx(sum(p * p for p in distribution), abs=1e-5)
        threshold, kept = brute(hidden[i], weight, bias, kappa, relative, temperature, logit_scale, softcap)
        assert found[0][i].item() == pytest.approx(threshold, abs=1e-5)
        assert found[1][i].item() == pytest.approx(kept, abs=1e-5)


def test_chunks_change_nothing(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 4), torch.randn(11, 4)
    whole = kept_mass(hidden, weight, None, 0.1)
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 33)
    chunked = kept_mass(hidden, weight, None, 0.1)
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 1)
    single = kept_mass(hidden, weight, None, 0.1)
    for a, b, c in zip(whole, chunked, single, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_the_most_probable_token_always_survives_the_relative_filter():
    torch.manual_seed(0)
    hidden, weight = 30 * torch.randn(50, 4), torch.randn(13, 4)
    threshold, kept = kept_mass(hidden, weight, None, 1.0)
    best = torch.log_softmax(hidden @ weight.T, -1).amax(-1)
    torch.testing.assert_close(threshold, best)
    torch.testing.assert_close(kept, best)


def test_a_filter_that_removes_nothing_keeps_all_mass_exactly():
    torch.manual_seed(0)
    _, kept = kept_mass(torch.randn(200, 4), torch.randn(13, 4), None, 1e-12)
    assert torch.equal(kept, torch.zeros(200))


def test_an_absolute_filter_can_remove_everything():
    threshold, kept = kept_mass(torch.zeros(2, 3), torch.zeros(10, 3), None, 0.5, relative=False)
    torch.testing.assert_close(threshold, torch.full((2,), math.log(0.5)))
    assert torch.equal(kept, torch.full((2,), -math.inf))


def test_no_tokens_and_no_gradient():
    weight = torch.randn(5, 3, requires_grad=True)
    threshold, kept = kept_mass(torch.zeros(0, 3), weight, None, 0.1)
    assert threshold.shape == kept.shape == (0,)
    threshold, kept = kept_mass(torch.randn(2, 3, requires_grad=True), weight, None, 0.1)
    assert not threshold.requires_grad and not kept.requires_grad


def test_half_precision_weights():
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8), torch.randn(30, 8)
    exact = kept_mass(hidden, weight, None, 1e-6)
    half = kept_mass(hidden, weight.bfloat16(), None, 1e-6)
    assert half[0].dtype == half[1].dtype == torch.float32
    torch.testing.assert_close(half[0], exact[0], atol=0.1, rtol=0)
    assert (half[1] <= 1e-6).all()
