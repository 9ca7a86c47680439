import json
import math
from statistics import fmean

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from papertrl import RlhfWorkflowDPOConfig, RlhfWorkflowDPOTrainer
from papertrl.losses.preference.rlhf_workflow import CHOOSE_TYPES, choose_pair
from papertrl.tasks import load_task
from papertrl.trainers.preference.base import PreferenceTrainer
from papertrl.trainers.preference.online.candidates import Candidate, Group
from papertrl.trainers.preference.online.loop import cycled

from ..harness.pairs import PROMPTS, first_batch, history, loss_and_gradients, make_trainer, warmed, weights

ONLINE = {
    "online_iterations": 2,
    "online_num_samples": 4,
    "online_max_new_tokens": 6,
    "online_num_prompts": 8,
    "max_steps": 4,
}


def prompts(repeat: int = 2) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeat})


def varied(completions, **kwargs):
    return [sum(map(ord, text)) % 7 for text in completions]


def make(tiny_path, tokenizer, tmp_path, **options):
    options = {"dataset": prompts(), "reward_funcs": varied, **ONLINE, **options}
    return make_trainer(RlhfWorkflowDPOTrainer, tiny_path, tokenizer, tmp_path, **options)


# --- Selection --------------------------------------------------------------------------------------------------


def by_the_card(scores, lengths, choose_type, penalty, order_by):
    """Selection in plain loops."""
    if len(scores) < 2:
        return None
    penalized = [r - penalty * n for r, n in zip(scores, lengths, strict=True)]
    key = penalized if choose_type == "max_min_p" else scores
    best = 0
    for i in range(len(key)):
        if key[i] > key[best]:
            best = i
    if choose_type == "max_random":
        other = 1 if best == 0 else 0
    elif choose_type == "max_max":
        other = None
        for i in range(len(key)):
            if i != best and (other is None or key[i] > key[other]):
                other = i
    else:
        other = 0
        for i in range(len(key)):
            if key[i] < key[other]:
                other = i
    if scores[best] == scores[other]:
        return None
    swapped = choose_type == "max_min_p" and order_by == "raw" and scores[best] < scores[other]
    return (other, best) if swapped else (best, other)


@given(
    # Few values, so that there are ties
    candidates=st.lists(st.tuples(st.integers(-2, 2), st.integers(1, 5)), max_size=6),
    choose_type=st.sampled_from(CHOOSE_TYPES),
    penalty=st.sampled_from([0.0, 0.3, 1.0]),
    order_by=st.sampled_from(["penalized", "raw"]),
)
def test_selection_is_the_card_s(candidates, choose_type, penalty, order_by):
    scores, lengths = [float(r) for r, _ in candidates], [n for _, n in candidates]
    found = choose_pair(scores, lengths, choose_type, penalty, order_by)
    assert found == by_the_card(scores, lengths, choose_type, penalty, order_by)
    if found is not None:
        chosen, rejected = found
        by = "penalized" if choose_type == "max_min_p" and order_by == "penalized" else "raw"
        penalty = penalty if by == "penalized" else 0.0
        assert scores[chosen] - penalty * lengths[chosen] > scores[rejected] - penalty * lengths[rejected]


@pytest.mark.parametrize(
    ("choose_type", "expected"),
    [("max_min", (2, 3)), ("max_random", (2, 0)), ("max_max", (2, 0)), ("max_min_p", (1, 2))],
)
def test_selection_by_hand(choose_type, expected):
    assert choose_pair([2.0, 1.0, 3.0, 0.0], [9, 2, 20, 3], choose_type, 0.5) == expected


def test_penalized_winner_can_lose_in_the_authors_order():
    scores, lengths = [1.0, 2.0], [1, 9]
    assert choose_pair(scores, lengths, "max_min_p", 0.5) == (0, 1)
    assert choose_pair(scores, lengths, "max_min_p", 0.5, "raw") == (1, 0)


# --- Rounds -----------------------------------------------------------------------------------------------------


def group(index, scores, lengths):
    candidates = [
        Candidate(str(i), [7] * length, True, score=score)
        for i, (score, length) in enumerate(zip(scores, lengths, strict=True))
    ]
    return Group({"prompt": f"{index}="}, index, [5], candidates)


