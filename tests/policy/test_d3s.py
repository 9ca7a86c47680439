"""D³S: selection against exhaustive search, and what a real run keeps, counts and trains on."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl import D3sGRPOConfig, D3sGRPOTrainer
from papertrl.losses.policy.d3s import (
    largest_share,
    linear_schedule,
    max_variance_per_group,
    max_variance_subset,
    select_tokens,
    share_of,
    token_scores,
)

from ..harness.rollouts import distributions, gradients, make, metric, run, sampled
from ..harness.table import dataset, settings

advantage = st.floats(-3, 3, allow_subnormal=False) | st.sampled_from([0.0, 0.0, 1.0, -1.0])


def variance(values):
    return sum(x * x for x in values) / len(values) - (sum(values) / len(values)) ** 2


def best_variance(values, size):
    """Exhaustive search over all subsets."""
    return max(variance(subset) for subset in itertools.combinations(values, size))


@given(st.lists(advantage, min_size=1, max_size=10), st.data())
def test_the_subset_has_the_largest_variance_there_is(values, data):
    values = torch.tensor(values, dtype=torch.float64).tolist()
    size = data.draw(st.integers(1, len(values)))
    keep = max_variance_subset(torch.tensor(values, dtype=torch.float64), size)
    informative = sum(v != 0 for v in values)
    expected = min(size, informative) if informative else size
    assert int(keep.sum()) == expected
    chosen = [v for v, k in zip(values, keep.tolist(), strict=True) if k]
    assert variance(chosen) == pytest.approx(best_variance(values, expected), abs=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_the_choice_does_not_depend_on_the_scale(scale):
    values = torch.tensor([0.3, -1.0, 0.5, 0.2, -0.9, 0.9], dtype=torch.float64)
    assert max_variance_subset(scale * values, 3).tolist() == [False, True, False, False, True, True]


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=12), st.data())
def test_ties_go_to_the_row_that_comes_first(values, data):
    size = data.draw(st.integers(1, len(values)))
    keep = max_variance_subset(torch.tensor(values), size).tolist()
    for value in set(values):
        kept = [k for v, k in zip(values, keep, strict=True) if v == value]
        assert kept == sorted(kept, reverse=True)


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 4]), advantage), min_size=1, max_size=14),
    st.floats(0.05, 1),
)
def test_inside_groups(drawn, ratio):
    values = torch.tensor([a for _, a in drawn], dtype=torch.float64)
    ids = torch.tensor([g for g, _ in drawn])
    keep = max_variance_per_group(values, ids, ratio)
    for group in set(ids.tolist()):
        members = values[ids == group].tolist()
        informative = sum(v != 0 for v in members)
        size = max(1, math.ceil(ratio * len(members) - 1e-9))
        size = min(size, informative) if informative else size
        chosen = values[keep & (ids == group)].tolist()
        assert len(chosen) == size
        assert variance(chosen) == pytest.approx(best_variance(members, size), abs=1e-9)


def tokens(rows, time, seed, zero_rows=0.3):
    g = torch.Generator().manual_seed(seed)
    advantages = torch.randn(rows, 1, generator=g, dtype=torch.float64)
    advantages[torch.rand(rows, 1, generator=g) < zero_rows] = 0.0
    entropies = 4 * torch.rand(rows, time, generator=g, dtype=torch.float64)
    entropies[torch.rand(rows, time, generator=g) < 0.2] = 0.0
    mask = (torch.rand(rows, time, generator=g) < 0.7).long()
    return advantages, entropies, mask


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_scores(rows, time, seed, per_token):
    advantages, entropies, _ = tokens(rows, time, seed)
    advantages = (advantages * torch.arange(1, time + 1) if per_token else advantages).requires_grad_()
    scores = token_scores(advantages, entropies.requires_grad_())
    assert not scores.requires_grad
    for i in range(rows):
        for t in range(time):
            expected = abs(advantages[i, t if per_token else 0].item()) * entropies[i, t].item()
            assert scores[i, t].item() == pytest.approx(expected)


@given(st.lists(st.floats(0, 9), min_size=1, max_size=30), st.floats(0.01, 1))
def test_largest_share(scores, ratio):
    found = largest_share(torch.tensor(scores, dtype=torch.float64), ratio)
    assert found.item() == sorted(scores, reverse=True)[max(1, math.ceil(ratio * len(scores) - 1e-9)) - 1]


def test_largest_share_of_nothing():
    assert largest_share(torch.zeros(0), 0.5) == -torch.inf


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31), st.floats(0.05, 1))
def test_the_share_is_kept_and_tokens_without_signal_go_first(rows, time, seed, ratio):
    advantages, entropies, mask = tokens(rows, time, seed)
    scores = token_scores(advantages, entropies)
    threshold = largest_share(scores[mask.bool()], ratio).expand(rows, 1)
    keep = select_tokens(scores, mask, threshold)
    assert not bool((keep & (mask == 0)).any())
    valid = sorted(scores[mask.bool()].tolist(), reverse=True)
    count = max(1, math.ceil(ratio * len(valid) - 1e-9))
    kept = sorted(scores[keep].tolist(), reverse=True)
    # No two non-zero scores are alike, so that the share is exact
    assert kept == [score for score in valid[:count] if score > 0]


def test_padding_cannot_be_selected_and_does_not_count():
    scores = torch.tensor([[3.0, 1.0, 9.0], [2.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    threshold = largest_share(scores[mask.bool()], 0.5).expand(2, 1)
    assert select_tokens(scores, mask, threshold).tolist() == [[True, False, False], [True, False, False]]


def test_a_batch_without_any_signal_or_tokens_is_handled():
    zero = torch.zeros(2, 3)
    threshold = largest_share(zero.flatten(), 0.5).expand(2, 1)
    assert select_tokens(zero, torch.ones(2, 3), threshold).sum() == 0
    assert select_tokens(zero, zero, largest_share(zero[:, :0].flatten(), 0.5).expand(2, 1)).sum() == 0


def test_schedule():
    assert [linear_schedule(0.25, 0.75, t / 4) for t in range(6)] == [0.25, 0.375, 0.5, 0.625, 0.75, 0.75]


# --- The trainer ------------------------------------------------------------------------------------------------

BATCH = {"per_device_train_batch_size": 6, "num_generations": 4}


def kept_by_hand(trainer, generation, step):
    """Rows and tokens that the card keeps, recomputed from the model and the advantages alone."""
    args = trainer.args
    scored, batch, model, _ = generation
    progress = min(1.0, step / (args.d3s_schedule_steps or args.max_steps))
    ratios = [
        getattr(args, f"d3s_{kind}_ratio_start")
        + (getattr(args, f"d3s_{kind}_ratio_end") - getattr(args, f"d3s_{kind}_ratio_start")) * progress
        for kind in ("sample", "token")
    ]
    logps = distributions(model, batch, args.temperature)
    entropies = -(logps.exp() * logps).sum(-1)
    rows = [i for i, weight in enumerate(batch["row_weight"].tolist()) if weight > 0]
    scores = {
        (i, t): abs(scored.advantages[i].item()) * entropies[i, t].item()
        for i in rows
        for t in range(int(batch["completion_mask"][i].sum()))
    }
    return ratios, rows, scores


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_what_a_run_keeps(scope, policy_path, tmp_path):
    options = BATCH | {"max_steps": 3, "d3s_token_ratio_end": 0.6, "d3s_token_scope": scope, "d3s_schedule_steps": 2}
    trainer = run(D3sGRPOTrainer, policy_path, tmp_path, **options)
    seen, kept_variances, variances = [], [], []
    for step, generation in enumerate(trainer.generations):
        scored, batch, _, _ = generation
        (sample_ratio, token_ratio), rows, scores = kept_by_hand(trainer, generation, step)
        advantages = scored.advantages.tolist()
        size = min(max(1, math.ceil(sample_ratio * 12 - 1e-9)), sum(a != 0 for a in advantages))
        seen.append(size)
        kept_variances.append(variance([advantages[i] for i in rows]))
        variances.append(variance(advantages))
        assert len(rows) == size and set(batch["row_weight"].tolist()) <= {0.0, 1.0}
        assert kept_variances[-1] == pytest.approx(best_variance(advantages, size), abs=1e-6)

        kept = {(i, t) for i, t in batch["loss_mask"].nonzero().tolist() if i in rows}
        groups = [scores] if scope == "batch" else [{k: v for k, v in scores.items() if k[0] == i} for i in rows]
        expected = set()
        for group in groups:
            last = sorted(group.values(), reverse=True)[max(1, math.ceil(token_ratio * len(group) - 1e-9)) - 1]
            # Rollouts of one prompt begin alike: tokens that tie with the last one are kept with it
            expected |= {k for k, score in group.items() if score >= last - 1e-5}
        assert kept == expected

        # Attention still covers every completion; the counts are those of what is left
        assert batch["completion_mask"].sum(1).tolist() == scored.lengths.tolist()
        assert batch["num_items_in_batch"] == len(expected) and batch["num_rows_in_batch"] == size
    assert metric(trainer, "d3s/dropped_rollouts") == [12 - n for n in seen]
    after, before = metric(trainer, "d3s/advantage_variance_after"), metric(trainer, "d3s/advantage_variance_before")
    assert after == pytest.approx(kept_variances, abs=1e-5) and before == pytest.approx(variances, abs=1e-5)
    assert after[0] > before[0] and sum(after) > sum(before)
    assert seen[0] < seen[1] < seen[2]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_gradient_is_that_of_what_was_kept(loss_type, policy_path, tmp_path):
    options = BATCH | {"max_steps": 1, "loss_type": loss_type, "d3s_token_ratio_start": 0.4}
    trainer = run(D3sGRPOTrainer, policy_path, tmp_path, **options)
    scored, batch, model, _ = trainer.generations[0]
    _, rows, _ = kept_by_hand(trainer, trainer.generations[0], 0)
    logps = sampled(distributions(model, batch), batch)
    loss = 0.0
    for i in rows:
        places = batch["loss_mask"][i].nonzero().flatten().tolist()
        share = 1 / batch["loss_mask"][rows].sum() if loss_type == "dapo" else 1 / (len(rows) * max(1, len(places)))
        for t in places:
            loss = loss - scored.advantages[i] * logps[i, t] * share
    expected = gradients(loss, model)

    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 2
    batches = [inputs for inputs, _, _ in trainer.micro_batches]
    total = sum(trainer._compute_loss(trainer.model, inputs) for inputs in batches)
    for name, gradient in gradients(total, trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)


def test_a_group_without_signal_takes_no_share_of_the_tokens(policy_path, tmp_path):
    """All rollouts are kept; those of the constant prompt have A = 0 and must not fill up the normalizer."""

    def reward(completions, prompts, **kwargs):
        first = prompts[0]
        return [0.0 if p == first else float(sum(map(ord, c)) % 2) for p, c in zip(prompts, completions, strict=True)]

    options = BATCH | {"max_steps": 1, "d3s_sample_ratio_start": 1.0, "d3s_sample_ratio_end": 1.0}
    trainer = run(D3sGRPOTrainer, policy_path, tmp_path, reward, **options)
    scored, batch, _, _ = trainer.generations[0]
    flat = scored.advantages == 0
    assert 4 <= int(flat.sum()) < 12
    assert batch["loss_mask"][flat].sum() == 0
    share = math.ceil(0.1 * int(batch["completion_mask"].sum()) - 1e-9)
    assert share <= batch["num_items_in_batch"] <= share + 3


def test_inside_groups_every_prompt_stays(policy_path, tmp_path):
    options = BATCH | {"max_steps": 1, "d3s_scope": "intra_group", "d3s_sample_ratio_start": 0.5}
    trainer = run(D3sGRPOTrainer, policy_path, tmp_path, **options)
    scored, batch, _, _ = trainer.generations[0]
    for group in range(3):
        assert batch["row_weight"][scored.group_ids == group].sum() == 2
    assert metric(trainer, "d3s/groups_kept") == [3.0]


@pytest.mark.parametrize("reward", [1.0, math.nan])
def test_without_a_learning_signal_the_loss_is_zero(reward, policy_path, tmp_path):
    def constant(completions, **kwargs):
        return [None if math.isnan(reward) else reward] * len(completions)

    trainer = run(D3sGRPOTrainer, policy_path, tmp_path, constant, **(BATCH | {"max_steps": 2}))
    assert metric(trainer, "loss") == [0.0, 0.0] and metric(trainer, "grad_norm") == [0.0, 0.0]


def test_evaluation_takes_everything(policy_path, tmp_path):
    trainer = make(D3sGRPOTrainer, policy_path, tmp_path, **BATCH, per_device_eval_batch_size=8)
    assert math.isfinite(trainer.evaluate(dataset("policy").select(range(4)))["eval_loss"])
    for _, batch, _, _ in trainer.generations:
        assert torch.equal(batch["loss_mask"], batch["completion_mask"]) and bool((batch["row_weight"] == 1).all())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *[
            ({f"d3s_{kind}_ratio_{when}": value}, rf"`d3s_{kind}_ratio_{when}` must be a number in \(0, 1\], got")
            for kind in ("sample", "token")
            for when in ("start", "end")
            for value in (0.0, 1.1, math.nan)
        ],
        ({"d3s_schedule_steps": 0}, r"`d3s_schedule_steps` must be a number in \[1, inf\) or None, got 0"),
        ({"d3s_scope": "group"}, "`d3s_scope` must be one of 'cross_group', 'intra_group', got 'group'"),
        ({"d3s_token_scope": "row"}, "`d3s_token_scope` must be one of 'batch', 'sequence', got 'row'"),
        (
            {"d3s_sample_ratio_start": 0.9},
            "`d3s_sample_ratio_start` must be at most `d3s_sample_ratio_end`, got 0.9 and 0.75",
        ),
        (
            {"d3s_token_ratio_end": 0.05},
            "`d3s_token_ratio_start` must be at most `d3s_token_ratio_end`, got 0.1 and 0.05",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        D3sGRPOConfig(**settings("policy", tmp_path, **values))


@pytest.mark.parametrize(
    ("total", "ratio", "count"), [(30, 0.1, 3), (7, 0.25, 2), (10, 0.31, 4), (3, 0.01, 1), (16, 0.75, 12), (9, 0.5, 5)]
)
def test_shares_are_rounded_up(total, ratio, count):
    assert share_of(total, ratio) == count


def test_no_update_is_empty_where_a_batch_serves_several(policy_path, tmp_path):
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "steps_per_generation": 4}
    options |= {"d3s_sample_ratio_start": 0.25, "d3s_sample_ratio_end": 0.25, "max_steps": 8}
    options |= {"d3s_token_ratio_start": 0.5, "d3s_token_ratio_end": 0.5}
    trainer = run(D3sGRPOTrainer, policy_path, tmp_path, **options)
    assert len(trainer.generations) == 2
    for number, (_, batch, _, _) in enumerate(trainer.generations):

        def live(record):
            return int(((record["row_weight"] > 0) & record["loss_mask"].any(1)).sum())

        assert int((batch["row_weight"] > 0).sum()) == 4 and live(batch) > 1
        updates = [live(inputs) for inputs, _, _ in trainer.micro_batches[4 * number : 4 * number + 4]]
        assert sum(updates) == live(batch) and sum(map(bool, updates)) == min(4, live(batch))
