import math
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from papertrl import LnDPOTrainer, RsoDPOConfig, RsoDPOTrainer, compose
from papertrl.losses.preference.rso import collapse_equal, point_reward, rejection_sample
from papertrl.trainers.preference.online.candidates import Candidate, Group

from ..harness.pairs import first_batch, loss_and_gradients, make_trainer, recorded

# --- Rejection sampling -----------------------------------------------------------------------------------------

REWARDS = st.lists(st.floats(-5, 5) | st.sampled_from([math.nan, math.inf, -math.inf, 1.0]), max_size=12)


def by_the_listing(rewards, count, beta, rng):
    """The paper's algorithm, over a map of what is left, with a pass per turn of the outer loop."""
    left = {i: r for i, r in enumerate(rewards) if -math.inf < r < math.inf}
    accepted = []
    while len(accepted) < count and left:
        top = max(left.values())
        taken = []
        for i, reward in left.items():
            if len(accepted) == count:
                break
            u = rng.random()
            if u < math.e ** ((reward - top) / beta):
                accepted.append(i)
                taken.append(i)
        for i in taken:
            del left[i]
    return accepted


@given(rewards=REWARDS, count=st.integers(1, 14), beta=st.floats(0.05, 20), seed=st.integers(0, 1000))
def test_accepts_as_the_papers_listing_does(rewards, count, beta, seed):
    found = rejection_sample(rewards, count, beta, random.Random(seed))
    assert found.indices == by_the_listing(rewards, count, beta, random.Random(seed))
    finite = [i for i, r in enumerate(rewards) if math.isfinite(r)]
    assert len(found.indices) == min(count, len(finite)) == len(set(found.indices))
    assert found.passes <= len(found.indices) <= found.visits
    if found.passes == 1 and found.indices and count >= len(finite):
        assert set(found.indices) == set(finite)


@given(rewards=REWARDS, count=st.integers(1, 14))
def test_beta_0_takes_the_best_and_infinite_beta_the_first(rewards, count):
    finite = [i for i, r in enumerate(rewards) if math.isfinite(r)]
    best = sorted(sorted(finite), key=lambda i: rewards[i], reverse=True)[:count]
    assert rejection_sample(rewards, count, 0.0, random.Random(0)).indices == best
    assert rejection_sample(rewards, count, math.inf, random.Random(0)).indices == finite[:count]
    # The limit: nobody but the best of a pass is accepted
    if len({round(rewards[i], 3) for i in finite}) == len(finite):
        assert rejection_sample(rewards, count, 1e-9, random.Random(0)).indices == best


def test_equal_rewards_are_all_accepted_in_one_pass():
    found = rejection_sample([2.0] * 5, 4, 0.5, random.Random(0))
    assert (found.indices, found.passes, found.visits) == ([0, 1, 2, 3], 1, 4)


def total_variation(candidates: int, dedup: bool, trials: int) -> float:
    """Of the first accepted of so many draws, from the law π exp(r/β)/Z over 20 outcomes."""
    rng = random.Random(1)
    outcomes, beta = range(20), 0.5
    policy = [rng.expovariate(1) for _ in outcomes]
    policy = [p / sum(policy) for p in policy]
    rewards = [rng.gauss(0, 1) for _ in outcomes]
    law = [p * math.exp(r / beta) for p, r in zip(policy, rewards, strict=True)]
    counts = Counter()
    for _ in range(trials):
        drawn = rng.choices(outcomes, policy, k=candidates)
        if dedup:
            drawn = [drawn[place] for place in collapse_equal(drawn, [rewards[y] for y in drawn])[0]]
        counts[drawn[rejection_sample([rewards[y] for y in drawn], 1, beta, rng).indices[0]]] += 1
    return 0.5 * sum(abs(counts[y] / trials - law[y] / sum(law)) for y in outcomes)


def test_first_accepted_follows_the_optimal_policy_without_collapse():
    assert total_variation(64, dedup=False, trials=20_000) < 0.02
    # Too few candidates do not know the maximum
    assert total_variation(4, dedup=False, trials=5_000) > 0.08
    # Each outcome counts once, however likely
    assert total_variation(64, dedup=True, trials=5_000) > 0.05


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(-3, 3)), max_size=10))
def test_equal_candidates_collapse_to_the_first_place_and_the_last_reward(items):
    ordered = {}
    for key, reward in items:
        ordered[key] = reward
    places, rewards = collapse_equal([key for key, _ in items], [reward for _, reward in items])
    assert [items[place][0] for place in places] == list(ordered)
    assert all(items[place][0] not in [key for key, _ in items[:place]] for place in places)
    assert rewards == list(ordered.values())


@given(st.floats(0.001, 0.999))
def test_point_reward_is_the_logit(p):
    assert 1 / (1 + math.exp(-point_reward(p))) == pytest.approx(p)
    assert point_reward(1 - p) == pytest.approx(-point_reward(p))