def test_pairs_and_metrics_of_a_round(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, rlhf_choose_type="max_min_p", rlhf_length_penalty=0.5)
    groups = [
        group(0, [1.0, 2.0, 0.0], [2, 9, 1]),
        group(1, [1.0, 1.0, 1.0], [1, 2, 3]),
        # One without a score is not there
        group(2, [3.0, math.nan, 5.0], [4, 1, 2]),
        group(3, [math.nan, math.nan, 5.0], [4, 1, 2]),
    ]
    pairs = trainer.pair(groups)
    assert [(p.group.index, p.chosen.completion, p.rejected.completion) for p in pairs] == [
        (0, "0", "1"),
        (2, "2", "0"),
    ]
    assert trainer.online.metrics == pytest.approx(
        {
            "rlhf_dropped_share": 0.5,
            "rlhf_reward_gap": ((1 - 2) + (5 - 3)) / 2,
            "rlhf_length_gap": ((2 - 9) + (2 - 4)) / 2,
        }
    )


@pytest.mark.parametrize(("choose_type", "penalty"), [("max_min", 0.0), ("max_max", 0.0), ("max_min_p", 0.7)])
def test_trains_on_what_the_selection_says(choose_type, penalty, tiny_path, tokenizer, tmp_path):
    trainer = make(
        tiny_path, tokenizer, tmp_path, rlhf_choose_type=choose_type, rlhf_length_penalty=penalty, save_strategy="no"
    )
    trainer.train()
    for iteration in range(2):
        folder = tmp_path / "rounds" / f"round_{iteration}"
        candidates = pq.read_table(folder / "candidates.parquet").to_pylist()
        pairs = {row["row"]: row for row in pq.read_table(folder / "pairs.parquet").to_pylist()}
        assert len(candidates) == 8
        expected = {}
        for row in candidates:
            assert row["scores"] == varied(row["completions"])
            places = by_the_card(row["scores"], row["lengths"], choose_type, penalty, "penalized")
            if places is not None:
                expected[row["row"]] = [row["completions"][place] for place in places]
        assert {row: [pair["chosen"], pair["rejected"]] for row, pair in pairs.items()} == expected
        assert len(pairs) > 2
        provenance = json.loads((folder / "provenance.json").read_text())
        assert provenance["methods"] == ["rlhf_workflow"]
    assert history(trainer)[0]["online/rlhf_reward_gap"] > 0


def test_first_step_is_dpo_on_the_round_s_pairs(tiny_path, tokenizer, tmp_path):
    trainer = make(
        tiny_path, tokenizer, tmp_path / "online", max_steps=1, online_iterations=1, per_device_train_batch_size=32
    )
    start = weights(trainer)
    trainer.train()
    rows = pq.read_table(tmp_path / "online" / "rounds" / "round_0" / "pairs.parquet").to_pylist()
    # One batch holds all of them as often as it fits; the same by TRL's loss on the prepared rows
    offline = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path / "offline")
    order = cycled(trainer.args.seed, len(rows), 0, 32, "pairs", 0)
    columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = offline.data_collator([{name: rows[i][name] for name in columns} for i in order])
    loss, _ = loss_and_gradients(offline, offline._prepare_inputs(batch))
    assert history(trainer)[0]["loss"] == pytest.approx(loss.item(), abs=1e-4)
    assert any(not torch.equal(value, start[name]) for name, value in weights(trainer).items())


# --- Smoothing --------------------------------------------------------------------------------------------------


def test_smoothing_is_conservative_dpo(tiny_path, tokenizer, tmp_path):
    options = {"online_iterations": 0, "dataset": None, "reward_funcs": None, "beta": 0.7}
    trainer = make(tiny_path, tokenizer, tmp_path, rlhf_label_smoothing=0.1, **options)
    batch = first_batch(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)
    record = trainer.statistics(trainer.model, batch)
    chosen, rejected = record.logratios.chunk(2)
    expected = 0.0
    for delta in chosen - rejected:
        expected = expected + 0.9 * torch.log1p((-0.7 * delta).exp()) + 0.1 * torch.log1p((0.7 * delta).exp())
    expected = expected / len(chosen)
    torch.testing.assert_close(loss, expected.detach())
    trainer.model.zero_grad()
    expected.backward()
    by_hand = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, by_hand, rtol=1e-4, atol=1e-6)


