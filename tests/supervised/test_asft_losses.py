import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.losses.divergence import LazyLogits, token_kl
from papertrl.losses.supervised.asft import dft_weight

from ..harness.oracles import kl, softmax


@st.composite
def models_and_masks(draw):
    batch, time, hidden, vocab = (draw(st.integers(1, n)) for n in (3, 5, 4, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    head = {
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    biased = draw(st.booleans())

    def logits():
        return LazyLogits(
            torch.randn(batch, time, hidden, generator=generator),
            torch.randn(vocab, hidden, generator=generator),
            torch.randn(vocab, generator=generator) if biased else None,
            **head,
        )

    mask = torch.rand(batch, time, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return logits(), logits(), mask


def materialize(lazy):
    logits = torch.nn.functional.linear(lazy.hidden, lazy.weight, lazy.bias) * lazy.logit_scale
    return logits if lazy.softcap is None else lazy.softcap * torch.tanh(logits / lazy.softcap)


class TestTokenKl:
    @given(models_and_masks(), st.booleans())
    def test_oracle(self, drawn, reverse):
        policy, reference, mask = drawn
        found = token_kl(policy, reference, mask, reverse)
        p_logits, q_logits = materialize(policy), materialize(reference)
        for row in range(mask.shape[0]):
            for t in range(mask.shape[1]):
                p, q = softmax(p_logits[row, t].tolist()), softmax(q_logits[row, t].tolist())
                expected = (kl(p, q) if reverse else kl(q, p)) if mask[row, t] else 0.0
                assert found[row, t].item() == pytest.approx(expected, rel=1e-3, abs=1e-4)

    @given(models_and_masks(), st.booleans())
    def test_gradient(self, drawn, reverse):
        policy, reference, mask = drawn
        leaves = [x for x in (policy.hidden, policy.weight, policy.bias) if x is not None]
        frozen = [reference.hidden, reference.weight]
        for leaf in (*leaves, *frozen):
            leaf.requires_grad_()
        upstream = torch.linspace(-1, 1, mask.numel()).view(mask.shape)
        found = torch.autograd.grad((token_kl(policy, reference, mask, reverse) * upstream).sum(), leaves)
        log_p, log_q = materialize(policy).log_softmax(-1), materialize(reference).detach().log_softmax(-1)
        per_token = (log_p.exp() * (log_p - log_q) if reverse else log_q.exp() * (log_q - log_p)).sum(-1)
        expected = torch.autograd.grad((per_token * upstream * mask).sum(), leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        token_kl(policy, reference, mask, reverse).sum().backward()
        assert all(leaf.grad is None for leaf in frozen)

    def test_masked_positions_cannot_leak(self):
        torch.manual_seed(0)
        head = torch.randn(5, 4)
        hidden, mask = torch.randn(2, 3, 4), torch.tensor([[True, False, True], [False, False, True]])
        spoiled = hidden.masked_fill(~mask.unsqueeze(-1), math.nan)
        reference = LazyLogits(torch.randn(2, 3, 4), head)
        clean = token_kl(LazyLogits(hidden, head), reference, mask)
        assert torch.equal(token_kl(LazyLogits(spoiled, head), reference, mask), clean)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_same_model(self, reverse):
        torch.manual_seed(0)
        logits = LazyLogits(torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4))
        divergence = token_kl(logits, logits, torch.ones(2, 3, dtype=torch.bool), reverse)
        divergence.sum().backward()
        assert torch.equal(divergence, torch.zeros(2, 3))
        torch.testing.assert_close(logits.hidden.grad, torch.zeros(2, 3, 4), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("reverse", [False, True])
    def test_extreme_logits_are_finite(self, reverse):
        hidden = torch.tensor([[[1e3, -1e3], [-1e3, 1e3]]], requires_grad=True)
        policy, reference = LazyLogits(hidden, torch.eye(2)), LazyLogits(-hidden.detach(), torch.eye(2))
        divergence = token_kl(policy, reference, torch.ones(1, 2, dtype=torch.bool), reverse)
        divergence.sum().backward()
        assert torch.isfinite(divergence).all() and torch.isfinite(hidden.grad).all()


class TestDftWeight:
    @given(st.lists(st.floats(-50, 0), min_size=1, max_size=6), st.floats(0, 3))
    def test_oracle(self, log_probs, power):
        found = dft_weight(torch.tensor([log_probs], requires_grad=True), power)
        assert not found.requires_grad
        np.testing.assert_allclose(found[0], [math.exp(x) ** power for x in log_probs], rtol=1e-4, atol=1e-30)

    def test_gradient_is_that_of_the_probability(self):
        logits = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(0), requires_grad=True)
        labels = torch.arange(12).view(3, 4) % 7
        log_probs = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        (found,) = torch.autograd.grad(-(dft_weight(log_probs, 1.0) * log_probs).sum(), logits, retain_graph=True)
        (expected,) = torch.autograd.grad(-log_probs.exp().sum(), logits)
        torch.testing.assert_close(found, expected)

    def test_impossible_label_is_finite(self):
        log_probs = torch.tensor([[-1e4]])
        assert torch.equal(dft_weight(log_probs, 1.0) * log_probs, torch.zeros(1, 1))
