import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from papertrl import IrpoDPOConfig, IrpoDPOTrainer
from papertrl.losses.preference.irpo import (
    exchanged_weights,
    item_scores,
    item_weights,
    list_loss,
    ndcg,
    reciprocal_rank,
)
from papertrl.trainers.preference import ranking
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import first_batch, history, loss_and_gradients, make_trainer, pairs, perturbed, recorded, weights

LISTS = [
    {"prompt": "even: ", "completions": ["1", "22", "3", "4"], "relevance": [0, 2, 0, 1]},
    {"prompt": "5+5=", "completions": ["10", "333"], "relevance": [1, 0]},
    {"prompt": "first: ", "completions": ["abc", "d", "ef"], "relevance": [1, 3, 0]},
    {"prompt": "7", "completions": ["777", "7", "77", "0", "70"], "relevance": [0, 0, 0, 0, 4]},
]


def lists(rows=LISTS, repeat: int = 4) -> Dataset:
    return Dataset.from_list([row for _ in range(repeat) for row in rows])


def a_trainer(tiny_path, tokenizer, tmp_path, dataset=None, **options):
    return make_trainer(
        IrpoDPOTrainer, tiny_path, tokenizer, tmp_path, dataset=lists() if dataset is None else dataset, **options
    )


# --- The mathematics --------------------------------------------------------------------------------------------


@st.composite
def ragged(draw):
    """Lists of (score, relevance, rank), and how many slots there are."""
    number = st.floats(-5, 5, width=32)
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    rows = []
    for size in sizes:
        ranks = draw(st.permutations(range(1, size + 1)))
        rows.append([(draw(number), draw(st.integers(0, 4)), rank) for rank in ranks])
    return rows, max(1, *sizes) + draw(st.integers(0, 2))


def padded(rows, slots, junk=7.0):
    """Scores, relevance, ranks and mask of lists; slots without an item hold junk."""
    filled = [row + [(junk, junk, junk)] * (slots - len(row)) for row in rows]
    scores, relevance, ranks = torch.tensor(filled, dtype=torch.float64).unbind(2)
    mask = torch.tensor([[i < len(row) for i in range(slots)] for row in rows])
    return scores, relevance, ranks, mask


def weight_of(relevance, rank, weighting):
    gain, discount = 2**relevance - 1, math.log2(1 + rank)
    return {"dcg": gain / discount, "position": 1 / discount, "inverse_rank": gain / rank}[weighting]


def direct_loss(scores, row_weights, beta, normalize):
    """The paper's list loss in plain loops over tensors of one number."""
    n, total = len(scores), torch.zeros((), dtype=torch.float64)
    if n < 2:
        return total
    for i in range(n):
        competition = sum(torch.exp(beta * (scores[j] - scores[i])) for j in range(n) if j != i)
        z = torch.log(competition / (n - 1) if normalize else competition)
        total = total + row_weights[i] * -torch.log(torch.sigmoid(-z))
    return total / n if normalize else total


@given(
    batch=ragged(),
    beta=st.sampled_from([0.1, 1.0, 2.0]),
    weighting=st.sampled_from(["dcg", "position", "inverse_rank"]),
    normalize=st.booleans(),
)
def test_list_loss_and_its_gradient_are_the_equation(batch, beta, weighting, normalize):
    rows, slots = batch
    scores, relevance, ranks, mask = padded(rows, slots)
    item_weight = item_weights(relevance, ranks, mask, weighting)
    leaves = [[torch.tensor(s, dtype=torch.float64, requires_grad=True) for s, _, _ in row] for row in rows]
    expected = [
        direct_loss(leaf, [weight_of(rel, rank, weighting) for _, rel, rank in row], beta, normalize)
        for leaf, row in zip(leaves, rows, strict=True)
    ]
    scores.requires_grad_()
    losses, z = list_loss(scores, item_weight, mask, beta, normalize)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert z.isfinite().all() and (z[~mask] == 0).all()
    losses.sum().backward()
    sum(expected, torch.zeros((), dtype=torch.float64, requires_grad=True)).backward()
    for i, leaf in enumerate(leaves):
        grads = [0.0 if t.grad is None else t.grad.item() for t in leaf]
        assert scores.grad[i].tolist() == pytest.approx(grads + [0.0] * (slots - len(leaf)), rel=1e-7, abs=1e-12)


