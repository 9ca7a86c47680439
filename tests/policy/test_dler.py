"""DLER: rewards, whitening and merging against plain loops; truncation, refill and DA limits in a real run."""

import math
import statistics

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from papertrl import DlerGRPOConfig, DlerGRPOTrainer
from papertrl.losses.policy.dler import length_limits, merge_updates, solved_share, truncated_rewards, whiten

from ..harness.rollouts import checksum, distributions, gradients, make, metric, run, sampled
from ..harness.table import settings


@given(st.lists(st.integers(0, 16), min_size=1, max_size=8), st.lists(st.integers(1, 15), unique=True, max_size=3))
def test_limits_by_share(solved, sixteenths):
    thresholds = sorted(n / 16 for n in sixteenths)
    lengths = [100 - 10 * i for i in range(len(thresholds) + 1)]
    share = torch.tensor([n / 16 for n in solved])
    expected = [lengths[sum(n / 16 >= t for t in thresholds)] for n in solved]
    assert length_limits(share, thresholds, lengths).tolist() == expected


@pytest.mark.parametrize(("solved", "threshold"), [(7, 0.7), (3, 0.3), (6, 0.6), (1, 0.1)])
def test_a_share_at_the_threshold_is_past_it(solved, threshold):
    correct = torch.arange(10) < solved
    share = solved_share(correct, torch.zeros(10, dtype=torch.long))
    assert length_limits(share, [threshold], [4, 2]).tolist() == [2] * 10


@given(st.lists(st.tuples(st.sampled_from([0, 3, 5]), st.booleans()), min_size=1, max_size=12))
def test_solved_share(drawn):
    found = solved_share(torch.tensor([c for _, c in drawn]), torch.tensor([g for g, _ in drawn]))
    for value, (group, _) in zip(found.tolist(), drawn, strict=True):
        members = [c for g, c in drawn if g == group]
        assert value == pytest.approx(sum(members) / len(members))


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 1.0, -1.0, math.nan]), st.integers(1, 5), st.booleans(), st.integers(1, 5)),
        min_size=1,
        max_size=8,
    )
)
def test_reward_counts_only_if_finished_within_the_limit(drawn):
    rewards, lengths, truncated, limits = (torch.tensor(list(column)) for column in zip(*drawn, strict=True))
    found = truncated_rewards(rewards.unsqueeze(1), lengths, truncated, limits)
    for value, (reward, length, cut, limit) in zip(found.flatten().tolist(), drawn, strict=True):
        if math.isnan(reward):
            assert math.isnan(value)
        else:
            assert value == (0.0 if cut or length > limit else reward)


def whitened_by_hand(centered, weights, live):
    """Every token is a number of its own; mean and unbiased variance over all of them."""
    units = [a for a, n, use in zip(centered, weights, live, strict=True) if use for _ in range(n)]
    if len(units) < 2:
        return [0.0] * len(centered)
    mean, variance = statistics.fmean(units), statistics.variance(units)
    return [(a - mean) / math.sqrt(variance + 1e-8) if use else 0.0 for a, use in zip(centered, live, strict=True)]


@given(
    st.lists(
        st.tuples(st.floats(-2, 2, allow_subnormal=False), st.integers(1, 9), st.booleans()), min_size=1, max_size=9
    )
)
def test_whitening_is_over_tokens(drawn):
    centered, weights, live = (list(column) for column in zip(*drawn, strict=True))
    found = whiten(torch.tensor(centered, dtype=torch.float64), torch.tensor(weights), torch.tensor(live))
    assert found.tolist() == pytest.approx(whitened_by_hand(centered, weights, live), abs=1e-6)


def test_long_responses_weigh_more_and_tokens_have_zero_mean():
    centered, lengths = torch.tensor([0.5, -0.5, 0.5, -0.5]), torch.tensor([10, 2, 7, 3])
    found = whiten(centered, lengths, torch.ones(4, dtype=torch.bool))
    assert (found * lengths).sum().item() == pytest.approx(0.0, abs=1e-5)
    assert found.sum().item() != pytest.approx(0.0, abs=1e-2)


