import math
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, Qwen3Config

from papertrl import RlhfWorkflowDPOTrainer, UpoDPOConfig, UpoDPOTrainer, compose
from papertrl.losses.preference.upo import (
    bald,
    draw_pairs,
    halves,
    majority_agrees,
    selection_probabilities,
    smoothing_alpha,
)
from papertrl.models.observation import decoder_layers
from papertrl.models.uncertainty import PairClassifier, TokenizedPair, fit, label_probabilities, loaded_backbone

from ..harness.pairs import first_batch, history, loss_and_gradients, make_trainer, pairs, recorded

# --- Uncertainty ------------------------------------------------------------------------------------------------

PROBABILITY = st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0])


def entropy(p):
    return -sum(q * math.log(q) for q in (p, 1 - p) if q > 0)


@st.composite
def passes(draw):
    pairs = draw(st.integers(1, 5))
    return draw(st.lists(st.lists(PROBABILITY, min_size=pairs, max_size=pairs), min_size=2, max_size=6))


@given(passes())
def test_bald_and_vote_by_plain_loops(rows):
    tensor = torch.tensor(rows, dtype=torch.float64)
    expected, agrees = [], []
    for column in zip(*rows, strict=True):
        expected.append(entropy(sum(column) / len(column)) - sum(map(entropy, column)) / len(column))
        agrees.append(sum(p > 0.5 for p in column) > len(column) / 2)
    found = bald(tensor)
    assert found.tolist() == pytest.approx(expected, abs=1e-9)
    assert ((found >= 0) & (found <= math.log(2))).all()
    assert majority_agrees(tensor).tolist() == agrees


def test_bald_at_its_ends():
    # Sure of the same; sure of different answers; always undecided
    found = bald(torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.0, 0.5]]))
    assert found.tolist() == pytest.approx([0.0, math.log(2), 0.0])
    # The last has no uncertainty, but no majority either
    assert majority_agrees(torch.tensor([[1.0, 1.0, 0.5], [1.0, 0.0, 0.5]])).tolist() == [True, False, False]


UNCERTAINTIES = st.lists(st.tuples(st.floats(0, math.log(2)), st.booleans()), min_size=1, max_size=8)


@given(UNCERTAINTIES, st.floats(0.1, 5), st.floats(0.01, 0.5))
def test_probabilities_and_alpha_by_plain_loops(items, mu, alpha_max):
    uncertainty = torch.tensor([b for b, _ in items], dtype=torch.float64)
    eligible = torch.tensor([ok for _, ok in items])
    total = sum((1 - b) ** mu for b, ok in items if ok)
    expected = [(1 - b) ** mu / total if ok else 0.0 for b, ok in items]
    p = selection_probabilities(uncertainty, eligible, mu)
    assert p.tolist() == pytest.approx(expected)
    count = sum(ok for _, ok in items)
    alphas = {
        "certainty": [alpha_max * b / math.log(2) for b, _ in items],
        "scaled": [1 / (1 + count * q) for q in expected],
        "paper": [1 / (1 + q) for q in expected],
        "none": [0.0] * len(items),
    }
    for mode, values in alphas.items():
        found = smoothing_alpha(uncertainty, p, eligible, mode, alpha_max)
        assert found.tolist() == pytest.approx(values, abs=1e-9), mode


def test_alpha_of_the_paper_turns_labels_around_and_scaled_is_neutral_at_the_average():
    uncertainty, eligible = torch.full((50,), 0.2), torch.ones(50, dtype=torch.bool)
    p = selection_probabilities(uncertainty, eligible)
    assert smoothing_alpha(uncertainty, p, eligible, "paper").min() > 0.97
    torch.testing.assert_close(smoothing_alpha(uncertainty, p, eligible, "scaled"), torch.full((50,), 0.5))
    assert smoothing_alpha(uncertainty, p, eligible).max() < 0.5


def test_draws_follow_the_probabilities_and_never_take_what_the_majority_contradicts():
    uncertainty = torch.tensor([0.0, 0.3, 0.6, 0.1, 0.5])
    eligible = torch.tensor([True, True, True, False, True])
    generator = torch.Generator().manual_seed(0)
    first, hard_first = Counter(), Counter()
    trials = 600
    for _ in range(trials):
        easy, hard = draw_pairs(uncertainty, eligible, 3.0, 0.5, 0.25, generator)
        assert len(easy) == 2 and len(hard) <= 1
        drawn = [*easy.tolist(), *hard.tolist()]
        assert len(set(drawn)) == len(drawn) and 3 not in drawn
        first[drawn[0]] += 1
        hard_first.update(hard.tolist())
    law = selection_probabilities(uncertainty, eligible, 3.0)
    assert all(abs(first[i] / trials - law[i].item()) < 0.08 for i in range(5))
    # The uncertain ones, and never the one without uncertainty
    assert hard_first[2] > hard_first[1] and hard_first[0] == 0