@given(batch=ragged())
def test_what_fills_up_a_list_does_not_matter(batch):
    rows, slots = batch
    results = []
    for junk in (0.0, 1e4, -1e4):
        scores, relevance, ranks, mask = padded(rows, slots, junk)
        item_weight = item_weights(relevance.clamp(min=0), ranks.abs() + 1, mask)
        quality = [ndcg(scores, relevance.clamp(min=0), mask, k) for k in (1, 3)]
        results.append(torch.stack([list_loss(scores, item_weight, mask, 1.0)[0], *quality]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[1e4, -1e4, 0.0], [-3e4, 3e4, 3e4]], requires_grad=True)
    ones = torch.ones(2, 3)
    losses, _ = list_loss(scores, ones, ones.bool(), 5.0)
    losses.sum().backward()
    assert losses.isfinite().all() and scores.grad.isfinite().all()


@given(batch=ragged(), k=st.integers(1, 6))
def test_ndcg_and_reciprocal_rank_of_sorted_items(batch, k):
    rows, slots = batch
    scores, relevance, _, mask = padded(rows, slots)
    expected, expected_rr = [], []
    for row in rows:
        order = sorted(row, key=lambda item: -item[0])
        ideal = sorted(row, key=lambda item: -item[1])
        dcg, best = (
            sum((2 ** item[1] - 1) / math.log2(place + 2) for place, item in enumerate(items[:k]))
            for items in (order, ideal)
        )
        expected.append(dcg / best if best else 0.0)
        hits = [place for place, item in enumerate(order, 1) if item[1] > 0]
        expected_rr.append(1 / hits[0] if hits else 0.0)
    assert ndcg(scores, relevance, mask, k).tolist() == pytest.approx(expected)
    assert reciprocal_rank(scores, relevance, mask).tolist() == pytest.approx(expected_rr)


@given(batch=ragged())
def test_exchanged_weights_are_those_of_the_opposite_ranking(batch):
    rows, slots = batch
    _, relevance, ranks, mask = padded(rows, slots)
    given_weights = item_weights(relevance, ranks, mask)
    found = exchanged_weights(given_weights, ranks, mask)
    for i, row in enumerate(rows):
        by_rank = {rank: weight_of(rel, rank, "dcg") for _, rel, rank in row}
        expected = [by_rank[len(row) + 1 - rank] for _, _, rank in row] + [0.0] * (slots - len(row))
        assert found[i].tolist() == pytest.approx(expected)


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=3), mean=st.booleans())
def test_item_scores_are_means_or_sums_over_their_tokens(rows, mean):
    index = torch.tensor(rows)
    logps = -torch.rand(index.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores, present = item_scores(logps, index, 3, mean)
    for i, row in enumerate(rows):
        for item in range(3):
            own = [logps[i, t].item() for t in range(6) if row[t] == item + 1]
            assert present[i, item] == bool(own)
            expected = sum(own) / (len(own) if mean and own else 1)
            assert scores[i, item].item() == pytest.approx(expected)


# --- Rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "relevance", "ranks"),
    [
        ({"relevance": [0, 2, 1]}, [0, 2, 1], [3, 1, 2]),
        ({"relevance": [1, 1, 0]}, [1, 1, 0], [1, 2, 3]),
        ({"ranks": [3, 1, 2]}, [0, 1, 0.5], [3, 1, 2]),
        ({"scores": [0.5, -1.0, 7.0]}, [0.5, 0, 1], [2, 3, 1]),
        ({"scores": [3.0, 2.0, 1.0], "relevance": [0, 0, 1]}, [0, 0, 1], [1, 2, 3]),
        ({"ranks": [2, 1, 3], "relevance": [5, 0, 0], "scores": [1, 2, 3]}, [5, 0, 0], [2, 1, 3]),
    ],
)
def test_what_a_row_leaves_out_is_derived(row, relevance, ranks):
    items = ["a", "b", "c"]
    assert ranking.ranked_list({"completions": items, **row}) == (items, relevance, ranks)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": [], "relevance": []}, "`completions` must hold at least one item"),
        ({"completions": ["a"]}, "must have one of the columns `relevance`, `ranks` and `scores`"),
        ({"completions": ["a", "b"], "relevance": [1]}, r"`relevance` must hold .* 2 `completions`, got \[1\]"),
        ({"completions": ["a", "b"], "relevance": [1, -1]}, r"`relevance` .* at least 0 .* got \[1, -1\]"),
        ({"completions": ["a", "b"], "ranks": [0, 1]}, "`ranks` must hold one finite number of at least 1"),
        ({"completions": ["a", "b"], "scores": [0.0, math.nan]}, "`scores` must hold one finite number"),
    ],
)
def test_refuses_rows_that_are_no_lists(row, message):
    with pytest.raises(ValueError, match=message):
        ranking.ranked_list(row)


