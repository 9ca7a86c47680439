"""Lp-Reg: its formulas against plain loops, and its loss in a real run against a computation by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import LpRegGRPOConfig, LpRegGRPOTrainer
from papertrl.losses.policy.lp_reg import (
    NOISE_LOGP,
    forward_kl_penalty,
    lowest_share,
    protected_tokens,
    proxy_logps,
)

from ..harness.rollouts import distributions, gradients, metric, run, sampled
from ..harness.table import settings

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))


def proxy_by_hand(p, token, kappa, relative):
    """log q of a token by the definition, or None if the filter removed it."""
    threshold = kappa * max(p) if relative else kappa
    if p[token] < threshold:
        return None
    return math.log(p[token]) - math.log(sum(x for x in p if x >= threshold))


def k3_by_hand(log_q, logp):
    d = min(log_q - logp, 500.0)
    return min(max(math.exp(d) - d - 1, -10.0), 10.0)


@given(shapes, st.floats(0.02, 0.9), st.booleans())
def test_proxy_is_the_filtered_distribution(shape, kappa, relative):
    rows, time, seed = shape
    g = torch.Generator().manual_seed(seed)
    p = torch.softmax(2 * torch.randn(rows, time, 5, generator=g, dtype=torch.float64), -1)
    tokens = torch.randint(5, (rows, time), generator=g)
    threshold = kappa * p.amax(-1) if relative else torch.full((rows, time), kappa, dtype=torch.float64)
    mass = (p * (p >= threshold.unsqueeze(-1))).sum(-1)
    logps = p.gather(2, tokens.unsqueeze(2)).squeeze(2).log().requires_grad_()
    found = proxy_logps(logps, threshold.log(), mass.log())
    assert not found.requires_grad
    for i in range(rows):
        for t in range(time):
            expected = proxy_by_hand(p[i, t].tolist(), tokens[i, t].item(), kappa, relative)
            if expected is None:
                assert found[i, t] == NOISE_LOGP
            else:
                assert found[i, t].item() == pytest.approx(expected)


def test_proxy_where_nothing_survives_is_noise_not_infinite():
    found = proxy_logps(torch.tensor([[-2.0]]), torch.tensor([[-0.5]]), torch.tensor([[-torch.inf]]))
    assert found.item() == NOISE_LOGP


@given(st.lists(st.floats(-80, 0), min_size=1, max_size=30), st.floats(0.001, 1))
def test_lowest_share_counts_tokens(logps, rho):
    found = lowest_share(torch.tensor(logps, dtype=torch.float64), rho)
    assert found.item() == sorted(logps)[max(1, math.floor(rho * len(logps))) - 1]


def test_lowest_share_of_nothing_selects_nothing():
    assert lowest_share(torch.zeros(0), 0.5) == -torch.inf


@given(shapes, st.booleans())
def test_protection_needs_all_conditions(shape, per_token):
    rows, time, seed = shape
    g = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-80.0, -3.0, -2.0, -1.0, -0.1])
    logps = levels[torch.randint(5, (rows, time), generator=g)]
    proxy = levels[torch.randint(5, (rows, time), generator=g)]
    proxy[torch.rand(rows, time, generator=g) < 0.3] = NOISE_LOGP
    advantages = torch.tensor([-1.0, 0.0, 1.0])[torch.randint(3, (rows, time if per_token else 1), generator=g)]
    mask = (torch.rand(rows, time, generator=g) < 0.7).long()
    log_delta = levels[torch.randint(5, (rows, 1), generator=g)]
    found = protected_tokens(logps, proxy, advantages, mask, log_delta)
    for i in range(rows):
        for t in range(time):
            assert bool(found[i, t]) == (
                mask[i, t] == 1
                and advantages[i, t if per_token else 0] < 0
                and logps[i, t] <= log_delta[i, 0]
                and proxy[i, t] != NOISE_LOGP
                and logps[i, t] < proxy[i, t]
            )


@given(shapes)
def test_penalty_and_its_gradient(shape):
    rows, time, seed = shape
    g = torch.Generator().manual_seed(seed)
    logps = (-4 * torch.rand(rows, time, generator=g, dtype=torch.float64)).requires_grad_()
    proxy = -4 * torch.rand(rows, time, generator=g, dtype=torch.float64)
    penalty = forward_kl_penalty(logps, proxy)
    penalty.sum().backward()
    for i in range(rows):
        for t in range(time):
            d = proxy[i, t].item() - logps[i, t].item()
            assert penalty[i, t].item() == pytest.approx(k3_by_hand(proxy[i, t].item(), logps[i, t].item()), abs=1e-12)
            clipped = math.exp(d) - d - 1 > 10
            assert logps.grad[i, t].item() == pytest.approx(0.0 if clipped else 1 - math.exp(d), abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: forward_kl_penalty(x, proxy), logps)


def test_penalty_vanishes_at_the_proxy_and_lifts_what_is_below():
    logps = torch.tensor([[-2.0, -3.0]], requires_grad=True)
    penalty = forward_kl_penalty(logps, torch.tensor([[-2.0, -2.0]]))
    penalty.sum().backward()
    assert penalty[0, 0] == 0 and logps.grad[0, 0] == 0
    assert penalty[0, 1] > 0 and logps.grad[0, 1] < 0


def test_expected_gradient_is_that_of_the_forward_divergence():
    """E_{o~π} ∇k3 = ∇ KL(q ‖ π), the reason why the sampled estimate stands in for it."""
    logits = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
    logps = torch.log_softmax(logits, 0)
    log_q = torch.log_softmax(torch.tensor([0.1, 0.5, 0.2], dtype=torch.float64), 0)
    penalty = forward_kl_penalty(logps.unsqueeze(0), log_q.unsqueeze(0))[0]
    (found,) = torch.autograd.grad((logps.detach().exp() * penalty).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((log_q.exp() * (log_q - logps)).sum(), logits)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extremes(dtype):
    logps = torch.tensor([[-80.0, 0.0, -1e-7, -80.0, 0.0]], dtype=dtype, requires_grad=True)
    proxy = torch.tensor([[-1e-7, -80.0, NOISE_LOGP, NOISE_LOGP, 0.0]], dtype=dtype)
    penalty = forward_kl_penalty(logps, proxy)
    penalty.sum().backward()
    assert penalty.isfinite().all() and logps.grad.isfinite().all()


# --- The trainer ------------------------------------------------------------------------------------------------

FIRING = {
    "lp_reg_kappa": 0.08,
    "lp_reg_rho": 0.8,
    "learning_rate": 1e-2,
    "num_iterations": 2,
    "temperature": 0.9,
    "per_device_train_batch_size": 8,
}


def loss_by_hand(trainer, micro_batch, model, generation):
    """Loss of a micro-batch under `model`, and its protected tokens, from the method card."""
    args = trainer.args
    _, whole, old_model, _ = generation
    log_old = sampled(distributions(old_model, whole, args.temperature), whole)
    eligible = [
        log_old[i, t].item()
        for i, t in whole["loss_mask"].nonzero().tolist()
        if args.lp_reg_scope == "all_tokens" or whole["advantages"][i] < 0
    ]
    delta = sorted(eligible)[max(1, int(args.lp_reg_rho * len(eligible))) - 1] if eligible else -math.inf
    old = distributions(old_model, micro_batch, args.temperature).exp()
    logps = sampled(distributions(model, micro_batch, args.temperature), micro_batch)
    loss, protected = 0.0 * logps.sum(), []
    for i, t in micro_batch["loss_mask"].nonzero().tolist():
        advantage = micro_batch["advantages"][i].item()
        p, token = old[i, t], micro_batch["completion_ids"][i, t].item()
        ratio = torch.exp(logps[i, t] - p[token].log())
        log_q = proxy_by_hand(p.tolist(), token, args.lp_reg_kappa, args.lp_reg_filter == "min_p")
        low = logps[i, t].item() <= delta + 1e-6
        if advantage < 0 and low and log_q is not None and logps[i, t].item() < log_q - 1e-6:
            d = log_q - logps[i, t]
            loss = loss - advantage * ratio + args.lp_reg_beta * torch.clamp(torch.exp(d) - d - 1, -10, 10)
            protected.append((i, t))
        else:
            held = torch.clamp(ratio, 1 - args.epsilon, 1 + args.epsilon_high)
            loss = loss + torch.max(-advantage * ratio, -advantage * held)
    return loss / micro_batch["num_items_in_batch"], protected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lp_reg_scope": "negative_tokens", "lp_reg_beta": 0.5},
        {"lp_reg_filter": "fixed", "lp_reg_kappa": 0.01},
        {"epsilon": 0.01, "epsilon_high": 0.01},
    ],
    ids=str,
)
def test_loss_of_a_run_is_the_one_computed_by_hand(options, policy_path, tmp_path):
    trainer = run(LpRegGRPOTrainer, policy_path, tmp_path, **(FIRING | options))
    assert len(trainer.generations) == 2 and len(trainer.micro_batches) == 6
    counts = []
    for number, (batch, model, loss) in enumerate(trainer.micro_batches):
        # Two micro-batches a step, two steps a generation batch
        expected, protected = loss_by_hand(trainer, batch, model, trainer.generations[number // 4])
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        counts.append(len(protected))
    assert max(counts) > 0
    steps = [sum(counts[i : i + 2]) / 2 for i in range(0, 6, 2)]
    assert metric(trainer, "lp_reg/regularized_tokens") == steps


def test_the_term_is_all_that_is_added_to_the_gradient(policy_path, tmp_path):
    trainer = run(LpRegGRPOTrainer, policy_path, tmp_path, **(FIRING | {"max_steps": 1, "lp_reg_beta": 0.7}))
    trainer.current_gradient_accumulation_steps = 2
    batches = [batch for batch, _, _ in trainer.micro_batches]
    old_model = trainer.generations[0][2]
    fired = 0
    for batch in batches:
        with_term = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
        trainer.args.lp_reg_beta = 0.0
        without = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
        trainer.args.lp_reg_beta = 0.7
        _, protected = loss_by_hand(trainer, batch, trainer.model, trainer.generations[0])
        logps = sampled(distributions(trainer.model, batch, trainer.temperature), batch)
        p = distributions(old_model, batch, trainer.temperature).exp()
        penalty = logps.sum() * 0
        for i, t in protected:
            log_q = proxy_by_hand(p[i, t].tolist(), batch["completion_ids"][i, t].item(), 0.08, True)
            d = log_q - logps[i, t]
            penalty = penalty + torch.clamp(torch.exp(d) - d - 1, -10, 10)
        expected = gradients(0.7 * penalty / batch["num_items_in_batch"], trainer.model)
        fired += len(protected)
        for name, gradient in expected.items():
            torch.testing.assert_close(with_term[name] - without[name], gradient, atol=2e-6, rtol=1e-3)
    assert fired > 0


def test_nothing_is_protected_where_the_filter_removes_nothing(policy_path, tmp_path):
    options = {"lp_reg_kappa": 1e-9, "lp_reg_rho": 1.0, "max_steps": 4, "max_completion_length": 16}
    trainer = run(LpRegGRPOTrainer, policy_path, tmp_path, **options)
    assert metric(trainer, "lp_reg/regularized_tokens") == [0.0] * 4
    assert metric(trainer, "lp_reg/mean_kept_mass") == [1.0] * 4
    assert metric(trainer, "lp_reg/filtered_sampled_fraction") == [0.0] * 4


def test_padding_and_prompt_do_not_enter(policy_path, tmp_path):
    trainer = run(LpRegGRPOTrainer, policy_path, tmp_path, **(FIRING | {"max_steps": 1}))
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer.micro_batches[0][0]
    padding = batch["completion_mask"] == 0
    assert padding.any()
    loss = trainer._compute_loss(trainer.model, batch)
    changed = dict(batch)
    changed["completion_ids"] = torch.where(padding, 9, batch["completion_ids"])
    for name in ("statistics/lp_reg/proxy_logps", "statistics/lp_reg/sampled_logps", "old_per_token_logps"):
        changed[name] = torch.where(padding, -0.1, batch[name])
    other = trainer._compute_loss(trainer.model, changed)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    expected = gradients(loss, trainer.model)
    for name, gradient in gradients(other, trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reward", [0.0, math.nan])
def test_without_a_learning_signal_nothing_is_protected(reward, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [None if math.isnan(reward) else reward] * len(completions)

    trainer = run(LpRegGRPOTrainer, policy_path, tmp_path, constant, **(FIRING | {"max_steps": 1}))
    assert metric(trainer, "lp_reg/regularized_tokens") == [0.0] and metric(trainer, "loss") == [0.0]


def test_half_precision_run(policy_path, tmp_path):
    trainer = run(LpRegGRPOTrainer, policy_path, tmp_path, **(FIRING | {"bf16": True, "max_steps": 2}))
    assert all(math.isfinite(loss) for loss in metric(trainer, "loss"))
    assert max(metric(trainer, "lp_reg/regularized_tokens")) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lp_reg_beta": -0.1}, r"`lp_reg_beta` must be a number in \[0, inf\), got -0.1"),
        ({"lp_reg_kappa": 0.0}, r"`lp_reg_kappa` must be a number in \(0, 1\), got 0.0"),
        ({"lp_reg_kappa": 1.0}, r"`lp_reg_kappa` must be a number in \(0, 1\), got 1.0"),
        ({"lp_reg_rho": 0.0}, r"`lp_reg_rho` must be a number in \(0, 1\], got 0.0"),
        ({"lp_reg_rho": 1.5}, r"`lp_reg_rho` must be a number in \(0, 1\], got 1.5"),
        ({"lp_reg_rho": math.nan}, r"`lp_reg_rho` must be a number in \(0, 1\], got nan"),
        ({"lp_reg_filter": "top_p"}, "`lp_reg_filter` must be one of 'min_p', 'fixed', got 'top_p'"),
        ({"lp_reg_scope": "all"}, "`lp_reg_scope` must be one of 'all_tokens', 'negative_tokens', got 'all'"),
        ({"epsilon": -0.2}, r"`epsilon` must be a number in \[0, inf\)"),
        ({"loss_type": "cispo"}, "`loss_type` must be one of .*'dapo'.*got 'cispo'.*lp_reg_beta=0"),
        (
            {"importance_sampling_level": "sequence"},
            "`importance_sampling_level` must be 'token', got 'sequence'.*lp_reg_beta=0",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        LpRegGRPOConfig(**settings("policy", tmp_path, **values))


def test_other_losses_are_fine_without_the_penalty(tmp_path):
    assert LpRegGRPOConfig(**settings("policy", tmp_path, loss_type="cispo", lp_reg_beta=0.0)).loss_type == "cispo"