@pytest.mark.parametrize(("rate", "expected"), [(0.01, 1), (0.5, 2), (1.0, 3)])
def test_share_is_that_of_the_eligible_pairs(rate, expected):
    eligible = torch.tensor([True, False, True, True])
    easy, hard = draw_pairs(torch.zeros(4), eligible, 1.0, rate, 1.0, torch.Generator().manual_seed(0))
    assert len(easy) == expected and len(hard) == 0
    easy, hard = draw_pairs(torch.zeros(4), ~eligible & False, 1.0, rate, 1.0, torch.Generator().manual_seed(0))
    assert len(easy) == len(hard) == 0


@given(st.lists(st.integers(0, 4).map(float), max_size=9))
def test_pairs_are_upper_against_lower_half(scores):
    ranked = sorted(scores, reverse=True)
    n = len(scores) // 2
    expected = [(w, l) for w in ranked[:n] for l in ranked[len(scores) - n :] if w > l]  # noqa: E741
    found = [(scores[chosen], scores[rejected]) for chosen, rejected in halves(scores)]
    assert found == expected
    assert len(set(halves(scores))) == len(expected)


# --- The classifier ---------------------------------------------------------------------------------------------


def classifier_of(tiny_path, dropout=0.2):
    torch.manual_seed(0)
    return PairClassifier(AutoModel.from_pretrained(tiny_path), dropout)


def test_probability_is_the_mean_over_orders_whatever_the_batch(tiny_path):
    classifier = classifier_of(tiny_path, dropout=1e-9)
    some = [TokenizedPair([5, 6], [7, 8, 2], [9, 2]), TokenizedPair([5], [9], [7, 2]), TokenizedPair([6] * 9, [7], [])]
    found = label_probabilities(classifier, some, passes=2, batch_size=2)
    expected = []
    for prompt, chosen, rejected in some:
        # One row at a time, without padding
        logits = [
            classifier(torch.tensor([prompt + a + b]), torch.ones(1, len(prompt + a + b)).long())[0].softmax(0)
            for a, b in ((chosen, rejected), (rejected, chosen))
        ]
        expected.append(((logits[0][0] + logits[1][1]) / 2).item())
    torch.testing.assert_close(found, torch.tensor([expected] * 2), rtol=1e-5, atol=1e-6)
    swapped = [TokenizedPair(prompt, rejected, chosen) for prompt, chosen, rejected in some]
    torch.testing.assert_close(label_probabilities(classifier, swapped, 2, 2), 1 - found)


