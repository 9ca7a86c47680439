"""The maths of pair losses, scores and weights against loops written from the papers' equations."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.losses.preference.pair_losses import PAIR_LOSS_INPUTS, PAIR_LOSSES, call_pair_loss
from papertrl.losses.preference.scores import divergence_score, sequence_logps, wpo_weights

finite = st.floats(-8, 8)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def sig(x):
    return math.exp(log_sigmoid(x))


def per_token_margin(p):
    return p["s_w"] / max(1, p["n_w"]) - p["s_l"] / max(1, p["n_l"])


def exo(p):
    # KL between the policy's preference and the smoothed label
    q, eps = sig(p["beta"] * p["delta"]), p["eps"]
    other = sig(-p["beta"] * p["delta"])
    return sum(a * math.log(a / b) for a, b in ((q, 1 - eps), (other, eps)) if a > 0)


def mixture(p):
    logit = p["beta"] * p["delta"]
    m = sig(logit / p["tau"])
    return (1 - m) * -log_sigmoid(logit) + m * math.exp(-logit)


# One pair: p holds scores s, log-ratios h, lengths n of winner and loser, delta, beta, eps, tau
PER_PAIR = {
    "sigmoid": lambda p: -log_sigmoid(p["beta"] * p["delta"]),
    "hinge": lambda p: max(0.0, 1 - p["beta"] * p["delta"]),
    "ipo": lambda p: (per_token_margin(p) - 1 / (2 * p["beta"])) ** 2,
    "sigmoid_norm": lambda p: -log_sigmoid(p["beta"] * per_token_margin(p)),
    "exo_pair": exo,
    "nca_pair": lambda p: (
        -log_sigmoid(p["beta"] * p["h_w"])
        - 0.5 * (log_sigmoid(-p["beta"] * p["h_w"]) + log_sigmoid(-p["beta"] * p["h_l"]))
    ),
    "robust": lambda p: (
        (p["eps"] * log_sigmoid(-p["beta"] * p["delta"]) - (1 - p["eps"]) * log_sigmoid(p["beta"] * p["delta"]))
        / (1 - 2 * p["eps"])
    ),
    "bco_pair": lambda p: -log_sigmoid(p["beta"] * p["h_w"]) - log_sigmoid(-p["beta"] * p["h_l"]),
    "sppo_hard": lambda p: (p["h_w"] - 1 / (2 * p["beta"])) ** 2 + (p["h_l"] + 1 / (2 * p["beta"])) ** 2,
    "apo_zero": lambda p: 1 - sig(p["beta"] * p["h_w"]) + sig(p["beta"] * p["h_l"]),
    "apo_down": lambda p: sig(p["beta"] * p["h_w"]) + 1 - sig(p["beta"] * (p["h_w"] - p["h_l"])),
    "discopop": mixture,
}


@st.composite
def batches(draw):
    n = draw(st.integers(1, 5))
    rows = {k: draw(st.lists(finite, min_size=n, max_size=n)) for k in ("s_w", "s_l", "p_w", "p_l", "r_w", "r_l")}
    rows |= {k: draw(st.lists(st.integers(0, 6), min_size=n, max_size=n)) for k in ("n_w", "n_l")}
    scalars = {
        "beta": draw(st.floats(0.05, 1.0)),
        "eps": draw(st.floats(0.01, 0.4)),
        "tau": draw(st.floats(0.05, 1.0)),
    }
    return rows, scalars


def tensors(rows, scalars):
    t = {k: torch.tensor(v, dtype=torch.float64 if k[0] != "n" else torch.long) for k, v in rows.items()}
    return {
        "margin": t["s_w"] - t["s_l"],
        "chosen_scores": t["s_w"],
        "rejected_scores": t["s_l"],
        "chosen_logratios": t["p_w"] - t["r_w"],
        "rejected_logratios": t["p_l"] - t["r_l"],
        "chosen_logps": t["p_w"],
        "rejected_logps": t["p_l"],
        "ref_chosen_logps": t["r_w"],
        "ref_rejected_logps": t["r_l"],
        "chosen_lengths": t["n_w"],
        "rejected_lengths": t["n_l"],
        "beta": scalars["beta"],
        "label_smoothing": scalars["eps"],
        "discopop_tau": scalars["tau"],
    }


@pytest.mark.parametrize("name", PER_PAIR)
@given(batch=batches())
def test_pair_loss_is_the_equation(name, batch):
    rows, scalars = batch
    found = call_pair_loss(name, tensors(rows, scalars))
    expected = []
    for i in range(len(rows["s_w"])):
        p = {k: v[i] for k, v in rows.items()} | scalars
        p |= {"delta": p["s_w"] - p["s_l"], "h_w": p["p_w"] - p["r_w"], "h_l": p["p_l"] - p["r_l"]}
        expected.append(PER_PAIR[name](p))
    # The smoothing of EXO is a float32 tensor
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@given(batch=batches())
def test_aot_compares_quantiles(name, batch):
    rows, scalars = batch
    found = call_pair_loss(name, tensors(rows, scalars))
    columns = list(zip(rows["p_w"], rows["p_l"], rows["r_w"], rows["r_l"], strict=True))
    if name == "aot":
        first, second = sorted(pw - pl for pw, pl, _, _ in columns), sorted(rw - rl for _, _, rw, rl in columns)
    else:
        first, second = sorted(pw - rw for pw, _, rw, _ in columns), sorted(pl - rl for _, pl, _, rl in columns)
    beta, eps = scalars["beta"], scalars["eps"]
    expected = [
        -(1 - eps) * log_sigmoid(beta * (a - b)) - eps * log_sigmoid(-beta * (a - b))
        for a, b in zip(first, second, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@st.composite
def token_batches(draw, rows=None):
    rows = draw(st.integers(1, 3)) if rows is None else rows
    time = draw(st.integers(1, 6))
    values = draw(st.lists(st.lists(st.floats(-5, 0), min_size=time, max_size=time), min_size=rows, max_size=rows))
    mask = draw(st.lists(st.lists(st.integers(0, 1), min_size=time, max_size=time), min_size=rows, max_size=rows))
    return values, mask


@given(batch=token_batches())
def test_sft_is_the_mean_over_the_batch_s_tokens(batch):
    values, mask = batch
    kept = [-v for row, keep in zip(values, mask, strict=True) for v, k in zip(row, keep, strict=True) if k]
    found = PAIR_LOSSES["sft"](torch.tensor(values, dtype=torch.float64), torch.tensor(mask))
    assert found.tolist() == pytest.approx([sum(kept) / len(kept) if kept else 0.0] * len(values))


@given(batch=token_batches(rows=4), alpha=st.none() | st.floats(0, 1))
def test_sequence_logps_weights_the_verbose_part(batch, alpha):
    values, mask = batch
    expected = []
    for i in range(4):
        tokens = [v for v, k in zip(values[i], mask[i], strict=True) if k]
        shared = min(len(tokens), sum(mask[(i + 2) % 4]))
        tail = 1.0 if alpha is None else alpha
        expected.append(sum(tokens[:shared]) + tail * sum(tokens[shared:]))
    found = sequence_logps(torch.tensor(values, dtype=torch.float64), torch.tensor(mask), alpha)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)


@given(batch=token_batches(rows=4), alpha=st.none() | st.floats(0, 1))
def test_masked_tokens_do_not_reach_scores_and_weights(batch, alpha):
    values, mask = torch.tensor(batch[0]), torch.tensor(batch[1])
    values.requires_grad_()
    garbage = torch.where(mask.bool(), values.detach(), torch.full_like(values, -77.0))
    assert torch.equal(sequence_logps(values, mask, alpha), sequence_logps(garbage, mask, alpha))
    assert torch.equal(wpo_weights(values, 0.5 * values, mask), wpo_weights(garbage, 0.5 * garbage, mask))
    sequence_logps(values, mask, alpha).sum().backward()
    assert (values.grad[mask == 0] == 0).all()


@given(batch=token_batches(rows=4), squares=st.floats(-3, 0))
def test_wpo_weights_are_mean_aligned_likelihoods(batch, squares):
    values, mask = batch
    rows = []
    for row, keep in zip(values, mask, strict=True):
        aligned = [v - squares for v, k in zip(row, keep, strict=True) if k]
        rows.append(math.exp(sum(aligned) / len(aligned)) if aligned else 1.0)
    tokens = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = wpo_weights(tokens, torch.full_like(tokens, squares), torch.tensor(mask))
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([rows[0] * rows[2], rows[1] * rows[3]])


# The generators f of the divergences; a score is f'(u), checked by central differences
GENERATORS = {
    "reverse_kl": lambda u, a: u * math.log(u) - u,
    "forward_kl": lambda u, a: -math.log(u) + u,
    "js_divergence": lambda u, a: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
    "alpha_divergence": lambda u, a: (u**a / a - u) / (a - 1),
}


@pytest.mark.parametrize("divergence", GENERATORS)
@given(ratio=st.floats(0.2, 5), alpha=st.floats(0.1, 0.9))
def test_score_is_the_generator_s_derivative(divergence, ratio, alpha):
    f, step = GENERATORS[divergence], 1e-6
    expected = (f(ratio + step, alpha) - f(ratio - step, alpha)) / (2 * step)
    found = divergence_score(torch.tensor([math.log(ratio)]), divergence, alpha)
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_alpha_divergence_tends_to_reverse_kl_and_stays_finite():
    logratios = torch.tensor([-2.0, 0.0, 3.0])
    assert torch.equal(divergence_score(logratios, "alpha_divergence", 1.0), logratios)
    torch.testing.assert_close(divergence_score(logratios, "alpha_divergence", 1.001), logratios, rtol=0.01, atol=0)
    assert divergence_score(torch.tensor([-1e6, 1e6]), "alpha_divergence", 0.5).isfinite().all()


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"sft"}))
def test_gradients(name):
    generator = torch.Generator().manual_seed(0)
    available = {
        "beta": 0.3,
        "label_smoothing": 0.1,
        "discopop_tau": 0.5,
        "chosen_lengths": torch.tensor([3, 0, 5]),
        "rejected_lengths": torch.tensor([1, 4, 2]),
    }
    free = [need for need in PAIR_LOSS_INPUTS[name] if need not in available]
    points = [torch.randn(3, dtype=torch.float64, generator=generator, requires_grad=True) for _ in free]
    assert torch.autograd.gradcheck(
        lambda *values: call_pair_loss(name, available | dict(zip(free, values, strict=True))), points
    )


def test_unknown_loss_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must be among .*'sigmoid'.*, got 'sigmod'"):
        call_pair_loss("sigmod", {})
