"""DisCO: its formulas against plain loops, and the gradient of real runs against the objective as the paper has it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import (
    D3sGRPOTrainer,
    DiscoGRPOConfig,
    DiscoGRPOTrainer,
    DlerGRPOTrainer,
    GuideGRPOTrainer,
    HptUpgeGRPOTrainer,
    LpRegGRPOTrainer,
    PolicyTrainer,
    ScafGRPOTrainer,
    compose,
)
from papertrl.core.declaration import Method
from papertrl.losses.masked import masked_mean
from papertrl.losses.policy.disco import (
    answer_labels,
    answer_shares,
    capped_ratio,
    constraint_weight,
    discriminative_objective,
    in_mixed_group,
    sampling_divergence,
)
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import checksum, distributions, gradients, make, metric, run, sampled
from ..harness.table import dataset, every_fourth, settings

answers = st.lists(
    st.tuples(st.sampled_from([0, 1, 4]), st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-30, 30)),
    min_size=1,
    max_size=12,
)
taus = st.none() | st.floats(0.05, 50)


def columns(drawn):
    ids, labels, scores = zip(*drawn, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64), torch.tensor(ids)


def split(scores, labels, ids, group):
    """Right and wrong scores of a group."""
    rows = [(s, x) for s, x, g in zip(scores, labels, ids, strict=True) if g == group]
    return [s for s, x in rows if x > 0], [s for s, x in rows if x < 0]


def objective_by_hand(right, wrong, tau):
    """The paper's objective of one question; tensors or numbers."""
    if not right or not wrong:
        return 0.0
    right, wrong = torch.stack(list(map(torch.as_tensor, right))), torch.stack(list(map(torch.as_tensor, wrong)))
    if tau is None:
        return right.mean() - wrong.mean()
    pairs = [-tau * (torch.logsumexp((wrong - s) / tau, 0) - math.log(len(wrong))) for s in right]
    return sum(pairs) / len(right)


@given(answers, taus)
def test_objective_and_its_gradient_are_the_papers(drawn, tau):
    scores, labels, ids = columns(drawn)
    scores.requires_grad_()
    found = discriminative_objective(scores, labels, ids, tau)
    groups = sorted(set(ids.tolist()))
    expected = [objective_by_hand(*split(scores, labels.tolist(), ids.tolist(), g), tau) for g in groups]
    for value, by_hand in zip(found.tolist(), map(torch.as_tensor, expected), strict=True):
        assert value == pytest.approx(by_hand.item(), abs=1e-9)
    shares = answer_shares(scores, labels, ids, tau)
    assert not shares.requires_grad
    total = sum(expected) + 0 * scores.sum()
    (by_autograd,) = torch.autograd.grad(total, scores)
    torch.testing.assert_close(labels * shares, by_autograd, atol=1e-9, rtol=1e-9)
    (own,) = torch.autograd.grad(found.sum(), scores, allow_unused=True)
    torch.testing.assert_close(torch.zeros_like(scores) if own is None else own, by_autograd, atol=1e-9, rtol=1e-9)


def test_tau_goes_from_the_mean_to_the_hardest_negative():
    scores = torch.tensor([0.0, -1.0, -2.0, -5.0], dtype=torch.float64)
    labels, ids = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    plain = answer_shares(scores, labels, ids, None)
    torch.testing.assert_close(answer_shares(scores, labels, ids, 1e9), plain)
    assert answer_shares(scores, labels, ids, 1e-3).tolist() == [1.0, 1.0, 0.0, 0.0]
    assert discriminative_objective(scores, labels, ids, 1e-6).item() == pytest.approx(1.0, abs=1e-4)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 4]), st.sampled_from([0.0, 0.5, 0.7, 1.0, math.nan])), min_size=1, max_size=12
    )
)
def test_labels(drawn):
    ids, rewards = zip(*drawn, strict=True)
    found = answer_labels(torch.tensor(rewards), torch.tensor(ids), 0.5)
    for group, reward, label in zip(ids, rewards, found.tolist(), strict=True):
        peers = [r for g, r in drawn if g == group and not math.isnan(r)]
        mixed = any(r > 0.5 for r in peers) and any(r <= 0.5 for r in peers)
        assert label == (0.0 if math.isnan(reward) or not mixed else 1.0 if reward > 0.5 else -1.0)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
