import doctest

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from papertrl import PreferenceTrainer, SupervisedConfig, SupervisedTrainer
from papertrl.models.tiny import tiny_tokenizer
from papertrl.rewards import pairwise
from papertrl.rewards.pairwise import TEMPLATE, PairwiseModel, pairwise_dataset

from ..harness.pairs import history, make_trainer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def model(tiny_path):
    return AutoModelForCausalLM.from_pretrained(tiny_path)


def by_hand(model, tokenizer, text, add_special_tokens=True):
    ids = tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")["input_ids"]
    logits = model(input_ids=ids).logits[0, -1]
    a, b = (logits[tokenizer.convert_tokens_to_ids(label)].exp().item() for label in "AB")
    return a / (a + b)


def test_probability_is_that_of_the_two_labels_alone_and_in_a_batch(model, tokenizer):
    judge = PairwiseModel(model, tokenizer, batch_size=2)
    prompts = ["1+1=", "a much longer prompt", "22", "7 {braces}", ""]
    firsts, seconds = ["2", "yes", "4444", "x", "1"], ["33333", "no, not at all", "1", "{y}", "2"]
    found = judge(prompts, firsts, seconds)
    assert len(set(found)) == 5
    for p, prompt, first, second in zip(found, prompts, firsts, seconds, strict=True):
        text = f"[CONTEXT] {prompt} [RESPONSE A] {first} [RESPONSE B] {second} \n"
        assert p == pytest.approx(by_hand(model, tokenizer, text), abs=1e-5)
    assert judge([], [], []) == []


def test_messages_and_chat_template(model):
    tokenizer = tiny_tokenizer()
    prompt = [{"role": "system", "content": "Sums."}, {"role": "user", "content": "1+1"}]
    answers = [[{"role": "assistant", "content": text}] for text in "23"]
    text = TEMPLATE.format(prompt="system: Sums.\nuser: 1+1", first="2", second="3")
    (plain,) = PairwiseModel(model, tokenizer)([prompt], answers[:1], answers[1:])
    assert plain == pytest.approx(by_hand(model, tokenizer, text), abs=1e-5)
    tokenizer.chat_template = CHAT
    (chat,) = PairwiseModel(model, tokenizer, chat=True)([prompt], answers[:1], answers[1:])
    assert chat == pytest.approx(by_hand(model, tokenizer, f"<user>{text}<a>", add_special_tokens=False), abs=1e-5)
    rows = pairwise_dataset(Dataset.from_list([{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}]))
    assert rows[0]["prompt"] in (text, TEMPLATE.format(prompt="system: Sums.\nuser: 1+1", first="3", second="2"))


@given(
    responses=st.lists(st.tuples(st.text("abc{}", max_size=3), st.text("xyz", max_size=3)), min_size=1, max_size=8),
    seed=st.integers(0, 9),
    chat=st.booleans(),
)
def test_rows_name_the_chosen_response(responses, seed, chat):
    chosen, rejected = map(list, zip(*responses, strict=True))
    pairs = Dataset.from_dict({"prompt": ["p"] * len(chosen), "chosen": chosen, "rejected": rejected})
    rows = pairwise_dataset(pairs, "{prompt}|{first}|{second}|", ("1", "2"), chat, seed)
    assert len(rows) == len(responses)
    for row, good, bad in zip(rows, chosen, rejected, strict=True):
        prompt, completion = row["prompt"], row["completion"]
        if chat:
            assert prompt[0]["role"] == "user"
            assert completion[0]["role"] == "assistant"
            prompt, completion = prompt[0]["content"], completion[0]["content"]
        assert (prompt, completion) in ((f"p|{good}|{bad}|", "1"), (f"p|{bad}|{good}|", "2"))


def test_order_is_random_and_the_seed_s():
    pairs = Dataset.from_dict({"prompt": ["p"] * 400, "chosen": ["g"] * 400, "rejected": ["b"] * 400})
    orders = [pairwise_dataset(pairs, seed=seed)["completion"] for seed in (0, 0, 1)]
    assert list(orders[0]) == list(orders[1]) != list(orders[2])
    assert 160 < list(orders[0]).count("A") < 240


def test_learns_a_preference_and_judges_by_it(tiny_path, tokenizer, tmp_path):
    # Better is 7
    worse = ["4", "1", "9"] * 40
    pairs = Dataset.from_dict({"prompt": ["2"] * 120, "chosen": ["7"] * 120, "rejected": worse})
    # The last token tells
    template = "{prompt}={first}{second}"
    trainer = SupervisedTrainer(
        AutoModelForCausalLM.from_pretrained(tiny_path),
        SupervisedConfig(
            str(tmp_path / "judge"),
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_steps=40,
            per_device_train_batch_size=32,
            learning_rate=5e-3,
        ),
        train_dataset=pairwise_dataset(pairs, template),
        processing_class=tokenizer,
    )
    # The prompt is left out of the loss: label and end
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] != -100).sum(1).eq(2).all()
    trainer.train()
    trainer.save_model()
    judge = PairwiseModel(str(tmp_path / "judge"), template=template)
    found = judge(["2"] * 4, ["7", "1", "7", "9"], ["1", "7", "4", "7"])
    assert [p > 0.5 for p in found] == [True, False, True, False]
    policy = make_trainer(
        PreferenceTrainer,
        tiny_path,
        tokenizer,
        tmp_path / "policy",
        dataset=Dataset.from_dict({"prompt": ["2"] * 16}),
        judge=judge,
        online_iterations=1,
        online_num_samples=3,
        online_max_new_tokens=3,
        max_steps=1,
    )
    policy.train()
    assert 0 < history(policy)[0]["online/worst_score"] < 0.5 < history(policy)[0]["online/best_score"] < 1


@pytest.mark.parametrize("labels", [("AB", "C"), ("A", "A"), ("A", "é"), ("A", ""), ("A",)])
def test_refuses_labels_that_are_not_two_tokens(labels, model, tokenizer):
    with pytest.raises(ValueError, match="`labels` must be two different single tokens of the vocabulary, got"):
        PairwiseModel(model, tokenizer, labels=labels)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{prompt} {first}", r"`template` lacks the fields \['second'\]"),
        ("{prompt} {first} {second} {third}", "`template` must have the fields {prompt}, {first} and {second}"),
        ("{prompt} {} {second}", "`template` must have the fields"),
    ],
)
def test_refuses_templates_that_cannot_be_filled(template, message, model, tokenizer):
    pairs = Dataset.from_dict({"prompt": ["p"], "chosen": ["c"], "rejected": ["r"]})
    for use in (lambda: PairwiseModel(model, tokenizer, template), lambda: pairwise_dataset(pairs, template)):
        with pytest.raises(ValueError, match=message):
            use()


def test_refuses_pairs_without_columns():
    with pytest.raises(ValueError, match=r"`pairs` lacks the columns \['rejected'\]"):
        pairwise_dataset(Dataset.from_dict({"prompt": ["p"], "chosen": ["c"]}))


def test_examples_in_the_docstrings_run():
    assert doctest.testmod(pairwise).failed == 0
    assert doctest.testmod(pairwise).attempted > 5


def test_does_not_hold_gradients(model, tokenizer):
    PairwiseModel(model, tokenizer)(["p"], ["a"], ["b"])
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