def items_of(tokenizer, columns):
    """Text of each item's tokens, in the order of their numbers."""
    texts = {}
    for ids, index in zip(columns["irpo_completion_ids"], columns["irpo_item_index"], strict=True):
        for token, number in zip(ids, index, strict=True):
            texts.setdefault(number, []).append(token)
    return [tokenizer.decode(texts[number]) for number in sorted(texts) if number]


@pytest.mark.parametrize("separator", ["\n", ", ", ""])
def test_in_context_holds_all_items_in_an_order_of_its_own(separator, tokenizer):
    seen = set()
    for seed in range(6):
        columns = ranking.tokenize_list(LISTS[0], tokenizer, "in_context", separator, seed)
        again = ranking.tokenize_list(LISTS[0], tokenizer, "in_context", separator, seed)
        assert columns == again
        items = items_of(tokenizer, columns)
        assert sorted(items) == ["1", "22", "3", "4"]
        assert dict(zip(items, columns["irpo_relevance"], strict=True)) == {"1": 0, "22": 2, "3": 0, "4": 1}
        assert columns["irpo_ranks"][items.index("22")] == 1 and columns["irpo_ranks"][items.index("4")] == 2
        assert tokenizer.decode(columns["irpo_prompt_ids"]) == "even: "
        assert tokenizer.decode(columns["irpo_completion_ids"][0]) == separator.join(items)
        seen.add(tuple(items))
    assert len(seen) > 3


CHAT = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def chat_tokenizer(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = CHAT
    return tokenizer


def as_chat(row):
    answers = [[{"role": "assistant", "content": text}] for text in row["completions"]]
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], "completions": answers}


def test_messages_make_one_answer_or_one_each(chat_tokenizer):
    row = as_chat(LISTS[2])
    columns = ranking.tokenize_list(row, chat_tokenizer, "in_context", "\n", 0)
    items = items_of(chat_tokenizer, columns)
    assert sorted(items) == ["abc", "d", "ef"]
    assert chat_tokenizer.decode(columns["irpo_prompt_ids"]) == "<u>first: |<a>"
    columns = ranking.tokenize_list(row, chat_tokenizer, "separate", "\n", 0)
    assert items_of(chat_tokenizer, columns) == ["abc|", "d|", "ef|"]
    assert chat_tokenizer.decode(columns["irpo_prompt_ids"]) == "<u>first: |<a>"
    long = {**row, "completions": [answer * 2 for answer in row["completions"]]}
    with pytest.raises(ValueError, match=r"`completions` must hold items of one message each, got \[2, 2, 2\]"):
        ranking.tokenize_list(long, chat_tokenizer, "in_context", "\n", 0)
    chat_tokenizer.chat_template = CHAT.replace("m.content", "m.content | upper")
    with pytest.raises(ValueError, match="The chat template changes the list"):
        ranking.tokenize_list(row, chat_tokenizer, "in_context", "\n", 0)