def test_scores_and_divergence_of_tokens(rows, time, seed):
    g = torch.Generator().manual_seed(seed)
    log_ratio = 3 * torch.randn(rows, time, generator=g, dtype=torch.float64)
    mask = (torch.rand(rows, time, generator=g) < 0.6).long()
    means, ratio = masked_mean(log_ratio, mask, dim=1), capped_ratio(log_ratio)
    k1, k3 = sampling_divergence(log_ratio, "k1"), sampling_divergence(log_ratio, "k3")
    for i in range(rows):
        valid = [log_ratio[i, t].item() for t in range(time) if mask[i, t]]
        assert means[i].item() == pytest.approx(sum(valid) / len(valid) if valid else 0.0)
        for t in range(time):
            d = log_ratio[i, t].item()
            assert ratio[i, t].item() == pytest.approx(math.exp(d))
            assert k1[i, t].item() == -d
            assert k3[i, t].item() == pytest.approx(math.exp(d) - d - 1, abs=1e-12)


@given(st.floats(-1, 1), st.floats(0, 0.5), st.floats(0, 1e3))
def test_constraint_has_the_gradient_of_a_squared_hinge(divergence, delta, beta):
    value = torch.tensor(divergence, dtype=torch.float64, requires_grad=True)
    weight = constraint_weight(value, delta, beta)
    assert not weight.requires_grad
    direct = beta / 2 * torch.clamp(value - delta, min=0).square()
    (expected,) = torch.autograd.grad(direct, value)
    (found,) = torch.autograd.grad(weight * value, value)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("labels", [[0.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
@pytest.mark.parametrize("tau", [None, 10.0, 1e-3])
def test_a_question_with_one_kind_of_answer_adds_nothing(labels, tau):
    scores = torch.tensor([-1e4, 0.0, -80.0], requires_grad=True)
    ids = torch.zeros(3, dtype=torch.long)
    labels = torch.tensor(labels)
    assert not in_mixed_group(labels, ids).any()
    assert answer_shares(scores, labels, ids, tau).tolist() == [0.0] * 3
    objective = discriminative_objective(scores, labels, ids, tau).sum()
    (gradient,) = torch.autograd.grad(objective, scores)
    assert objective == 0 and gradient.tolist() == [0.0] * 3


@pytest.mark.parametrize("tau", [None, 10.0, 1e-3])
def test_finite_at_extremes(tau):
    scores, ids = torch.tensor([-1e4, 0.0, 4.8e8, -80.0]), torch.zeros(4, dtype=torch.long)
    labels = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    assert answer_shares(scores, labels, ids, tau).isfinite().all()
    assert discriminative_objective(scores, labels, ids, tau).isfinite().all()
    log_ratio = torch.tensor([[-500.0, 500.0]], requires_grad=True)
    for estimator in ("k1", "k3"):
        value = sampling_divergence(log_ratio, estimator).sum() + capped_ratio(log_ratio).sum()
        assert value.isfinite() and torch.autograd.grad(value, log_ratio)[0].isfinite().all()


# --- The trainer ------------------------------------------------------------------------------------------------

# Sixteen rows a micro-batch hold four questions, and one micro-batch is an optimizer step
BATCH = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_iterations": 2,
    "learning_rate": 3e-3,
    "max_steps": 4,
}


def loss_by_hand(trainer, whole, rows, model, old_model):
    """−J + (β/2)·max(D − δ, 0)² of `rows` of a generation batch, from the paper."""
    args = trainer.args
    logps = sampled(distributions(model, whole, args.temperature), whole)
    with torch.no_grad():
        seen = whole | {n: whole.get(f"sampled_{n}", whole[n]) for n in ("prompt_ids", "prompt_mask")}
        old = sampled(distributions(old_model, seen, args.temperature), whole)
    reward = whole["rewards"][:, 0]
    scores, drift = {}, []
    for i in rows:
        places = whole["loss_mask"][i].nonzero().flatten().tolist() if whole["row_weight"][i] > 0 else []
        if not places:
            continue
        tokens = logps[i, places] if args.disco_score == "logl" else torch.exp(logps[i, places] - old[i, places])
        hinted = whole["source"][i] == Source.HINTED
        if hinted and getattr(args, "guide_reshape", "none") == "constant":
            tokens = tokens / (tokens + args.guide_gamma)
        scores[i] = tokens.mean()
        if hinted:
            continue
        d = logps[i, places] - old[i, places]
        drift.append(-d if args.disco_kl == "k1" else torch.exp(d) - d - 1)
    tau = (args.disco_tau or {"logl": 10.0, "lratio": 1.0}[args.disco_score]) if args.disco_dro else None
    objective = 0.0
    for group in set(whole["group_ids"].tolist()):
        members = [i for i in scores if whole["group_ids"][i] == group]
        right = [scores[i] for i in members if reward[i] > args.success_threshold]
        wrong = [scores[i] for i in members if reward[i] <= args.success_threshold]
        objective = objective + objective_by_hand(right, wrong, tau)
    objective = objective / (len(whole["row_weight"]) / args.num_generations)
    drift = torch.cat(drift).mean()
    return args.disco_beta / 2 * torch.clamp(drift - args.disco_delta, min=0).square() - objective, drift


def unsolved_first(completions, prompts, **kwargs):
    """[`checksum`], but no answer to the first prompt is right."""
    return [(prompt != prompts[0]) * value for prompt, value in zip(prompts, checksum(completions), strict=True)]


def assert_gradients_close(found, expected, atol=2e-6):
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=max(atol, 2e-5 * largest))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"disco_score": "lratio"},
        {"disco_score": "lratio", "disco_tau": 0.05, "loss_type": "grpo"},
        {"disco_tau": 0.3, "loss_type": "dr_grpo"},
        {"disco_dro": False, "disco_kl": "k3", "disco_delta": 0.0},
        # Else the drift would be that of the rows with an effect
        {"disco_beta": 0.0, "loss_type": "grpo", "skip_zero_rows": False},
    ],
    ids=str,
)
def test_gradient_of_a_run_is_that_of_the_papers_objective(options, policy_path, tmp_path):
    trainer = run(DiscoGRPOTrainer, policy_path, tmp_path, **(BATCH | options))
    assert len(trainer.generations) == 2 and len(trainer.micro_batches) == 4
    trainer.current_gradient_accumulation_steps = 1
    drifts = []
    for number, (inputs, model, _) in enumerate(list(trainer.micro_batches)):
        _, whole, old_model, _ = trainer.generations[number // 2]
        direct, drift = loss_by_hand(trainer, whole, range(16), model, old_model)
        drifts.append(drift.item())
        trainer.model.load_state_dict(model.state_dict())
        found = gradients(trainer._compute_loss(trainer.model, inputs), trainer.model)
        assert_gradients_close(found, gradients(direct, model))
    # The first of two updates is on policy
    assert drifts[0] == pytest.approx(0, abs=1e-6) and drifts[2] == pytest.approx(0, abs=1e-6)
    assert metric(trainer, "disco/kl") == pytest.approx(drifts, abs=1e-6)
    assert metric(trainer, "disco/constraint_active") == [
        float(d > max(trainer.args.disco_delta, 1e-6)) for d in drifts
    ]
    if trainer.args.disco_kl == "k3":
        assert max(drifts) > trainer.args.disco_delta


def test_the_constraint_acts(policy_path, tmp_path):
    options = {"num_iterations": 4, "disco_kl": "k3"}
    free, bound = (
        run(DiscoGRPOTrainer, policy_path, tmp_path / str(beta), **(BATCH | options | {"disco_beta": beta}))
        for beta in (0.0, 1e4)
    )
    assert max(metric(bound, "disco/constraint_active")) == 1.0
    assert metric(bound, "disco/kl")[-1] < 0.5 * metric(free, "disco/kl")[-1]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_accumulated_gradient_covers_every_question_once(loss_type, policy_path, tmp_path):
    """Two micro-batches with two questions each, on policy, with what has no effect left out."""
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "loss_type": loss_type, "disco_tau": 0.5}
    trainer = run(DiscoGRPOTrainer, policy_path, tmp_path, unsolved_first, **options)
    scored, whole, model, _ = trainer.generations[0]
    mixed = scored.advantages != 0
    assert 0 < int(mixed.sum()) < 16 and set(scored.advantages.tolist()) == {-1.0, 0.0, 1.0}
    for inputs, _, _ in trainer.micro_batches:
        for group in inputs["group_ids"][inputs["advantages"] != 0].unique():
            assert int((inputs["group_ids"] == group).sum()) == 4
    direct, _ = loss_by_hand(trainer, whole, range(16), model, model)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 2
    batches = [inputs for inputs, _, _ in trainer.micro_batches]
    total = sum(trainer._compute_loss(trainer.model, inputs) for inputs in batches)
    assert_gradients_close(gradients(total, trainer.model), gradients(direct, model))
    assert metric(trainer, "disco/mixed_questions") == [mixed.float().mean().item()]
    assert metric(trainer, "disco/score_right")[0] < 0 and metric(trainer, "disco/negative_concentration")[0] > 0