def test_two_reasons_to_smooth_are_independent(tiny_path, tokenizer, tmp_path):
    stages = {"smoothing": lambda record: torch.tensor([0.0, 0.5, 1.0])}
    trainer = make(tiny_path, tokenizer, tmp_path, rlhf_label_smoothing=0.1, stages=stages)
    record = trainer.statistics(trainer.model, trainer._prepare_inputs(batch_of_pairs(trainer)))
    assert trainer.smoothing(record).tolist() == pytest.approx([0.1, 0.5, 0.9])
    trainer.args.rlhf_label_smoothing = 0.0
    assert trainer.smoothing(record).tolist() == [0.0, 0.5, 1.0]
    trainer.user_stages.clear()
    assert trainer.smoothing(record) is None


def batch_of_pairs(trainer):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7 + i, 2], "rejected_ids": [9, 2]} for i in range(3)]
    return trainer.data_collator(rows)


# --- Reward models ----------------------------------------------------------------------------------------------


def test_pairs_by_a_reward_model_that_trl_trained(tiny_path, tokenizer, tmp_path):
    # Easy to judge: length decides
    task = load_task("marker", letters=4, max_length=8, cost=0.5)
    problems = task.generate(256, 0)
    reward_args = RewardConfig(
        str(tmp_path / "reward"),
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        max_steps=60,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
    )
    reward_trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=1),
        reward_args,
        train_dataset=task.preference(problems),
        processing_class=tokenizer,
    )
    reward_trainer.train()
    reward_trainer.save_model()
    rows = task.demonstrations(64, 0, 0.5)
    policy = warmed(tiny_path, tokenizer, [p + c for p, c in zip(rows["prompt"], rows["completion"], strict=True)])
    trainer = make(
        tiny_path,
        tokenizer,
        tmp_path / "policy",
        model=policy,
        dataset=problems,
        reward_funcs=str(tmp_path / "reward"),
        online_iterations=1,
        online_max_new_tokens=9,
        online_num_prompts=64,
        max_steps=1,
    )
    trainer.train()
    folder = tmp_path / "policy" / "rounds" / "round_0"
    reward_model = reward_trainer.model.eval()
    for row in pq.read_table(folder / "candidates.parquet").to_pylist()[:8]:
        for text, finished, score in zip(row["completions"], row["finished"], row["scores"], strict=True):
            # As it was trained: with an end, unless the completion was cut off
            ids = tokenizer(row["prompt"] + text + tokenizer.eos_token * finished, return_tensors="pt")
            assert score == pytest.approx(reward_model(**ids).logits.item(), abs=1e-4)
    pairs = pq.read_table(folder / "pairs.parquet").to_pydict()
    better, worse = (fmean(task.true_reward(pairs["prompt"], pairs[side])) for side in ("chosen", "rejected"))
    assert better > worse + 0.1


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rlhf_choose_type": "best"}, "`rlhf_choose_type` must be one of 'max_min'.*got 'best'"),
        ({"rlhf_length_penalty": -0.1}, "`rlhf_length_penalty` must be a number in .*got -0.1"),
        ({"rlhf_length_penalty": 0.1}, "`rlhf_length_penalty=0.1` acts with `rlhf_choose_type='max_min_p'` alone"),
        ({"rlhf_label_smoothing": 0.5}, "`rlhf_label_smoothing` must be a number in .*got 0.5"),
        ({"rlhf_order_by": "length"}, "`rlhf_order_by` must be one of 'penalized', 'raw', got 'length'"),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RlhfWorkflowDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)


def test_one_completion_makes_no_pair(tiny_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"made no pair to train on.*raise `online_num_samples`"):
        make(tiny_path, tokenizer, tmp_path, online_num_samples=1).train()


def test_needs_somebody_to_judge(tiny_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs `reward_funcs`"):
        make(tiny_path, tokenizer, tmp_path, reward_funcs=None)