def test_trains_on_messages(tiny_path, chat_tokenizer, tmp_path):
    for layout in ("in_context", "separate"):
        dataset = Dataset.from_list([as_chat(row) for row in LISTS] * 2)
        trainer = a_trainer(
            tiny_path, chat_tokenizer, tmp_path, dataset, irpo_layout=layout, per_device_train_batch_size=8
        )
        trainer.train()
        assert history(trainer)[0]["irpo/items"] == pytest.approx((4 + 2 + 3 + 5) / 4)


# --- A step -----------------------------------------------------------------------------------------------------


def log_probs(model, ids):
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [logits[t - 1, ids[t]] for t in range(1, len(ids))]


def by_hand(trainer, rows, layout, weighting="dcg", mean=True, normalize=True):
    """Mean list loss, a list at a time and an item at a time."""
    losses = []
    for row in rows:
        columns = ranking.tokenize_list(row, trainer.tokenizer, layout, "\n", trainer.args.seed)
        ratios = {}
        for ids, index in zip(columns["irpo_completion_ids"], columns["irpo_item_index"], strict=True):
            prompt = columns["irpo_prompt_ids"]
            policy = log_probs(trainer.model, prompt + ids)
            with torch.no_grad():
                reference = log_probs(trainer.ref_model, prompt + ids)
            for t, number in enumerate(index):
                at = len(prompt) + t - 1
                ratios.setdefault(number, []).append(policy[at] - reference[at])
        items = range(1, len(row["completions"]) + 1)
        r = [sum(ratios[i]) / (len(ratios[i]) if mean else 1) for i in items]
        item_weight = [
            weight_of(rel, rank, weighting)
            for rel, rank in zip(columns["irpo_relevance"], columns["irpo_ranks"], strict=True)
        ]
        losses.append(direct_loss(r, item_weight, trainer.beta, normalize))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("layout", ["in_context", "separate"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"share_prompts": True},
        {"irpo_weighting": "inverse_rank", "irpo_item_score": "sum", "irpo_normalize": False, "beta": 0.3},
    ],
)
def test_loss_and_gradient_are_the_paper_s_by_hand(layout, options, tiny_path, tokenizer, tmp_path):
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, irpo_layout=layout, check_records=True, **options)
    # A process of its own for each list, so that all are there once
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    loss, gradients = loss_and_gradients(trainer, batch)
    expected = by_hand(
        trainer,
        LISTS,
        layout,
        options.get("irpo_weighting", "dcg"),
        options.get("irpo_item_score", "mean") == "mean",
        options.get("irpo_normalize", True),
    )
    torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-4, atol=1e-6)
    trainer.model.zero_grad()
    expected.backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("layout", ["in_context", "separate"])
def test_the_record_s_pairs_are_best_and_worst_items(layout, tiny_path, tokenizer, tmp_path):
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, irpo_layout=layout, irpo_item_score="sum")
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(4)]))
    record = trainer.statistics(trainer.model, batch)
    record.check_values()
    ended = "" if layout == "in_context" else tokenizer.eos_token
    texts = [
        tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(record.input_ids, record.completion_mask, strict=True)
    ]
    # Of equally irrelevant items the last one of the list is the worst, in context of the shuffled one
    assert texts[:4] == [text + ended for text in ("22", "10", "d", "70")]
    assert texts[5:7] == [text + ended for text in ("333", "ef")]
    if layout == "separate":
        assert [texts[4], texts[7]] == ["3" + ended, "0" + ended]
    # They score on their own as they did in the list: what comes after an item is cut off
    again = trainer.score_sequences(
        trainer.model, record.input_ids, record.attention_mask, record.completion_mask.clone()
    )
    torch.testing.assert_close(again, record.per_token_logps, rtol=1e-4, atol=1e-5)
    chosen, rejected = trainer.scores(record)
    torch.testing.assert_close(torch.cat([chosen, rejected]), record.logratios)
    loss_and_gradients(trainer, batch)
    metrics = recorded(trainer)
    assert metrics["rewards/optimized_margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)


def test_a_pair_apart_is_half_of_dpo_per_token(tiny_path, tokenizer, tmp_path):
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, loss_type="sigmoid_norm", beta=1.0)
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, pairs(), irpo_layout="separate")
    (base_loss, base_gradients), (loss, gradients) = (loss_and_gradients(t, first_batch(t)) for t in (base, trainer))
    torch.testing.assert_close(loss, base_loss / 2)
    for name, gradient in base_gradients.items():
        torch.testing.assert_close(gradients[name], gradient / 2, rtol=1e-3, atol=1e-7)
    # The other metrics are those of the same pairs
    base_metrics, metrics = recorded(base), recorded(trainer)
    for name in ("rewards/chosen", "rewards/accuracies", "logps/rejected", "entropy", "num_tokens"):
        assert metrics[name] == pytest.approx(base_metrics[name], rel=1e-4)