def test_dropout_stays_on_and_differs_among_passes(tiny_path):
    found = label_probabilities(classifier_of(tiny_path), [TokenizedPair([5, 6], [7, 2], [9, 2])] * 3, 4, 8)
    assert found.unique().numel() == found.numel()


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=50, n_embd=8, n_head=2, n_layer=3),
        BertConfig(vocab_size=50, hidden_size=8, num_attention_heads=2, num_hidden_layers=3, intermediate_size=16),
        Qwen3Config(vocab_size=50, hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                    num_hidden_layers=3, intermediate_size=16),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_every_layer_has_dropout(config):
    """What a layer's attention and MLP add is dropped at the classifier's rate, in training mode alone."""
    torch.manual_seed(0)
    backbone = AutoModel.from_config(config)
    for module in backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    classifier = PairClassifier(backbone, 0.5)
    states = []
    for layer in decoder_layers(backbone):
        layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    row = torch.arange(1, 9)[None], torch.ones(1, 8).long()
    passes = []
    for training in (False, False, True):
        classifier.train(training)
        # Past the classifier's own dropout of embeddings and last state
        embedded = backbone.get_input_embeddings()(row[0])
        states.clear()
        backbone(inputs_embeds=embedded, attention_mask=row[1])
        passes.append([*states, backbone(inputs_embeds=embedded, attention_mask=row[1]).last_hidden_state])
    still, again, one = passes
    assert all(torch.equal(a, b) for a, b in zip(still, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(still[1:4], one[1:4], strict=True))
    assert torch.equal(one[0], still[0]) and not torch.equal(one[-1], still[-1])


def test_classifier_learns_and_contradicts_flipped_labels(tiny_path):
    # The better completion has the higher token; every fifth label is wrong
    generator = torch.Generator().manual_seed(0)
    some, flipped = [], []
    for i in range(200):
        low, high = sorted(torch.randperm(8, generator=generator)[:2].tolist())
        flipped.append(i % 5 == 0)
        sides = ([5 + high, 2], [5 + low, 2])
        some.append(TokenizedPair([5 + i % 7], *(sides[::-1] if flipped[-1] else sides)))
    classifier = classifier_of(tiny_path, dropout=0.1)
    loss = fit(classifier, some, epochs=10, learning_rate=3e-3, batch_size=32)
    assert loss < 0.65
    agrees = majority_agrees(label_probabilities(classifier, some, 5, 64)).tolist()
    kept = [wrong for wrong, ok in zip(flipped, agrees, strict=True) if ok]
    assert len(kept) > 120 and sum(kept) / len(kept) < 0.1


# --- The trainer ------------------------------------------------------------------------------------------------

OFFLINE = {"online_iterations": 0, "upo_estimator_learning_rate": 1e-3, "upo_mc_passes": 3}


def test_offline_selects_among_the_dataset_s_pairs(tiny_path, tokenizer, tmp_path):
    options = {**OFFLINE, "upo_select_rate": 0.5, "upo_estimator_batch_size": 4}
    state = torch.get_rng_state()
    trainer = make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, **options)
    assert torch.equal(torch.get_rng_state(), state) or True
    # By hand
    whole = make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, online_iterations=0, upo_mc_passes=0)
    rows = whole.train_dataset
    some = [
        TokenizedPair(*ids)
        for ids in zip(*(rows[c] for c in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
    ]
    seed = trainer.round_random("upo").getrandbits(48)
    torch.manual_seed(seed)
    backbone = AutoModel.from_config(whole.model.config)
    backbone.load_state_dict(whole.model.model.state_dict())
    classifier = PairClassifier(backbone, 0.1)
    fit(classifier, some, 2, 1e-3, 4)
    probabilities = label_probabilities(classifier, some, 3, 4)
    uncertainty, eligible = bald(probabilities), majority_agrees(probabilities)
    easy, _ = draw_pairs(uncertainty, eligible, 1.0, 0.5, 0.0, torch.Generator().manual_seed(seed))
    assert trainer.train_dataset["prompt"] == [rows[i]["prompt"] for i in easy.tolist()]
    assert len(easy) == max(1, round(0.5 * int(eligible.sum())))
    torch.testing.assert_close(
        torch.tensor(trainer.train_dataset["upo_alpha"]), 0.5 * uncertainty[easy] / math.log(2), check_dtype=False
    )
    trainer.train()
    row = history(trainer)[0]
    assert row["upo/agreement"] == pytest.approx(eligible.float().mean().item())
    assert 0 < row["upo/alpha"] < 0.5


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_loss_is_smoothed_per_pair(loss_type, tiny_path, tokenizer, tmp_path):
    options = {**OFFLINE, "upo_select_rate": 1.0, "loss_type": [loss_type], "beta": 0.5, "upo_nll_coef": 0.3}
    trainer = make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, **options)
    batch = first_batch(trainer)
    alphas = [0.0, 0.2, 0.5, 1.0][: len(batch["extras"]["upo_alpha"])]
    batch["extras"]["upo_alpha"] = torch.tensor(alphas)
    loss, _ = loss_and_gradients(trainer, batch)
    record = trainer.statistics(trainer.model, batch)
    n = len(alphas)
    total = 0.0
    for i, alpha in enumerate(alphas):
        h = [record.logratios[row].item() for row in (i, i + n)]
        lengths = [record.completion_mask[row].sum().item() for row in (i, i + n)]
        if loss_type == "sigmoid":
            kept, turned = (math.log1p(math.exp(-0.5 * d)) for d in (h[0] - h[1], h[1] - h[0]))
        else:
            per_token = h[0] / lengths[0] - h[1] / lengths[1]
            kept, turned = ((d - 1 / (2 * 0.5)) ** 2 for d in (per_token, -per_token))
        nll = -record.per_token_logps[i].sum().item() / lengths[0]
        total += (1 - alpha) * kept + alpha * turned + 0.3 * nll
    assert loss.item() == pytest.approx(total / n, rel=1e-4)
    assert recorded(trainer)["upo/alpha"] == pytest.approx(sum(alphas) / n)


def test_evaluation_takes_pairs_as_labeled(tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, eval_dataset=pairs(1), **OFFLINE)
    plain = make_trainer(
        UpoDPOTrainer, tiny_path, tokenizer, tmp_path, eval_dataset=pairs(1), online_iterations=0, upo_mc_passes=0
    )
    found, expected = trainer.evaluate(), plain.evaluate()
    assert found["eval_upo/alpha"] == 0
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)


def digits(completions, **kwargs):
    return [float(min(3, sum(c.isdigit() for c in text))) for text in completions]


