from copy import deepcopy

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from papertrl import RlhfWorkflowDPOTrainer, XpoDPOConfig, XpoDPOTrainer, compose
from papertrl.losses.preference.xpo import explored_logps, scheduled
from papertrl.trainers.preference.base import PreferenceTrainer
from papertrl.trainers.preference.online.candidates import Candidate, Group, Pair
from papertrl.trainers.preference.online.draw import keyed_seed
from papertrl.trainers.preference.sampling import sample_completions

from ..harness.pairs import CHOSEN, PROMPTS, history, loss_and_gradients, make_trainer, pairs, perturbed, recorded

ONLINE = {
    "online_iterations": 2,
    "online_max_new_tokens": 6,
    "online_num_prompts": 8,
    "max_steps": 4,
    "beta": 0.3,
    "xpo_alpha": [0.2, 0.1],
}


def prompts(repeat: int = 2) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS * repeat, "chosen": CHOSEN * repeat})


def varied(completions, **kwargs):
    return [sum(map(ord, text)) % 7 for text in completions]


def make(tiny_path, tokenizer, tmp_path, cls=XpoDPOTrainer, **options):
    options = {"dataset": prompts(), "reward_funcs": varied, **ONLINE, **options}
    return make_trainer(cls, tiny_path, tokenizer, tmp_path, **options)


# --- Mathematics ------------------------------------------------------------------------------------------------


@st.composite
def batches(draw):
    count, time = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = st.lists(st.floats(-9, 0), min_size=time, max_size=time)
    values = draw(st.lists(row, min_size=2 * count, max_size=2 * count))
    return values, draw(st.lists(st.sampled_from([-1, 0, 1]), min_size=count, max_size=count))


@given(batches())
def test_explored_is_the_chosen_or_the_rejected_completion(batch):
    values, explored = batch
    count = len(explored)
    tensor = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    found = explored_logps(tensor, torch.tensor(explored))
    expected, gradient = [], torch.zeros_like(tensor)
    for i, side in enumerate(explored):
        row = {1: i, -1: i + count}.get(side)
        expected.append(0.0 if row is None else sum(values[row]))
        if row is not None:
            gradient[row] = 1.0
    assert found.tolist() == pytest.approx(expected)
    found.sum().backward()
    torch.testing.assert_close(tensor.grad, gradient)


def test_last_entry_of_a_schedule_holds_on():
    assert [scheduled([3.0, 2.0, 0.0], i) for i in range(5)] == [3.0, 2.0, 0.0, 0.0, 0.0]
    assert scheduled([0.5], 7) == 0.5


def test_dataset_completion_begins_where_the_candidates_do(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, xpo_sampler="offline")
    row = {"prompt": "1+1=", "chosen": "23"}
    prompt_ids = tokenizer("1+1=")["input_ids"]
    apart = [*tokenizer("2")["input_ids"], *tokenizer("3")["input_ids"], tokenizer.eos_token_id]
    for chosen in ("23", "23" + tokenizer.eos_token):
        found = trainer.dataset_candidate(Group(row | {"chosen": chosen}, 0, prompt_ids), "chosen")
        assert (found.completion, found.completion_ids, found.source) == ("23", apart, "dataset")
    trainer._tokenizer = deepcopy(tokenizer)
    trainer.tokenizer.add_tokens(["=2"])
    assert len(trainer.tokenizer("1+1=2")["input_ids"]) == len(prompt_ids)
    assert trainer.dataset_candidate(Group(row, 0, prompt_ids), "chosen").completion_ids == apart


# --- Rounds -----------------------------------------------------------------------------------------------------


def rounds(tmp_path, iteration=0):
    folder = tmp_path / "rounds" / f"round_{iteration}"
    return [pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("candidates", "pairs")]