def test_the_order_of_separate_items_does_not_matter(tiny_path, tokenizer, tmp_path):
    turned = [{name: v[::-1] if name != "prompt" else v for name, v in row.items()} for row in LISTS]
    losses = []
    for rows in (LISTS, turned):
        trainer = a_trainer(tiny_path, tokenizer, tmp_path, lists(rows, 1), irpo_layout="separate")
        losses.append(trainer.compute_loss(trainer.model, first_batch(trainer)))
    torch.testing.assert_close(losses[0], losses[1])


@pytest.mark.parametrize("layout", ["in_context", "separate"])
def test_lists_that_say_nothing_do_not_count(layout, tiny_path, tokenizer, tmp_path):
    single = {"prompt": "1", "completions": ["22"], "relevance": [1]}
    irrelevant = {"prompt": "2", "completions": ["22", "3"], "relevance": [0, 0]}
    rows = [LISTS[0], single, irrelevant, LISTS[2]]
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, lists(rows, 1), irpo_layout=layout)
    batch = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    loss, gradients = loss_and_gradients(trainer, batch)
    metrics = recorded(trainer)
    torch.testing.assert_close(
        loss, by_hand(trainer, [LISTS[0], LISTS[2]], layout).detach().float(), rtol=1e-4, atol=1e-6
    )
    assert metrics["irpo/skipped_lists"] == 0.5
    assert all(g.isfinite().all() for g in gradients.values())
    # Nothing but such lists: zero, connected to the graph
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in (1, 2)]))
    loss, gradients = loss_and_gradients(trainer, batch)
    assert loss == 0 and all((g == 0).all() for g in gradients.values())
    assert recorded(trainer)["irpo/skipped_lists"] == 1


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_items_cut_away_drop_out(mode, tiny_path, tokenizer, tmp_path):
    row = {"prompt": "12", "completions": ["33", "4", "555"], "relevance": [2, 1, 0]}
    # In context, "33", "4" and "555" with two separators are eight tokens after two of the prompt
    trainer = a_trainer(
        tiny_path, tokenizer, tmp_path, lists([row], 4), max_length=6, truncation_mode=mode, check_records=True
    )
    batch = first_batch(trainer)
    loss, gradients = loss_and_gradients(trainer, batch)
    metrics = recorded(trainer)
    columns = trainer.train_dataset[0]
    index = (
        ([0, 0] + columns["irpo_item_index"][0])[:6] if mode == "keep_start" else columns["irpo_item_index"][0][-6:]
    )
    # Nothing predicts the first token of a sequence
    left = len({number for number in index[1:] if number})
    assert left < 3
    assert metrics["irpo/items"] == left
    assert metrics["irpo/dropped_items"] == pytest.approx(1 - left / 3)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