def test_selected_tokens_and_rows_are_all_that_counts(policy_path, tmp_path):
    trainer_class = compose(DiscoGRPOTrainer, D3sGRPOTrainer)
    options = BATCH | {"d3s_token_ratio_start": 0.4, "d3s_sample_ratio_start": 0.7, "disco_kl": "k3", "max_steps": 2}
    trainer = run(trainer_class, policy_path, tmp_path, **options)
    trainer.current_gradient_accumulation_steps = 1
    _, whole, old_model, _ = trainer.generations[0]
    assert 0 < int((whole["row_weight"] > 0).sum()) < 16
    assert int(whole["loss_mask"].sum()) < int(whole["completion_mask"].sum())
    for inputs, model, _ in list(trainer.micro_batches):
        direct, _ = loss_by_hand(trainer, whole, range(16), model, old_model)
        trainer.model.load_state_dict(model.state_dict())
        found = gradients(trainer._compute_loss(trainer.model, inputs), trainer.model)
        assert_gradients_close(found, gradients(direct, model))


HINTS = {"disco_kl": "k3", "disco_delta": 0.0, "max_steps": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("hinting", "options"),
    [
        (GuideGRPOTrainer, {"disco_score": "lratio", "guide_reshape": "constant", "guide_gamma": 0.5}),
        (GuideGRPOTrainer, {"guide_reshape": "none", "disco_tau": 0.5}),
        (ScafGRPOTrainer, {"scaf_exempt_steps": 0}),
    ],
    ids=["guide-lratio", "guide-logl", "scaf"],
)
def test_rows_with_hints_are_scored_but_not_constrained(hinting, options, policy_path, tmp_path):
    if hinting is GuideGRPOTrainer:
        options = options | {"guide_max_resample_batches": 0}
    trainer = run(compose(DiscoGRPOTrainer, hinting), policy_path, tmp_path, every_fourth, **(BATCH | HINTS | options))
    trainer.current_gradient_accumulation_steps = 1
    _, whole, old_model, _ = trainer.generations[0]
    hinted = whole["source"] == Source.HINTED
    # Scaf puts in successes alone
    assert hinted.any() and not hinted.all()
    assert hinting is ScafGRPOTrainer or (whole["advantages"][hinted] < 0).any()
    drifts = []
    for inputs, model, _ in list(trainer.micro_batches):
        direct, drift = loss_by_hand(trainer, whole, range(16), model, old_model)
        drifts.append(drift.item())
        trainer.model.load_state_dict(model.state_dict())
        found = gradients(trainer._compute_loss(trainer.model, inputs), trainer.model)
        assert_gradients_close(found, gradients(direct, model))
    assert metric(trainer, "disco/kl") == pytest.approx(drifts, abs=1e-6) and drifts[1] > 1e-4


