"""Per-token policy losses against plain loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.losses.policy.surrogate import (
    cispo_surrogate,
    clipped_surrogate,
    kl_estimate,
    log_importance_weights,
    sapo_surrogate,
)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))


def draw(rows, time, seed, per_token=False):
    """Log-ratios, log-probs, advantages (some 0) and a mask that may have empty rows, in float64."""
    g = torch.Generator().manual_seed(seed)
    log_ratio = torch.randn(rows, time, generator=g, dtype=torch.float64)
    logps = -3 * torch.rand(rows, time, generator=g, dtype=torch.float64)
    advantages = torch.randn(rows, time if per_token else 1, generator=g, dtype=torch.float64)
    advantages[torch.rand(advantages.shape, generator=g) < 0.2] = 0.0
    mask = (torch.rand(rows, time, generator=g) < 0.7).long()
    return log_ratio, logps, advantages, mask


@given(shapes)
def test_sequence_weights_are_means_over_loss_tokens(shape):
    log_ratio, _, _, mask = draw(*shape)
    found = log_importance_weights(log_ratio, mask, "sequence")
    for i in range(shape[0]):
        tokens = [log_ratio[i, t].item() for t in range(shape[1]) if mask[i, t]]
        assert found[i, 0].item() == pytest.approx(sum(tokens) / len(tokens) if tokens else 0.0)
    assert log_importance_weights(log_ratio, mask, "token") is log_ratio


@given(shapes)
def test_padding_does_not_reach_sequence_weights(shape):
    log_ratio, _, _, mask = draw(*shape)
    log_ratio.requires_grad_()
    found = log_importance_weights(log_ratio, mask, "sequence")
    found.sum().backward()
    assert torch.all(log_ratio.grad[mask == 0] == 0)
    other = torch.where(mask == 0, -80.0, log_ratio.detach())
    torch.testing.assert_close(log_importance_weights(other, mask, "sequence"), found.detach())


@given(shapes, st.booleans(), st.floats(0, 1), st.floats(0, 2), st.none() | st.floats(1.1, 4))
def test_clipped_surrogate(shape, per_token, low, high, delta):
    log_ratio, _, advantages, _ = draw(*shape, per_token)
    found = clipped_surrogate(log_ratio.exp(), advantages, low, high, delta)
    for i in range(shape[0]):
        for t in range(shape[1]):
            r, a = math.exp(log_ratio[i, t]), advantages[i, t if per_token else 0].item()
            free = r if delta is None else min(r, delta)
            held = min(max(r, 1 - low), 1 + high)
            assert found[i, t].item() == pytest.approx(-min(free * a, held * a))


def test_clip_stops_the_gradient_only_where_it_would_push_further():
    ratio = torch.tensor([[0.5, 0.5, 2.0, 2.0, 20.0]], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0]], dtype=torch.float64)
    clipped_surrogate(ratio, advantages, 0.2, 0.28, delta=10.0).sum().backward()
    assert ratio.grad.tolist() == [[-1.0, 0.0, 0.0, 1.0, 0.0]]


@given(shapes, st.floats(0.5, 5))
def test_cispo_gradient_is_the_clipped_ratio_times_the_score(shape, high):
    log_ratio, logps, advantages, _ = draw(*shape)
    logps.requires_grad_()
    ratio = torch.exp(log_ratio + logps - logps.detach())
    cispo_surrogate(ratio, advantages, logps, high).sum().backward()
    for i in range(shape[0]):
        for t in range(shape[1]):
            expected = -min(math.exp(log_ratio[i, t]), high) * advantages[i, 0].item()
            assert logps.grad[i, t].item() == pytest.approx(expected)


@given(shapes, st.floats(0.1, 3), st.floats(0.1, 3))
def test_sapo_surrogate(shape, tau_pos, tau_neg):
    log_ratio, _, advantages, _ = draw(*shape)
    found = sapo_surrogate(log_ratio.exp(), advantages, tau_pos, tau_neg)
    for i in range(shape[0]):
        a = advantages[i, 0].item()
        tau = tau_pos if a > 0 else tau_neg
        for t in range(shape[1]):
            gate = 4 / tau / (1 + math.exp(-tau * (math.exp(log_ratio[i, t]) - 1)))
            assert found[i, t].item() == pytest.approx(-gate * a)


def test_sapo_on_policy_has_the_policy_gradient():
    ratio = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[2.0], [-0.5]], dtype=torch.float64)
    sapo_surrogate(ratio, advantages, 1.0, 1.05).sum().backward()
    torch.testing.assert_close(ratio.grad, -advantages.expand(2, 3))


@given(shapes, st.sampled_from(["k2", "k3"]))
def test_kl_estimate(shape, estimator):
    _, logps, _, _ = draw(*shape)
    ref = logps - draw(*shape)[0]
    found = kl_estimate(logps, ref, estimator)
    for i in range(shape[0]):
        for t in range(shape[1]):
            d = ref[i, t].item() - logps[i, t].item()
            assert found[i, t].item() == pytest.approx(d * d / 2 if estimator == "k2" else math.exp(d) - d - 1)
    assert bool((found >= 0).all())


@pytest.mark.parametrize(("estimator", "reverse"), [("k2", True), ("k3", False)])
def test_expected_gradient_of_the_estimates(estimator, reverse):
    """Under samples of π: k2 has the gradient of KL(π‖ref); k3's is that of KL(ref‖π), as 1 − ref/π shows."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.5, 0.4, 0.2, 1.0], dtype=torch.float64), 0)
    logps = torch.log_softmax(logits, 0)
    estimate = kl_estimate(logps.unsqueeze(0), ref.unsqueeze(0), estimator)[0]
    (found,) = torch.autograd.grad((logps.exp().detach() * estimate).sum(), logits, retain_graph=True)
    first, second = (logps, ref) if reverse else (ref, logps)
    (expected,) = torch.autograd.grad((first.exp() * (first - second)).sum(), logits)
    torch.testing.assert_close(found, expected)


def test_gradcheck():
    log_ratio, logps, advantages, mask = draw(3, 4, 7)
    ref = logps - 0.3 * log_ratio
    log_ratio, logps = log_ratio.requires_grad_(), logps.requires_grad_()
    # Different from the boundaries of every clip
    assert torch.autograd.gradcheck(lambda x: log_importance_weights(x, mask, "sequence"), log_ratio)
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x.exp(), advantages, 0.2, 0.28, 3.0), log_ratio)
    assert torch.autograd.gradcheck(lambda x: sapo_surrogate(x.exp(), advantages, 1.0, 1.05), log_ratio)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, "k2"), logps)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, ref, "k3"), logps)


def test_finite_at_extreme_log_probabilities():
    logps = torch.tensor([[-80.0, -1e-7, -80.0]], requires_grad=True)
    other = torch.tensor([[-1e-7, -80.0, -80.0]])
    advantages = torch.tensor([[1.0]])
    ratio = torch.exp(logps - other)
    losses = [
        clipped_surrogate(ratio, advantages, 0.2, 0.28),
        clipped_surrogate(ratio, -advantages, 0.2, 0.28, 10.0),
        cispo_surrogate(ratio, advantages, logps, 5.0),
        sapo_surrogate(ratio, advantages, 1.0, 1.0),
        kl_estimate(logps, other, "k2"),
        kl_estimate(logps, other, "k3"),
    ]
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()
