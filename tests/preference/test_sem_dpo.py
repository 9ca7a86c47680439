import math
import sys

import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer

from papertrl import SemDPOConfig, SemDPOTrainer
from papertrl.losses.preference.sem_dpo import semantic_distance, semantic_weights
from papertrl.trainers.preference.base import PreferenceTrainer
from papertrl.trainers.preference.sem_dpo import add_distances

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    pairs,
    recorded,
)

SEM = {"sem_encoder": "characters", "sem_alpha": 2.0}
ENCODER_SIZE = 3
vectors = st.lists(st.floats(-5, 5, width=32), min_size=ENCODER_SIZE, max_size=ENCODER_SIZE)


def distance(first: list, second: list) -> float:
    """1 − cosine by plain loops; 1 for a vector without direction."""
    dot, norm = 0.0, [0.0, 0.0]
    for a, b in zip(first, second, strict=True):
        dot, norm = dot + a * b, [norm[0] + a * a, norm[1] + b * b]
    length = math.sqrt(norm[0]) * math.sqrt(norm[1])
    return 1 - dot / length if length and math.isfinite(length) else 1.0


def characters(first: str, second: str) -> float:
    alphabet = sorted({*first, *second} - {" "})
    return distance([first.count(c) for c in alphabet], [second.count(c) for c in alphabet])


# --- The weight -------------------------------------------------------------------------------------------------


@given(rows=st.lists(st.tuples(vectors, vectors), min_size=1, max_size=5), alpha=st.floats(0, 5))
def test_weight_is_the_equation(rows, alpha):
    source, target = (torch.tensor(side, dtype=torch.float64) for side in zip(*rows, strict=True))
    # Shorter ones count as nothing to torch
    expected = [distance(a, b) if math.hypot(*a) > 1e-7 < math.hypot(*b) else None for a, b in rows]
    distances = semantic_distance(source.requires_grad_(), target)
    weights = semantic_weights(distances, alpha)
    for d, found, weight in zip(expected, distances.tolist(), weights.tolist(), strict=True):
        assert -1e-12 <= found <= 2 and math.exp(-2 * alpha) - 1e-12 <= weight <= 1 + 1e-12
        if d is not None:
            assert found == pytest.approx(d, abs=1e-9) and weight == pytest.approx(math.exp(-alpha * d))
    assert not distances.requires_grad


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_vectors_without_direction_are_at_distance_one(bad):
    source, target = (
        torch.tensor([[bad, 0.0], [1.0, 1.0], [1.0, 1.0]]),
        torch.tensor([[1.0, 1.0], [bad, 0.0], [2.0, 2.0]]),
    )
    torch.testing.assert_close(semantic_distance(source, target), torch.tensor([1.0, 1.0, 0.0]))


# --- The texts --------------------------------------------------------------------------------------------------


def remembered(seen: list):
    def encoder(texts):
        seen.extend(texts)
        return [[1.0, len(text)] for text in texts]

    return encoder


def test_texts_are_last_user_turn_and_winner_without_special_tokens():
    seen = []
    batch = {
        "prompt": [
            [
                {"role": "system", "content": "S"},
                *({"role": r, "content": r + "1"} for r in ("user", "assistant", "user")),
            ],
            [{"role": "user", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}],
            "<bos>a plain prompt ",
        ],
        "chosen": [
            [{"role": "assistant", "content": "rewrite<eos>"}],
            [{"role": "assistant", "content": None}],
            " c<eos>",
        ],
    }
    found = add_distances(batch, remembered(seen), ["<bos>", "<eos>"])["sem_distance"]
    assert seen == ["user1", "in parts", "a plain prompt", "rewrite", "", "c"]
    expected = [distance([1, len(a)], [1, len(b)]) for a, b in zip(seen[:3], seen[3:], strict=True)]
    assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match=r"no message of the user, only of \['system'\]"):
        add_distances({"prompt": [batch["prompt"][0][:1]], "chosen": ["c"]}, remembered([]), [])


@pytest.mark.parametrize("kind", ["messages", "implicit", "iterable"])
def test_distances_in_every_form_of_dataset(kind, tiny_path, tokenizer, tmp_path):
    rows = pairs(1).to_list()
    expected = [characters(row["prompt"], row["chosen"]) for row in rows]
    dataset = Dataset.from_list(rows)
    if kind == "messages":
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
        tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}"
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        dataset = Dataset.from_list(
            [{k: [{"role": roles[k], "content": text}] for k, text in row.items()} for row in rows]
        )
    elif kind == "implicit":
        both = [{k: "7" + row[k] for k in ("chosen", "rejected")} for row in rows]
        dataset = Dataset.from_list(both)
        expected = [characters("7", row["chosen"]) for row in rows]
    else:
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    trainer = make_trainer(SemDPOTrainer, tiny_path, tokenizer, tmp_path, dataset=dataset, **SEM)
    found = [row["sem_distance"] for row in trainer.train_dataset]
    assert found == pytest.approx(expected, abs=1e-6)
    trainer.train()
    assert any(row.get("sem_dpo/distance", 0) > 0 for row in history(trainer))