def test_point_reward_stays_finite():
    assert point_reward(1.0) == pytest.approx(13.8155, abs=1e-3) == -point_reward(0.0)
    assert math.isnan(point_reward(math.nan))


# --- The trainer ------------------------------------------------------------------------------------------------

ONLINE = {"online_num_samples": 6, "rso_num_samples": 4, "online_max_new_tokens": 6, "check_records": True}


def digits(completions, **kwargs):
    """How many digits, at most 3: graded, with ties."""
    return [float(min(3, sum(c.isdigit() for c in text))) for text in completions]


def ranker(prompts, firsts, seconds):
    """A ranker that likes digits, and the first place."""
    counts = [[sum(c.isdigit() for c in text) for text in texts] for texts in (firsts, seconds)]
    return [1 / (1 + math.exp(b - a)) * 0.98 + 0.02 for a, b in zip(*counts, strict=True)]


def make(tiny_path, tokenizer, tmp_path, judged_by=None, **options):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    args = RsoDPOConfig(
        str(tmp_path / "run"),
        **{
            **{"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
            **{"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "share_prompts": False},
            **{"gradient_checkpointing": False, **ONLINE, **options},
        },
    )
    return RsoDPOTrainer(
        model,
        None,
        args,
        train_dataset=Dataset.from_dict({"prompt": ["1+1=", "22", "5+33=", "7", "40-1="]}),
        processing_class=tokenizer,
        **(judged_by or {"reward_funcs": digits}),
    )


def rounds_of(trainer):
    folder = Path(trainer.args.output_dir) / "rounds" / "round_0"
    return pq.read_table(folder / "candidates.parquet").to_pylist(), pq.read_table(
        folder / "pairs.parquet"
    ).to_pylist()


def accepted_by_hand(group, dedup, beta, seed):
    """Texts and scores that a group keeps, from what the round wrote and the card's algorithm."""
    rng = random.Random(f"{seed} 0 {('rso', group['row'])}")
    members = list(zip(group["completions"], group["scores"], strict=True))
    rng.shuffle(members)
    if dedup:
        members = list(dict(members).items())
    order = by_the_listing([score for _, score in members], 4, beta, rng)
    return [members[i] for i in order]


@pytest.mark.parametrize("dedup", [True, False])
def test_first_round_pairs_neighbors_in_the_order_of_acceptance(dedup, tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, rso_dedup=dedup, rso_beta=0.7)
    trainer.train()
    groups, pairs = rounds_of(trainer)
    expected = []
    for group in groups:
        kept = accepted_by_hand(group, dedup, 0.7, trainer.args.seed)
        for (a, ra), (b, rb) in zip(kept[::2], kept[1::2], strict=False):
            if ra != rb:
                expected.append((group["row"], *((a, b) if ra > rb else (b, a))))
    assert [(pair["row"], pair["chosen"], pair["rejected"]) for pair in pairs] == expected and expected
    row = trainer.state.log_history[0]
    assert 0 < row["online/rso_acceptance"] <= 1 and row["online/rso_score_after"] > row["online/rso_score_before"]
    margins = [pair["chosen_score"] - pair["rejected_score"] for pair in pairs]
    assert row["online/rso_pair_margin"] == pytest.approx(sum(margins) / len(margins))


def test_tournament_lets_winners_go_on(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, rso_pairing="tournament", rso_num_samples=5)
    rewards = iter([3.0, 1.0, 2.0, 2.0, 5.0, 4.0])
    group = Group({"prompt": "1"}, 0, [5], [Candidate(f"{i}", [5], True, score=next(rewards)) for i in range(5)])
    other = Group({"prompt": "2"}, 1, [6], [Candidate("x", [5], True, score=1.0)])
    trainer._accepted_candidates = lambda groups: [list(group.candidates) for group in groups]
    pairs = trainer.pair([group, other, Group({"prompt": "3"}, 2, [7])])
    # 3 beats 1; 2 against 2 makes no pair and the first goes on; 5 has no opponent. Then 3 beats 2, then 5 beats 3
    found = [(pair.chosen.score, pair.rejected.score) for pair in pairs]
    assert found == [(3.0, 1.0), (3.0, 2.0), (5.0, 3.0)]
    assert all(pair.group is group for pair in pairs)


def test_judge_gives_logits_against_one_candidate_and_decides_pairs(tiny_path, tokenizer, tmp_path):
    asked = []

    def watched(prompts, firsts, seconds):
        asked.extend(zip(firsts, seconds, strict=True))
        return ranker(prompts, firsts, seconds)

    trainer = make(tiny_path, tokenizer, tmp_path, judged_by={"judge": watched})
    trainer.train()
    groups, pairs = rounds_of(trainer)
    # Nobody is compared with itself, although the baseline is a candidate
    assert asked and all(first != second for first, second in asked)
    for group in groups:
        counts = [sum(c.isdigit() for c in text) for text in group["completions"]]
        baseline = random.Random(f"{trainer.args.seed} 0 {('rso baseline', group['row'])}").choice(counts)
        for count, score in zip(counts, group["scores"], strict=True):
            # The place's advantage cancels
            p = 0.5 + 0.98 * (1 / (1 + math.exp(baseline - count)) - 0.5)
            assert score == pytest.approx(math.log(p / (1 - p)))
    assert pairs and all(map(more_digits, pairs))


def more_digits(pair) -> bool:
    chosen, rejected = (sum(c.isdigit() for c in pair[side]) for side in ("chosen", "rejected"))
    return chosen > rejected


def test_pairing_none_leaves_judge_and_pairs_to_the_base(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, judged_by={"judge": ranker}, rso_pairing="none")
    trainer.train()
    groups, pairs = rounds_of(trainer)
    assert all(0 <= score <= 1 for group in groups for score in group["scores"])
    scores = {group["row"]: group["scores"] for group in groups}
    assert all(pair["chosen_score"] == max(scores[pair["row"]]) for pair in pairs)
    assert not any(name.startswith("online/rso") for row in trainer.state.log_history for name in row)


def test_candidates_without_score_are_never_paired(tiny_path, tokenizer, tmp_path):
    def patchy(completions, **kwargs):
        return [math.nan if text[:1].isdigit() else float(len(text)) for text in completions]

    trainer = make(tiny_path, tokenizer, tmp_path, judged_by={"reward_funcs": patchy})
    trainer.train()
    groups, pairs = rounds_of(trainer)
    assert any(math.isnan(score) for group in groups for score in group["scores"])
    assert pairs and not any(text[:1].isdigit() for pair in pairs for text in (pair["chosen"], pair["rejected"]))


# --- Losses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_type", "normalized", "loss"),
    [
        ("sigmoid", True, lambda x: math.log1p(math.exp(-x))),
        ("hinge", True, lambda x: max(0.0, 1 - x)),
        ("hinge", False, lambda x: max(0.0, 1 - x)),
        ("sigmoid", False, lambda x: math.log1p(math.exp(-x))),
    ],
)
def test_loss_family(loss_type, normalized, loss, tiny_path, tokenizer, tmp_path):
    options = {"online_iterations": 0, "loss_type": [loss_type], "rso_normalized": normalized, "beta": 0.05}
    trainer = make_trainer(RsoDPOTrainer, tiny_path, tokenizer, tmp_path, **options)
    batch = first_batch(trainer)
    record = trainer.statistics(trainer.model, batch)
    values = []
    for i in range(4):
        # Sums over tokens, by hand
        pi, ref = (
            [sum(tensor[row, t].item() for t in range(tensor.shape[1])) for row in (i, i + 4)]
            for tensor in (record.per_token_logps, record.ref_per_token_logps)
        )
        delta = pi[0] - pi[1] - (ref[0] - ref[1] if normalized else 0.0)
        values.append(loss(0.05 * delta))
    found, _ = loss_and_gradients(trainer, batch)
    assert found.item() == pytest.approx(sum(values) / 4, rel=1e-5)
    metrics = recorded(trainer)
    margins = [(record.logratios[i] - record.logratios[i + 4]).item() for i in range(4)]
    assert metrics["rewards/margins"] == pytest.approx(0.05 * sum(margins) / 4, rel=1e-4)
    assert (metrics["rewards/optimized_margins"] == pytest.approx(metrics["rewards/margins"])) == normalized


def test_raw_loss_does_not_depend_on_the_order_of_methods(tiny_path, tokenizer, tmp_path):
    options = {"online_iterations": 0, "rso_normalized": False, "beta": 0.3, "ln_dpo_length_norm_power": 1.0}
    losses = []
    for methods in ((RsoDPOTrainer, LnDPOTrainer), (LnDPOTrainer, RsoDPOTrainer)):
        trainer = make_trainer(compose(*methods), tiny_path, tokenizer, tmp_path, **options)
        batch = first_batch(trainer)
        losses.append(loss_and_gradients(trainer, batch)[0])
    record = trainer.statistics(trainer.model, batch)
    per_token = record.logps / record.lengths
    assert torch.equal(*losses)
    expected = -torch.nn.functional.logsigmoid(0.3 * (per_token[:4] - per_token[4:])).mean()
    torch.testing.assert_close(losses[0], expected.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rso_num_samples": 65}, r"`rso_num_samples` must be at most `online_num_samples` \(64\), got 65"),
        ({"rso_num_samples": 1}, r"`rso_num_samples` must be a number in \[2, inf\), got 1"),
        ({"rso_beta": -1.0}, "`rso_beta` must be .* got -1.0"),
        ({"rso_pairing": "all"}, "`rso_pairing` must be one of 'first_round', 'tournament', 'none', got 'all'"),
        (
            {"rso_normalized": False, "loss_type": ["aot"]},
            r"`rso_normalized=False` needs `loss_type`s .* got \['aot'\]",
        ),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RsoDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)


def test_fewer_candidates_are_fine_offline(tmp_path):
    RsoDPOConfig(str(tmp_path), online_iterations=0, online_num_samples=2, bf16=False, use_cpu=True)