@pytest.mark.parametrize(
    ("sampler", "source"), [("reference", "reference"), ("policy", "policy"), ("offline", "dataset")]
)
def test_one_candidate_is_the_sampler_s_and_marked(sampler, source, tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, xpo_sampler=sampler)
    trainer.train()
    candidates, pairs = rounds(tmp_path)
    assert all(row["sources"] == ["policy", source] for row in candidates)
    assert len(pairs) == len(candidates) == 8
    by_row = {row["row"]: row for row in candidates}
    for pair in pairs:
        sampled, explored = by_row[pair["row"]]["completions"]
        first, second = by_row[pair["row"]]["scores"]
        # The policy's sample wins ties
        expected = [sampled, explored] if first >= second else [explored, sampled]
        assert [pair["chosen"], pair["rejected"]] == expected
        assert pair["xpo_explored"] == (-1 if first >= second else 1)
        if sampler == "offline":
            assert explored == CHOSEN[pair["row"] % 8]
            ids = pair["rejected_ids" if first >= second else "chosen_ids"]
            assert ids == tokenizer(explored, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    won = sum(pair["xpo_explored"] == 1 for pair in pairs) / len(pairs)
    first = history(trainer)[0]
    assert first["online/xpo_explored_win_rate"] == won
    assert 0 < won < 1
    assert first["xpo/explored_share"] == 1
    assert [row["xpo/alpha"] for row in history(trainer) if "loss" in row] == [0.2, 0.2, 0.1, 0.1]


def test_reference_s_candidates_are_the_reference_s(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, model=perturbed(tiny_path, scale=0.5))
    group = Group({"prompt": "1+"}, 0, [5, 6, 7])
    trainer.propose([group])
    sampled, explored = group.candidates
    assert [sampled.source, explored.source] == ["policy", "reference"]
    prompt = torch.tensor([[5, 6, 7]])
    draws = []
    for model in (trainer.ref_model, trainer.model):
        seeds = [keyed_seed(trainer.args.seed, 0, 0, 1, "reference")]
        ids, _, mask = sample_completions(
            model, prompt, torch.ones_like(prompt), seeds, 6, 0, [tokenizer.eos_token_id]
        )
        draws.append(ids[mask.bool()].tolist())
    assert explored.completion_ids == draws[0]
    assert draws[0] != draws[1]


def group(index, scores):
    candidates = [Candidate(str(i), [7 + i], True, score=float(score)) for i, score in enumerate(scores)]
    candidates[-1].extras["xpo"] = True
    return Group({"prompt": f"{index}="}, index, [5], candidates)


def test_ties_and_marks(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, online_num_samples=2)
    nan = float("nan")
    groups = [group(0, [1, 2, 0]), group(1, [1, 1, 1]), group(2, [2, 1, 1]), group(3, [nan, 1, 1])]
    groups += [group(4, [1, 0, 2]), group(5, [1, 1, nan]), group(6, [nan, nan, 1])]
    # Identical texts leave the exploration alone
    groups[1].candidates[2].completion_ids = [7]
    found = trainer.select_pairs(trainer.pair(groups))
    told = {p.group.index: (p.chosen.completion, p.rejected.completion, p.extras["xpo_explored"]) for p in found}
    assert told == {
        0: ("1", "2", -1),
        1: ("0", "2", -1),
        2: ("0", "1", 0),
        3: ("1", "2", -1),
        4: ("2", "1", 1),
    }
    assert all(p.extras["xpo_ids"] == p.group.candidates[-1].completion_ids for p in found)
    assert trainer.online.metrics == {"xpo_explored_win_rate": 1 / 4, "xpo_repeated_share": 1 / 5}


@pytest.mark.parametrize("order", [(XpoDPOTrainer, RlhfWorkflowDPOTrainer), (RlhfWorkflowDPOTrainer, XpoDPOTrainer)])
def test_another_method_s_pairing_decides_about_ties(order, tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, compose(*order), online_num_samples=2)
    found = trainer.select_pairs(trainer.pair([group(0, [1, 2, 0]), group(1, [1, 1, 1])]))
    assert [(p.group.index, p.extras["xpo_explored"]) for p in found] == [(0, -1)]
    trainer.train()
    assert all(row["xpo/explored_share"] == 1 for row in history(trainer) if "loss" in row)


def test_a_group_without_explored_candidate_explores_nothing(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, online_num_samples=2)
    plain = group(0, [1, 0])
    del plain.candidates[-1].extras["xpo"]
    (pair,) = trainer.select_pairs(trainer.pair([plain]))
    assert pair.extras == {"xpo_explored": 0, "xpo_ids": []}
    assert trainer.online.metrics == {}


# --- The step ---------------------------------------------------------------------------------------------------


def log_probability(model, prompt, completion):
    """By plain loops, over logits without any head."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) + t - 1, token] for t, token in enumerate(completion))


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_loss_and_gradient_are_dpo_plus_exploration(num_samples, share_prompts, tiny_path, tokenizer, tmp_path):
    options = {"online_num_samples": num_samples, "share_prompts": share_prompts}
    trainer = make(tiny_path, tokenizer, tmp_path, **options)
    base = make_trainer(
        PreferenceTrainer, tiny_path, tokenizer, tmp_path / "base", beta=0.3, share_prompts=share_prompts
    )
    explored = [Candidate("x", ids, True, extras={"xpo": True}) for ids in ([9, 8, 2], [6, 2], [7, 7, 7])]
    others = [Candidate("y", ids, True) for ids in ([4, 2], [9, 9, 9, 2], [5, 2])]
    third = Candidate("z", [8, 8, 2], True)
    sides = [(explored[0], others[0]), (others[1], explored[1]), (explored[2], others[2])]
    if num_samples == 2:
        # ỹ is in no pair
        sides[2] = (third, others[2])
    prompt_ids = [[5], [5, 6], [5, 6, 7]]
    rows = []
    for i, (chosen, rejected) in enumerate(sides):
        group = Group({"prompt": "p"}, i, prompt_ids[i], [others[i], third, explored[i]])
        (pair,) = trainer.select_pairs([Pair(group, chosen, rejected)])
        ids = {"chosen_ids": chosen.completion_ids, "rejected_ids": rejected.completion_ids}
        rows.append({"prompt_ids": prompt_ids[i], **ids, **pair.extras})
    assert [row["xpo_explored"] for row in rows] == [1, -1, 1 if num_samples == 1 else 0]
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    assert ("xpo_input_ids" in batch["extras"]) == (num_samples == 2)
    plain = {name: value for name, value in batch.items() if name != "extras"}
    (base_loss, base_gradients), (loss, gradients) = (
        loss_and_gradients(t, b) for t, b in ((base, plain), (trainer, batch))
    )
    metrics = recorded(trainer)
    logps = [log_probability(trainer.model, p, c.completion_ids) for p, c in zip(prompt_ids, explored, strict=True)]
    expected = 0.2 * sum(logps) / 3
    torch.testing.assert_close(loss, base_loss + expected.detach(), rtol=1e-5, atol=1e-5)
    trainer.model.zero_grad()
    expected.backward()
    by_hand = {n: base_gradients[n] + p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, by_hand, rtol=1e-3, atol=1e-5)
    assert metrics["loss/xpo"] == pytest.approx(sum(logps).item() / 3, rel=1e-5)
    assert metrics["loss/pair"] == pytest.approx(base_loss.item(), rel=1e-5)
    assert metrics["xpo/explored_share"] == 1


def test_identical_completions_explore_only(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path)
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 2], "rejected_ids": [7, 2], "xpo_explored": -1}
    _, gradients = loss_and_gradients(trainer, trainer._prepare_inputs(trainer.data_collator([row])))
    trainer.model.zero_grad()
    (0.2 * log_probability(trainer.model, [5, 6], [7, 2])).backward()
    by_hand = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(gradients, by_hand, rtol=1e-3, atol=1e-6)


def test_evaluation_is_dpo_s(tiny_path, tokenizer, tmp_path):
    trainer = make(tiny_path, tokenizer, tmp_path, eval_dataset=pairs(1), online_num_samples=2)
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, eval_dataset=pairs(1), beta=0.3)
    assert trainer.evaluate()["eval_loss"] == base.evaluate()["eval_loss"]


def test_pairs_of_earlier_iterations_stay_unless_told(tiny_path, tokenizer, tmp_path):
    kept = make(tiny_path, tokenizer, tmp_path / "kept")
    fresh = make(tiny_path, tokenizer, tmp_path / "fresh", online_accumulate=False)
    kept.train(), fresh.train()
    assert [len(t.online.pairs) for t in (kept, fresh)] == [16, 8]


def test_pushes_down_what_the_reference_says(tiny_path, tokenizer, tmp_path):
    logps = {}
    for alpha in (0.0, 0.1):
        trainer = make(
            tiny_path,
            tokenizer,
            tmp_path / str(alpha),
            model=AutoModelForCausalLM.from_pretrained(tiny_path),
            xpo_alpha=alpha,
            online_iterations=1,
            max_steps=15,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
        )
        trainer.train()
        rows = rounds(tmp_path / str(alpha))[0]
        with torch.no_grad():
            logps[alpha] = sum(
                log_probability(
                    trainer.model,
                    tokenizer(row["prompt"], add_special_tokens=False)["input_ids"],
                    tokenizer(row["completions"][1], add_special_tokens=False)["input_ids"],
                )
                for row in rows
            ).item() / len(rows)
    assert logps[0.1] < logps[0.0] - 1


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xpo_alpha": [-0.1]}, r"`xpo_alpha` must be numbers in \[0, inf\), at least one, got \[-0.1\]"),
        ({"xpo_alpha": [0.1, float("nan")]}, r"`xpo_alpha` must be .*nan"),
        ({"xpo_alpha": []}, r"`xpo_alpha` must be .*got \[\]"),
        ({"xpo_sampler": "ema"}, "`xpo_sampler` must be one of 'reference', 'policy', 'offline', got 'ema'"),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        XpoDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)


def test_a_number_is_a_schedule_of_one(tmp_path):
    assert XpoDPOConfig(str(tmp_path), xpo_alpha=0.1, bf16=False, use_cpu=True).xpo_alpha == [0.1]


def test_offline_sampler_needs_the_column(tiny_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="needs the dataset column 'chosen'"):
        make(tiny_path, tokenizer, tmp_path, xpo_sampler="offline", dataset=prompts().select_columns("prompt"))