# --- The step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("option", [{}, {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.5]}])
def test_loss_and_gradient_are_the_weighted_pairs(normalize, option, tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(
        SemDPOTrainer, tiny_path, tokenizer, tmp_path, sem_normalize=normalize, beta=0.3, **SEM, **option
    )
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, beta=0.3, **option)
    rows = [trainer.train_dataset[i] for i in range(4)]
    distances = [characters(row["prompt"], row["chosen"].removesuffix("<eos>")) for row in rows]
    weights = [math.exp(-2 * d) for d in distances]
    factors = [w / (sum(weights) / 4) for w in weights] if normalize else weights
    loss, gradients = loss_and_gradients(trainer, trainer._prepare_inputs(trainer.data_collator(rows)))
    metrics = recorded(trainer)
    assert metrics["sem_dpo/distance"] == pytest.approx(sum(distances) / 4, rel=1e-5)
    assert metrics["sem_dpo/weight"] == pytest.approx(sum(weights) / 4, rel=1e-5)
    assert metrics["sem_dpo/weight_min"] == pytest.approx(min(weights), rel=1e-5)
    if option:
        # TRL's supervised loss is one number for the batch, so that only all pairs together tell its weight
        record = base.statistics(base.model, base._prepare_inputs(base.data_collator(rows)))
        terms = base.pair_losses(record, *(s := base.scores(record)), base.margin(record, *s))
        expected = sum((term.values * torch.tensor(factors)).mean() * term.coef for term in terms)
        torch.testing.assert_close(loss, expected.detach())
        return
    expected_loss, expected_gradients = 0.0, dict.fromkeys(gradients, 0.0)
    for row, factor in zip(rows, factors, strict=True):
        one, grads = loss_and_gradients(base, base._prepare_inputs(base.data_collator([row])))
        expected_loss = expected_loss + factor * one / 4
        expected_gradients = {n: g + factor * grads[n] / 4 for n, g in expected_gradients.items()}
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)


def test_alpha_without_bound_stays_finite(tiny_path, tokenizer, tmp_path):
    options = SEM | {"sem_alpha": 1e6, "sem_normalize": True}
    trainer = make_trainer(SemDPOTrainer, tiny_path, tokenizer, tmp_path, **options)
    loss, gradients = loss_and_gradients(trainer, first_batch(trainer))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients.values())


def test_neutral_needs_no_encoder_and_is_dpo(tiny_path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wordllama", None)
    neutral = make_trainer(
        SemDPOTrainer, tiny_path, tokenizer, tmp_path, use_weighting=True, **SemDPOTrainer.method.neutral
    )
    parent = make_trainer(DPOTrainer, tiny_path, tokenizer, tmp_path, config_class=DPOConfig, use_weighting=True)
    batch = first_batch(parent)
    (parent_loss, parent_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (parent, neutral))
    assert torch.equal(parent_loss, loss)
    assert_same_tensors(parent_gradients, gradients)
    assert not any(name.startswith("sem_dpo") for name in recorded(neutral))


def test_callable_and_column_take_the_place_of_the_encoder(tiny_path, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wordllama", None)

    def build(dataset, **kwargs):
        args = SemDPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1)
        return SemDPOTrainer(tiny_path, None, args, train_dataset=dataset, processing_class=tokenizer, **kwargs)

    with pytest.raises(ValueError, match="`pip install wordllama`"):
        build(pairs())
    trainer = build(pairs(), sem_encoder=lambda texts: torch.tensor([[1.0, float("4" in text)] for text in texts]))
    half = 1 - math.sqrt(0.5)
    expected = [half * (("4" in row["prompt"]) != ("4" in row["chosen"])) for row in pairs()]
    assert trainer.train_dataset["sem_distance"] == pytest.approx(expected, abs=1e-6)
    given = [i / 10 for i in range(16)]
    trainer = build(pairs().add_column("sem_distance", given))
    assert trainer.train_dataset["sem_distance"] == given
    trainer.train()
    for value in (2.5, -0.1, math.nan, None):
        column = [0.5] * 5 + [value] + [0.5] * 10
        with pytest.raises(ValueError, match=f"Row 5 .*'train'.*`sem_distance` must be .*, got {value}"):
            build(pairs().add_column("sem_distance", column))
    with pytest.raises(ValueError, match=r"one vector per text, of shape \(\d+, D\), got \(2,\)"):
        build(pairs(), sem_encoder=lambda texts: [1.0, 2.0])


def test_pairs_made_in_training_are_weighted_too(tiny_path, tokenizer, tmp_path):
    trainer = SemDPOTrainer(
        tiny_path,
        None,
        SemDPOConfig(
            str(tmp_path),
            **SEM,
            online_iterations=2,
            online_num_prompts=4,
            online_max_new_tokens=4,
            max_steps=2,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=pairs().select_columns("prompt").add_column("sem_distance", [0.0] * 16),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(len(text)) + sum(map(ord, text)) / 1e4 for text in completions],
    )
    trainer.train()
    distances = [row["sem_dpo/distance"] for row in history(trainer) if "sem_dpo/distance" in row]
    assert len(distances) == 2 and all(d > 0 for d in distances)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"sem_alpha": -1.0}, "`sem_alpha` must be .*got -1.0"),
        ({"sem_alpha": math.inf}, "`sem_alpha` must be .*got inf"),
        ({"use_weighting": True}, "`use_weighting` must be False with `sem_alpha=1.0`, got True: both multiply"),
        ({"loss_type": ["sigmoid", "aot"]}, r"`loss_type` \['aot'\]"),
    ],
)
def test_refuses_what_does_not_fit(options, part, tmp_path):
    with pytest.raises(ValueError, match=part):
        SemDPOConfig(str(tmp_path), bf16=False, use_cpu=True, **options)