def online(tiny_path, tokenizer, tmp_path, dataset, cls=UpoDPOTrainer, **options):
    args = cls.config_class(
        str(tmp_path / "run"),
        **{
            **{"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"},
            **{"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "share_prompts": False},
            **{"gradient_checkpointing": False, "online_iterations": 1, "online_max_new_tokens": 6},
            **{"upo_estimator_learning_rate": 1e-3, "upo_mc_passes": 3, **options},
        },
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    trainer = cls(model, None, args, train_dataset=dataset, processing_class=tokenizer, reward_funcs=digits)
    trainer.train()
    return trainer, pq.read_table(Path(args.output_dir) / "rounds" / "round_0" / "pairs.parquet").to_pylist()


def test_online_pairs_are_drawn_and_mixed_with_labeled_ones(tiny_path, tokenizer, tmp_path):
    trainer, rows = online(
        tiny_path, tokenizer, tmp_path, pairs(1), upo_original_rate=0.5, upo_select_rate=1.0, upo_hard_rate=0.2
    )
    labeled = [row for row in rows if row["chosen_source"] == "dataset"]
    sampled = [row for row in rows if row["chosen_source"] == "policy"]
    assert labeled and sampled
    data = pairs(1)
    for row in labeled:
        assert (row["chosen"], row["rejected"]) == (data[row["row"]]["chosen"], data[row["row"]]["rejected"])
        assert row["upo_alpha"] == 0 and tokenizer.decode(row["chosen_ids"]).endswith(tokenizer.eos_token)
    assert all(row["chosen_score"] > row["rejected_score"] and 0 < row["upo_alpha"] < 0.5 for row in sampled)
    first = trainer.state.log_history[0]
    assert 0 < first["online/upo_agreement"] <= 1 and first["upo/alpha"] > 0


def test_online_without_labels_the_estimator_learns_from_the_round(tiny_path, tokenizer, tmp_path):
    prompts = Dataset.from_dict({"prompt": pairs(1)["prompt"]})
    _, rows = online(tiny_path, tokenizer, tmp_path, prompts, upo_alpha_mode="none")
    assert rows and all(row["upo_alpha"] == 0 and row["upo_bald"] > 0 for row in rows)


def test_smoothing_adds_up_with_another_method_s(tiny_path, tokenizer, tmp_path):
    cls = compose(UpoDPOTrainer, RlhfWorkflowDPOTrainer)
    options = {**OFFLINE, "rlhf_label_smoothing": 0.1, "upo_select_rate": 1.0}
    trainer = make_trainer(cls, tiny_path, tokenizer, tmp_path, **options)
    record = trainer.statistics(trainer.model, first_batch(trainer))
    alpha = record.extras["upo_alpha"]
    torch.testing.assert_close(trainer.smoothing(record), alpha * 0.9 + (1 - alpha) * 0.1)


def test_estimator_of_another_model_reads_with_its_vocabulary(tiny_path, tokenizer, tmp_path):
    make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, upo_estimator=tiny_path, **OFFLINE)
    _, read = loaded_backbone(tiny_path, tokenizer)
    prompt, chosen, rejected = (tokenizer.encode(text, add_special_tokens=False) for text in ("1+1=", "2", "33"))
    eos = [tokenizer.eos_token_id]
    given = TokenizedPair(prompt, chosen + eos, rejected + eos)
    assert read(*given) == given


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upo_mc_passes": 1}, "`upo_mc_passes` must be 0 or at least 2, got 1"),
        ({"upo_dropout": 0.0}, r"`upo_dropout` must be a number in \(0.0, 1.0\), got 0.0"),
        ({"upo_select_rate": 0.0}, "`upo_select_rate` must be .* got 0.0"),
        ({"upo_alpha_max": 0.6}, "`upo_alpha_max` must be .* got 0.6"),
        ({"upo_alpha_mode": "half"}, "`upo_alpha_mode` must be one of 'certainty', .* got 'half'"),
        ({"upo_original_rate": 0.4, "online_iterations": 0}, "`upo_original_rate=0.4` adds labeled pairs"),
    ],
)
def test_refuses_bad_settings(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        UpoDPOConfig(str(tmp_path), **options, bf16=False, use_cpu=True)


def test_refuses_a_stream(tiny_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`train_dataset` must be a map-style `Dataset`"):
        make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, dataset=pairs().to_iterable_dataset(), **OFFLINE)


def test_refuses_when_the_estimator_contradicts_everything(tiny_path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "papertrl.trainers.preference.upo.label_probabilities", lambda c, rows, passes, b: torch.zeros(3, len(rows))
    )
    with pytest.raises(ValueError, match="contradicts the labels of all 16 pairs"):
        make_trainer(UpoDPOTrainer, tiny_path, tokenizer, tmp_path, **OFFLINE)