@pytest.mark.parametrize(
    ("centered", "weights", "live"),
    [
        ([0.0, 0.0, 0.0], [3, 1, 2], [True] * 3),
        ([0.5, -0.5], [3, 2], [False] * 2),
        ([0.7], [1], [True]),
        ([math.nan, 0.5, -0.5], [1, 1, 1], [False, True, True]),
        ([0.5, 0.5], [0, 0], [True] * 2),
    ],
)
def test_whitening_is_finite_on_degenerate_batches(centered, weights, live):
    found = whiten(torch.tensor(centered), torch.tensor(weights), torch.tensor(live))
    assert found.isfinite().all() and bool((found[~torch.tensor(live)] == 0).all())


def states(seed, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (1,)}
    base = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    scales = {"a": 1.0, "b": 0.01, "c": 0.1}
    tuned = {n: (t.float() + scales[n] * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()}
    return base, tuned


@given(st.integers(0, 2**31), st.sampled_from([0.05, 0.25, 0.5, 1.0]), st.sampled_from(["tensor", "global"]))
def test_merge_keeps_the_largest_updates(seed, keep_ratio, scope):
    base, tuned = states(seed)
    merged = merge_updates(base, tuned, keep_ratio, 0.7, scope)
    updates = {name: (tuned[name] - base[name]).flatten().tolist() for name in base}
    parts = [[abs(d) for ds in updates.values() for d in ds]] if scope == "global" else None
    for name in base:
        pool = parts[0] if parts else [abs(d) for d in updates[name]]
        cut = sorted(pool, reverse=True)[math.ceil(keep_ratio * len(pool)) - 1]
        expected = [
            b + (0.7 * d if abs(d) >= cut else 0.0)
            for b, d in zip(base[name].flatten().tolist(), updates[name], strict=True)
        ]
        assert merged[name].flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_merge_has_the_constants_of_the_paper():
    base, tuned = {"w": torch.zeros(8)}, {"w": torch.tensor([1.0, -2.0, 3.0, -4.0, 0.1, 0.2, 0.3, 0.4])}
    torch.testing.assert_close(
        merge_updates(base, tuned)["w"], torch.tensor([0.0, 0.0, 2.1, -2.8, 0.0, 0.0, 0.0, 0.0])
    )


def test_merge_keeps_dtypes_ties_and_counters():
    base, tuned = states(1, torch.bfloat16)
    base["steps"], tuned["steps"] = torch.tensor(3), torch.tensor(9)
    merged = merge_updates(base, tuned, keep_ratio=1.0, scale=1.0)
    assert merged["steps"] == 9 and all(merged[n].dtype == base[n].dtype for n in base)
    torch.testing.assert_close(merged["a"], tuned["a"])
    tied = merge_updates({"w": torch.zeros(4)}, {"w": torch.tensor([1.0, -1.0, 1.0, 0.5])}, 0.25, 1.0)
    assert tied["w"].tolist() == [1.0, -1.0, 1.0, 0.0]


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_merge_of_states_without_weights_or_with_empty_tensors(scope):
    only_counters = {"steps": torch.tensor(3)}
    assert merge_updates(only_counters, only_counters, scope=scope)["steps"] == 3
    base, tuned = {"w": torch.zeros(4), "none": torch.zeros(0)}, {"w": torch.ones(4), "none": torch.zeros(0)}
    assert merge_updates(base, tuned, scope=scope)["none"].shape == (0,)


@pytest.mark.parametrize("keep_ratio", [0.0, -0.1, 1.1, math.nan])
def test_merge_refuses_a_bad_share(keep_ratio):
    base, tuned = states(0)
    with pytest.raises(ValueError, match=r"`keep_ratio` must be a number in \(0, 1\]"):
        merge_updates(base, tuned, keep_ratio)


def test_merge_refuses_different_models():
    base, tuned = states(0)
    with pytest.raises(ValueError, match="differ in names or shapes: \\['b'\\]"):
        merge_updates(base, {name: t for name, t in tuned.items() if name != "b"})
    with pytest.raises(ValueError, match="differ in names or shapes: \\['a'\\]"):
        merge_updates(base, tuned | {"a": tuned["a"].T})


# --- The trainer ------------------------------------------------------------------------------------------------

FIRING = {"dler_truncation_length": 3, "per_device_train_batch_size": 8, "dler_max_resample_batches": 0, "beta": 0.0}


def texts_of(trainer, batch):
    ids = [row[mask == 1] for row, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)]
    return trainer.processing_class.batch_decode(ids, skip_special_tokens=True)