class Doubtful(IrpoDPOTrainer):
    """Says that labels are wrong at a probability that the test sets."""

    doubt = 0.0

    def smoothing(self, record):
        return record.logps.new_full((len(record.logps) // 2,), self.doubt)


def test_smoothed_labels_mix_in_the_opposite_ranking(tiny_path, tokenizer, tmp_path):
    def loss_of(rows, doubt):
        trainer = make_trainer(
            Doubtful, tiny_path, tokenizer, tmp_path, dataset=lists(rows, 1), irpo_layout="separate"
        )
        trainer.doubt = doubt
        return trainer.compute_loss(trainer.model, first_batch(trainer)).item()

    # Weights go with places, so that relevance follows rank
    rows = [{"prompt": "a", "completions": ["1", "22", "3"], "relevance": [2, 1, 0]}, LISTS[1]] * 2
    turned = [{**row, "completions": row["completions"][::-1]} for row in rows]
    right, wrong = loss_of(rows, 0.0), loss_of(turned, 0.0)
    assert abs(right - wrong) > 1e-3
    assert loss_of(rows, 1.0) == pytest.approx(wrong, rel=1e-5)
    assert loss_of(rows, 0.3) == pytest.approx(0.7 * right + 0.3 * wrong, rel=1e-5)


# --- Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["in_context", "separate"])
def test_learns_the_ranking(layout, tiny_path, tokenizer, tmp_path):
    liked = {"a": "312", "b": "231"}
    rows = [
        {"prompt": f"{kind}:", "completions": list("0123"), "ranks": [4, *(liked[kind].index(c) + 1 for c in "123")]}
        for kind in liked
    ]
    trainer = a_trainer(
        tiny_path,
        tokenizer,
        tmp_path,
        lists(rows, 16),
        irpo_layout=layout,
        max_steps=30,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        eval_dataset=lists(rows, 2),
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_irpo/ndcg@1"] < 0.7
    for name in ("ndcg@1", "ndcg@3", "mrr"):
        assert after[f"eval_irpo/{name}"] > 0.95
    assert after["eval_irpo/relevant_z"] < before["eval_irpo/relevant_z"] - 0.2
    assert after["eval_loss"] < before["eval_loss"]


def test_pairs_of_the_online_loop_are_lists_of_two(tiny_path, tokenizer, tmp_path):
    trainer = make_online(tiny_path, tokenizer, tmp_path)
    trainer.train()
    rows = [row for row in history(trainer) if "irpo/items" in row]
    assert len(rows) == 2 and all(row["irpo/items"] == 2 for row in rows)


def make_online(tiny_path, tokenizer, tmp_path):
    def digits(completions, **kwargs):
        return [float(sum(c.isdigit() for c in text)) for text in completions]

    args = IrpoDPOConfig(
        str(tmp_path),
        irpo_layout="separate",
        online_iterations=1,
        online_max_new_tokens=6,
        online_num_samples=4,
        max_steps=2,
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        per_device_train_batch_size=4,
    )
    # The dataset's own lists are not those of the policy
    return IrpoDPOTrainer(
        perturbed(tiny_path), None, args, train_dataset=lists(), processing_class=tokenizer, reward_funcs=digits
    )


# --- Refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"irpo_weighting": "ndcg"}, "`irpo_weighting` must be one of 'dcg', .* got 'ndcg'"),
        ({"irpo_layout": "list"}, "`irpo_layout` must be one of"),
        ({"irpo_item_score": "max"}, "`irpo_item_score` must be one of"),
        ({"beta": 0.0}, "`beta` must be"),
        ({"loss_type": "hinge"}, r"needs `loss_type=\['sigmoid'\]`, got \['hinge'\]"),
        ({"label_smoothing": 0.1}, "needs `label_smoothing=0.0`, got 0.1"),
        ({"ld_alpha": 0.5}, "needs `ld_alpha=None`, got 0.5"),
        ({"precompute_ref_log_probs": True}, "needs `precompute_ref_log_probs=False`, got True"),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        IrpoDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)


def test_without_weighting_it_is_dpo_on_chosen_and_rejected(tiny_path, tokenizer, tmp_path):
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, loss_type="hinge")
    trainer = a_trainer(tiny_path, tokenizer, tmp_path, pairs(), irpo_weighting="none", beta=0.1, loss_type="hinge")
    for t in (base, trainer):
        t.train()
    for name, value in weights(base).items():
        assert torch.equal(value, weights(trainer)[name])
    assert not any(name.startswith("irpo") for row in history(trainer) for name in row)