def test_reshaped_ratios_are_refused_where_there_are_none(policy_path, tmp_path):
    trainer_class = compose(GuideGRPOTrainer, DiscoGRPOTrainer)
    with pytest.raises(ValueError, match=r"'disco' and 'guide_grpo' .*stage 'ratios'.*disco_score='lratio' or .*none"):
        make(trainer_class, policy_path, tmp_path)
    for values in ({"disco_score": "lratio"}, {"guide_reshape": "none"}):
        make(trainer_class, policy_path, tmp_path, **values)


def test_padding_does_not_enter(policy_path, tmp_path):
    trainer = run(DiscoGRPOTrainer, policy_path, tmp_path, **(BATCH | {"disco_kl": "k3", "max_steps": 2}))
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer.micro_batches[1][0]
    padding = batch["completion_mask"] == 0
    assert padding.any()
    loss = trainer._compute_loss(trainer.model, batch)
    changed = batch | {
        "completion_ids": torch.where(padding, 9, batch["completion_ids"]),
        "old_per_token_logps": torch.where(padding, -0.1, batch["old_per_token_logps"]),
    }
    other = trainer._compute_loss(trainer.model, changed)
    torch.testing.assert_close(other, loss, rtol=1e-6, atol=0)
    expected = gradients(loss, trainer.model)
    for name, gradient in gradients(other, trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("reward", [0.0, 1.0, math.nan])
def test_without_questions_that_have_both_kinds_the_loss_is_zero(reward, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [None if math.isnan(reward) else reward] * len(completions)

    trainer = run(DiscoGRPOTrainer, policy_path, tmp_path, constant, **(BATCH | {"max_steps": 2}))
    assert metric(trainer, "loss") == [0.0, 0.0] and metric(trainer, "grad_norm") == [0.0, 0.0]
    assert metric(trainer, "disco/mixed_questions") == [0.0]


def test_every_row_stays_where_the_constraint_can_act(policy_path, tmp_path):
    for name, options, skips in (
        ("on policy", {"num_iterations": 1}, True),
        ("off policy", {}, False),
        ("without constraint", {"disco_beta": 0.0}, True),
    ):
        values = BATCH | {"max_steps": 1} | options
        trainer = run(DiscoGRPOTrainer, policy_path, tmp_path / name, unsolved_first, **values)
        assert (metric(trainer, "rows/skipped_fraction")[0] > 0) == skips


def test_evaluation(policy_path, tmp_path):
    trainer = make(DiscoGRPOTrainer, policy_path, tmp_path, per_device_eval_batch_size=8)
    assert math.isfinite(trainer.evaluate(dataset("policy").select(range(4)))["eval_loss"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"disco_score": "ratio"}, "`disco_score` must be one of 'logl', 'lratio', 'none', got 'ratio'"),
        ({"disco_tau": 0.0}, r"`disco_tau` must be a number in \(0, inf\) or None, got 0.0"),
        ({"disco_delta": -1e-4}, r"`disco_delta` must be a number in \[0, inf\), got -0.0001"),
        ({"disco_beta": -1.0}, r"`disco_beta` must be a number in \[0, inf\), got -1.0"),
        ({"disco_kl": "k2"}, "`disco_kl` must be one of 'k1', 'k3', got 'k2'"),
        ({"loss_type": "bnpo"}, "`loss_type` .*must be one of .*'dapo'.*got 'bnpo'.*disco_score='none'"),
        ({"num_generations": 8}, "`per_device_train_batch_size` must be a multiple of the 8 completions .*got 4"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DiscoGRPOConfig(**settings("policy", tmp_path, **values))


def test_evaluation_batches_hold_whole_groups_too(tmp_path):
    args = DiscoGRPOConfig(**settings("policy", tmp_path, eval_strategy="steps", eval_steps=1))
    args.per_device_eval_batch_size = 6
    with pytest.raises(ValueError, match=r"`per_device_eval_batch_size` must be a multiple of the 4 .*got 6"):
        args.validate()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"group_batches": False, "skip_zero_rows": False}, "`group_batches` and `skip_zero_rows` are off"),
        ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile` compares the tokens of a micro-batch"),
        ({"entropy_coef": 0.01}, "the entropy bonus averages over the micro-batch"),
    ],
)
def test_groups_that_would_be_split_are_refused(values, message, policy_path, tmp_path):
    with pytest.raises(ValueError, match=f"cut without regard to questions: {message}.*`steps_per_generation=1`"):
        make(DiscoGRPOTrainer, policy_path, tmp_path, **values)
    values = values | {"gradient_accumulation_steps": 1, "disco_kl": "k3", "num_iterations": 2, "max_steps": 2}
    trainer = run(DiscoGRPOTrainer, policy_path, tmp_path, **values)
    assert all(math.isfinite(loss) for loss in metric(trainer, "loss"))


class TokenLossTrainer(PolicyTrainer):
    """Stands for any method that replaces the loss of some tokens."""

    method = Method("token_loss", family="policy")
    extends = {"objective": {"epsilon": 0.2}}


def test_methods_on_single_tokens_are_refused(policy_path, tmp_path):
    trainer_class = compose(TokenLossTrainer, DiscoGRPOTrainer)
    with pytest.raises(ValueError, match=r"'disco' and 'token_loss' do not combine.*stage 'objective'.*epsilon=0.2"):
        make(trainer_class, policy_path, tmp_path, epsilon=0.1)
    run(trainer_class, policy_path, tmp_path, epsilon=0.2, max_steps=1)
    run(trainer_class, policy_path, tmp_path, epsilon=0.1, disco_score="none", max_steps=1)


def test_lp_regs_penalty_is_added_in_either_order(policy_path, tmp_path):
    options = BATCH | {"lp_reg_kappa": 0.08, "lp_reg_rho": 0.8, "learning_rate": 1e-2, "temperature": 0.9}
    results = []
    for beta, classes in (
        (0.0, [DiscoGRPOTrainer, LpRegGRPOTrainer]),
        (1.0, [DiscoGRPOTrainer, LpRegGRPOTrainer]),
        (1.0, [LpRegGRPOTrainer, DiscoGRPOTrainer]),
    ):
        output = tmp_path / f"{len(results)}"
        trainer = run(compose(*classes), policy_path, output, **(options | {"lp_reg_beta": beta}))
        results.append((metric(trainer, "loss"), trainer))
    (without, _), (one, trainer), (other, _) = results
    assert one == other and one != without
    assert max(metric(trainer, "lp_reg/regularized_tokens")) > 0


def test_demonstrations_are_computed_in_either_order(policy_path, tmp_path):
    # With several updates a batch, DisCO has rows of no advantage computed, and HPT those of no weight
    options = {"loss_type": "dr_grpo", "num_iterations": 2, "max_steps": 2, "hpt_gate": 0.5}
    results = []
    for classes in ([DiscoGRPOTrainer, HptUpgeGRPOTrainer], [HptUpgeGRPOTrainer, DiscoGRPOTrainer]):
        trainer = run(compose(*classes), policy_path, tmp_path / f"{len(results)}", **options)
        results.append((metric(trainer, "loss"), metric(trainer, "loss/hpt_sft")))
    assert results[0] == results[1] and max(results[0][1]) > 0


def test_dlers_filter_brings_questions_of_both_kinds(policy_path, tmp_path):
    trainer_class = compose(DiscoGRPOTrainer, DlerGRPOTrainer)
    options = {
        "dler_advantage_whitening": "none",
        "dler_length_penalty": "none",
        "dler_max_resample_batches": 8,
        "max_steps": 2,
    }
    trainer = run(trainer_class, policy_path, tmp_path, **options)
    assert metric(trainer, "disco/mixed_questions") == [1.0, 1.0]