def varied_groups(scored):
    return {g for g in scored.group_ids.tolist() if len(set(scored.rewards[scored.group_ids == g, 0].tolist())) > 1}


def advantages_by_hand(scored, whitening):
    rewards, ids = scored.rewards[:, 0].tolist(), scored.group_ids.tolist()
    means = {g: statistics.fmean([r for r, i in zip(rewards, ids, strict=True) if i == g]) for g in ids}
    varied = varied_groups(scored)
    return whitened_by_hand(
        [r - means[g] for r, g in zip(rewards, ids, strict=True)],
        scored.lengths.tolist() if whitening == "token" else [1] * len(ids),
        [g in varied for g in ids],
    )


@pytest.mark.parametrize("whitening", ["token", "sequence"])
def test_rewards_and_advantages_of_a_run(whitening, policy_path, tmp_path):
    trainer = run(DlerGRPOTrainer, policy_path, tmp_path, **FIRING, dler_advantage_whitening=whitening)
    late = 0
    for scored, batch, _, _ in trainer.generations:
        raw = checksum(texts_of(trainer, batch))
        for i, text in enumerate(raw):
            within = not scored.truncated[i] and scored.lengths[i] <= 3
            assert scored.rewards[i, 0] == (text if within else 0.0)
            late += not within and text > 0
        assert scored.lengths.tolist() == batch["completion_mask"].sum(1).tolist()
        torch.testing.assert_close(
            scored.advantages, torch.tensor(advantages_by_hand(scored, whitening)), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(batch["advantages"], scored.advantages)
    assert late > 0 and max(metric(trainer, "dler/truncated_fraction")) > 0


def test_a_completion_that_never_ends_gets_nothing_within_the_limit(policy_path, tmp_path):
    options = FIRING | {"dler_truncation_length": None, "max_completion_length": 3}
    trainer = run(DlerGRPOTrainer, policy_path, tmp_path, lambda completions, **_: [1.0] * len(completions), **options)
    at_limit = 0
    for scored, batch, _, _ in trainer.generations:
        ends = trainer.model.generation_config.eos_token_id
        last = [row[n - 1].item() for row, n in zip(batch["completion_ids"], scored.lengths, strict=True)]
        assert scored.rewards[:, 0].tolist() == [float(token in ends) for token in last]
        at_limit += sum(token in ends and n == 3 for token, n in zip(last, scored.lengths, strict=True))
    assert at_limit > 0


def by_prompt(dead):
    """Reward that is constant on the prompts in `dead`."""

    def reward(completions, prompts, **kwargs):
        return [0.0 if p in dead else float(len(c) % 2) for p, c in zip(prompts, completions, strict=True)]

    return reward


def test_groups_without_variance_are_replaced(policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": [f"{i}=" for i in range(8)]})
    dead = {"0=", "1=", "2=", "3="}
    options = FIRING | {"dler_max_resample_batches": 8, "dler_length_penalty": "none", "dler_truncation_length": None}
    trainer = run(DlerGRPOTrainer, policy_path, tmp_path, by_prompt(dead), data, **options)
    for scored, batch, _, rows in trainer.generations:
        assert bool(scored.usable.all()) and varied_groups(scored) == {0, 1, 2, 3}
        assert not dead & {row["prompt"] for row in rows}
        prompts = trainer.processing_class.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        assert prompts == [row["prompt"] for row in rows]
        # Rewards, lengths and completions still belong together
        assert [float(len(text) % 2) for text in texts_of(trainer, batch)] == scored.rewards[:, 0].tolist()
        for group in range(4):
            assert len({prompts[i] for i in (scored.group_ids == group).nonzero().flatten().tolist()}) == 1
    assert max(metric(trainer, "groups/refill_rounds")) >= 1
    assert metric(trainer, "groups/unfilled_fraction") == [0.0] * 3


def test_places_that_stay_empty_have_no_effect(policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": [f"{i}=" for i in range(8)]})
    dead = {f"{i}=" for i in range(7)}
    options = FIRING | {
        "dler_max_resample_batches": 1,
        "dler_length_penalty": "none",
        "dler_truncation_length": None,
        "max_steps": 4,
    }
    trainer = run(DlerGRPOTrainer, policy_path, tmp_path, by_prompt(dead), data, **options)
    partly = 0
    for scored, batch, _, _ in trainer.generations:
        empty = ~scored.usable
        assert bool(empty.any()) and bool((scored.advantages[empty] == 0).all())
        expected = torch.tensor(advantages_by_hand(scored, "token"))
        torch.testing.assert_close(scored.advantages, expected, rtol=1e-4, atol=1e-5)
        partly += bool(scored.usable.any())
        assert batch["num_rows_in_batch"] == 16
    assert partly > 0
    assert all(0 < x <= 1 for x in metric(trainer, "groups/unfilled_fraction"))


def test_without_any_variance_the_loss_is_zero(policy_path, tmp_path):
    options = FIRING | {"dler_max_resample_batches": 1, "max_steps": 2}
    constant = run(
        DlerGRPOTrainer, policy_path, tmp_path, lambda completions, **_: [0.0] * len(completions), **options
    )
    assert metric(constant, "loss") == [0.0, 0.0] and metric(constant, "grad_norm") == [0.0, 0.0]
    assert metric(constant, "dler/all_zero_groups") == [1.0, 1.0]


def test_limits_by_difficulty(policy_path, tmp_path):
    """ρ is taken under the longest limit; the group's own limit decides the reward."""
    options = FIRING | {"dler_da_thresholds": [0.5], "dler_da_lengths": [6, 2], "dler_dynamic_sampling": False}
    trainer = run(DlerGRPOTrainer, policy_path, tmp_path, **options)
    short = []
    for scored, batch, _, _ in trainer.generations:
        raw = checksum(texts_of(trainer, batch))
        for group in sorted(set(scored.group_ids.tolist())):
            rows = (scored.group_ids == group).nonzero().flatten().tolist()
            ended = [not scored.truncated[i].item() for i in rows]
            long = [raw[i] * (e and scored.lengths[i].item() <= 6) for i, e in zip(rows, ended, strict=True)]
            limit = 2 if sum(x > 0 for x in long) / len(rows) >= 0.5 else 6
            short.append(limit == 2)
            for i, e in zip(rows, ended, strict=True):
                assert scored.rewards[i, 0] == raw[i] * (e and scored.lengths[i].item() <= limit)
    assert 0 < sum(short) < len(short)
    logged = metric(trainer, "dler/da_short_fraction")
    assert statistics.fmean(logged) == pytest.approx(sum(short) / len(short))


@pytest.mark.parametrize(("estimator", "corrected"), [("k2", False), ("k3", False), ("k3", True)])
def test_divergence_to_the_reference(estimator, corrected, policy_path, tmp_path):
    """By default nothing but the estimate: its gradient is not that of the estimate times the ratio."""
    options = FIRING | {"beta": 0.3, "dler_kl_estimator": estimator, "max_steps": 1}
    if corrected:
        options["use_bias_correction_kl"] = True
    constant = {"reward": lambda completions, **_: [0.0] * len(completions)}
    trainer = run(DlerGRPOTrainer, policy_path, tmp_path, **constant, **options)
    first = trainer.generations[0][2]
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer.micro_batches[0][0]
    logps = sampled(distributions(trainer.model, batch), batch)
    d = sampled(distributions(first, batch), batch).detach() - logps
    values = d * d / 2 if estimator == "k2" else torch.exp(d) - d - 1
    if corrected:
        values = values * torch.exp(logps - logps.detach())
    expected = 0.3 * (values * batch["completion_mask"]).sum() / batch["num_items_in_batch"]
    loss = trainer._compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and loss.item() > 0
    by_hand = gradients(expected, trainer.model)
    for name, gradient in gradients(loss, trainer.model).items():
        torch.testing.assert_close(gradient, by_hand[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dler_length_penalty": "soft"}, "`dler_length_penalty` must be one of 'truncation', 'none', got 'soft'"),
        ({"dler_truncation_length": 0}, r"`dler_truncation_length` must be a number in \[1, inf\) or None, got 0"),
        ({"dler_truncation_length": 9}, r"`dler_truncation_length` must be in \[1, max_completion_length=8\], got 9"),
        ({"dler_da_thresholds": [0.5]}, "`dler_da_thresholds`.*need `dler_da_lengths`"),
        ({"dler_da_lengths": [4, 2]}, "`dler_da_lengths` must have one more entry than `dler_da_thresholds`"),
        (
            {"dler_da_thresholds": [0.5], "dler_da_lengths": [9, 2]},
            r"`dler_da_lengths` must be in \[1, max_completion_length=8\], got 9",
        ),
        ({"dler_da_thresholds": [0.5], "dler_da_lengths": [4, 0]}, r"`dler_da_lengths` must be in \[1, .*, got 0"),
        (
            {"dler_da_thresholds": [0.5, 0.2], "dler_da_lengths": [4, 3, 2]},
            r"`dler_da_thresholds` must be ascending numbers in \(0, 1\]",
        ),
        ({"dler_da_thresholds": [0.5, 0.5], "dler_da_lengths": [4, 3, 2]}, "`dler_da_thresholds` must be ascending"),
        ({"dler_da_thresholds": [1.5], "dler_da_lengths": [4, 3]}, "`dler_da_thresholds` must be ascending"),
        (
            {"dler_advantage_whitening": "batch"},
            "`dler_advantage_whitening` must be one of 'token', 'sequence', 'none'",
        ),
        ({"dler_max_resample_batches": -1}, r"`dler_max_resample_batches` must be a number in \[0, inf\), got -1"),
        ({"dler_kl_estimator": "k1"}, "`dler_kl_estimator` must be one of 'k2', 'k3', got 'k1'"),
        ({"beta": -1.0}, r"`beta` must be a number in \[0, inf\), got -1.0"),
        ({"epsilon_high": -0.1}, r"`epsilon_high` must be a number in \[0, inf\) or None"),
        ({"delta": 1.0}, r"`delta` must be a number in \(1, inf\) or None"),
        ({"mask_truncated_completions": True}, "`mask_truncated_completions=True`.*`dler_length_penalty='none'`"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        DlerGRPOConfig(**settings("policy", tmp_path, **values))


def test_masking_truncated_completions_is_fine_without_truncation(tmp_path):
    values = {"mask_truncated_completions": True, "dler_length_penalty": "none"}
    assert DlerGRPOConfig(**settings("policy", tmp_path, **values)).mask_truncated_completions


@pytest.mark.parametrize(
    ("rewards", "options", "named"),
    [
        ((-1.0, 1.0), {}, "`signed` is -1"),
        ((0.0, 2.0), {"reward_weights": [-0.5]}, "`signed` is -1"),
        ((-0.25, 0.0), {"dler_da_thresholds": [0.5], "dler_da_lengths": [6, 2]}, "`signed` is -0.25"),
    ],
)
def test_rewards_that_make_it_pay_to_be_cut_off_are_refused(rewards, options, named, policy_path, tmp_path):
    def signed(completions, **kwargs):
        return [rewards[sum(map(ord, text)) % 2] for text in completions]

    with pytest.raises(ValueError, match=f"weighted reward {named}.*`dler_length_penalty='none'`"):
        run(DlerGRPOTrainer, policy_path, tmp_path, signed, max_steps=1, **options)
    run(DlerGRPOTrainer, policy_path, tmp_path, signed, max_steps=1, **(options | {"dler_length_penalty": "none"}))


def test_limits_go_by_what_counts_as_solved(policy_path, tmp_path):
    """Partial credit up to `success_threshold` is no right answer."""

    def partial(completions, **kwargs):
        return [0.5] * len(completions)

    options = {"dler_da_thresholds": [0.5], "dler_da_lengths": [8, 2], "dler_dynamic_sampling": False, "max_steps": 1}
    for threshold, short in ((0.0, True), (0.5, False)):
        values = options | {"success_threshold": threshold, "max_completion_length": 8}
        trainer = make(DlerGRPOTrainer, policy_path, tmp_path / str(threshold), partial, **values)
        inner = trainer._generate_single_turn

        def ended(*args, inner=inner, end=trainer.processing_class.eos_token_id, **kwargs):
            ids, _ = inner(*args, **kwargs)
            return [[*row[:3], end] for row in ids], None

        trainer._generate_single_turn = ended
        trainer.train()
        assert metric(trainer, "dler/da_short_fraction") == [float(short)]
        assert (metric(trainer, "dler/truncated_fraction")[0] > 0) == short
