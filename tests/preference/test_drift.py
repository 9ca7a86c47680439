from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

from papertrl import DriftDPOConfig, DriftDPOTrainer
from papertrl.losses.preference.drift import unusable
from papertrl.models.tokenization import tokenize_prompt
from papertrl.trainers.preference.base import PreferenceTrainer

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    recorded,
    weights,
)

TURNS = {
    "prompt": [f"{i}+{i + 1}=" for i in range(12)],
    "rejected": [f"{3 * i}" for i in range(12)],
    "feedback": ["high" if i > 1 else "low" for i in range(12)],
}
TEMPLATE = "{prompt}{rejected} {feedback}:"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def drift(tiny_path, tokenizer, output_dir, **options):
    settings = {
        "dataset": Dataset.from_dict(TURNS),
        "drift_text_template": TEMPLATE,
        "online_max_new_tokens": 4,
        "online_batch_size": 8,
        "per_device_train_batch_size": 3,
        "max_steps": 4,
    }
    return make_trainer(DriftDPOTrainer, tiny_path, tokenizer, output_dir, **settings | options)


def rounds(output_dir, kind="pairs") -> list[list[dict]]:
    folders = sorted((Path(output_dir) / "rounds").iterdir())
    return [pq.read_table(folder / f"{kind}.parquet").to_pylist() for folder in folders]


@pytest.fixture
def chat_tokenizer(tiny_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_path)
    tokenizer.chat_template = CHAT
    return tokenizer


@given(st.text(" 12", max_size=3), st.text(" 12", max_size=3), st.booleans(), st.booleans())
def test_unusable_is_the_cards_rule(chosen, rejected, finished, drop):
    words = chosen.split(" "), rejected.split(" ")
    stripped = [" ".join(side).strip(" ") for side in words]
    if len(stripped[0]) == 0:
        expected = "empty"
    elif stripped[0] == stripped[1]:
        expected = "identical"
    else:
        expected = "unfinished" if drop and not finished else None
    assert unusable(chosen, rejected, finished, drop) == expected


def test_a_round_sets_samples_under_feedback_against_the_rejected_answer(tiny_path, tokenizer, tmp_path):
    trainer = drift(tiny_path, tokenizer, tmp_path, online_num_samples=2)
    asked = []
    draw = trainer.draw

    def watched(groups, count, source="policy", prompts=None):
        asked.extend(zip([group.index for group in groups], prompts, strict=True))
        draw(groups, count, source, prompts)

    trainer.draw = watched
    trainer.train()
    # In each iteration, every dissatisfied turn
    assert len(rounds(tmp_path)) == 2
    assert sorted(row for row, _ in asked[:12]) == sorted(row for row, _ in asked[12:]) == list(range(12))
    for row, prompt in asked:
        assert prompt == f"{TURNS['prompt'][row]}{TURNS['rejected'][row]} {TURNS['feedback'][row]}:"
    for candidates, pairs in zip(rounds(tmp_path, "candidates"), rounds(tmp_path), strict=True):
        by_row = {row["row"]: row for row in candidates}
        expected = [
            (row, text)
            for row, group in by_row.items()
            for text in group["completions"][:-1]
            if text.strip() and text.strip() != TURNS["rejected"][row]
        ]
        assert [(pair["row"], pair["chosen"]) for pair in pairs] == expected
        for pair in pairs:
            # Feedback stands in the prompt of sampling only
            assert pair["prompt"] == TURNS["prompt"][pair["row"]] == tokenizer.decode(pair["prompt_ids"])
            assert pair["rejected"] == TURNS["rejected"][pair["row"]]
            assert tokenizer.decode(pair["rejected_ids"]) == pair["rejected"] + tokenizer.eos_token
            assert tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True) == pair["chosen"]
        assert {tuple(group["sources"]) for group in candidates} == {("policy", "policy", "dataset")}
    logged = [row for row in history(trainer) if "online/drift_kept_share" in row]
    kept = [len(pairs) / 24 for pairs in rounds(tmp_path)]
    assert [row["online/drift_kept_share"] for row in logged] == pytest.approx(kept)


def test_samples_are_those_of_the_policy_under_the_feedback_prompt(tiny_path, tokenizer, tmp_path):
    """The same as drawing from a dataset whose prompts have the feedback in them."""
    trainer = drift(tiny_path, tokenizer, tmp_path / "drift", max_steps=2)
    trainer.train()
    shown = [TEMPLATE.format(**{key: TURNS[key][i] for key in TURNS}) for i in range(12)]
    settings = {"online_iterations": 2, "online_num_samples": 1, "online_max_new_tokens": 4, "max_steps": 2}
    settings |= {"online_temperature": 0.7, "online_top_p": 0.9, "online_batch_size": 5, "online_reuse_prompts": True}

    class Watched(PreferenceTrainer):
        drawn: dict = {}

        @classmethod
        def needs_scores(cls, args):
            return False

        def propose(self, groups):
            super().propose(groups)
            self.drawn.update({group.index: group.candidates[0].completion for group in groups})

    plain = make_trainer(
        Watched, tiny_path, tokenizer, tmp_path / "plain", dataset=Dataset.from_dict({"prompt": shown}), **settings
    )
    with pytest.raises(ValueError, match="made no pair"):
        plain.train()
    first = rounds(tmp_path / "drift", "candidates")[0]
    assert {group["row"]: group["completions"][0] for group in first} == plain.drawn


def test_identical_empty_and_unfinished_samples_are_counted_and_dropped(tiny_path, tokenizer, tmp_path):
    trainer = drift(tiny_path, tokenizer, tmp_path, drift_drop_unfinished=True, online_num_prompts=4)
    made = iter([("7", True), ("", True), ("same", True), ("8888", False)])

    def draw(groups, count, source="policy", prompts=None):
        from papertrl.trainers.preference.online.candidates import Candidate

        for group in groups:
            text, finished = next(made)
            text = f" {group.row['rejected']} " if text == "same" else text
            ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * finished
            group.candidates.append(Candidate(text, ids, finished))

    trainer.draw = draw
    trainer.args.online_iterations = 1
    trainer.train()
    assert [pair["chosen"] for pair in rounds(tmp_path)[0]] == ["7"]
    logged = next(row for row in history(trainer) if "online/drift_kept_share" in row)
    for name in ("kept", "empty", "identical", "unfinished"):
        assert logged[f"online/drift_{name}_share"] == 0.25


def test_messages_go_through_the_chat_template_and_lose_their_oldest_turns(tiny_path, chat_tokenizer, tmp_path):
    def say(role, text):
        return {"role": role, "content": text}

    history = [say("system", "sys"), say("user", "1+1="), say("assistant", "2"), say("user", "2+2=")]
    turns = {"prompt": [history] * 4, "rejected": [[say("assistant", "5")]] * 4, "feedback": ["too high"] * 4}
    dataset = Dataset.from_dict(turns)
    trainer = drift(tiny_path, chat_tokenizer, tmp_path, dataset=dataset, drift_instruction="Again", max_steps=2)
    request = say("user", "too high\n\nAgain")
    assert trainer.feedback_prompt(dataset[0]) == [*history, say("assistant", "5"), request]

    def cut(limit):
        trainer.args.drift_max_prompt_length = limit
        prompt = trainer.feedback_prompt(dataset[0])
        return prompt, len(tokenize_prompt(chat_tokenizer, prompt, {}))

    whole = cut(10_000)[1]
    assert cut(whole)[0] == [*history, say("assistant", "5"), request]
    prompt, length = cut(whole - 1)
    assert prompt == [history[0], history[2], history[3], say("assistant", "5"), request] and length < whole
    last = [history[0], history[3], say("assistant", "5"), request]
    shortest = len(tokenize_prompt(chat_tokenizer, last, {}))
    assert cut(shortest) == (last, shortest)
    assert cut(shortest - 2) == ([history[0], say("user", "2="), *last[2:]], shortest - 2)
    # Feedback and instruction are never cut
    assert cut(1)[0] == [history[0], say("user", ""), *last[2:]]
    trainer.args.drift_max_prompt_length = 2048
    trainer.train()
    pair = rounds(tmp_path)[0][0]
    assert pair["prompt"] == history and pair["rejected"] == [say("assistant", "5")]
    assert chat_tokenizer.decode(pair["rejected_ids"]) == "5<eos>"


def test_long_text_prompts_lose_their_beginning(tiny_path, tokenizer, tmp_path):
    trainer = drift(tiny_path, tokenizer, tmp_path, drift_max_prompt_length=12)
    row = {"prompt": "123456789+1=", "rejected": "77", "feedback": "low"}
    assert trainer.feedback_prompt(row) == "89+1=77 low:"
    assert trainer.feedback_prompt({**row, "prompt": "9+1="}) == "9+1=77 low:"


@pytest.mark.parametrize("empty", [False, True])
def test_loss_and_gradient_are_dpo_plus_the_mean_nll_of_chosen_tokens(empty, tiny_path, tokenizer, tmp_path):
    options = {"online_iterations": 0, "beta": 0.3}
    base = make_trainer(PreferenceTrainer, tiny_path, tokenizer, tmp_path, **options)
    trainer = make_trainer(DriftDPOTrainer, tiny_path, tokenizer, tmp_path, drift_nll_coef=0.4, **options)
    batch = first_batch(trainer)
    if empty:
        batch["completion_mask"][:4] = 0
    (base_loss, base_gradients), (loss, gradients) = (loss_and_gradients(t, batch) for t in (base, trainer))
    record = trainer.statistics(trainer.model, batch)
    mask = record.shift_completion_mask
    tokens = [-record.per_token_logps[i, t] for i in range(4) for t in range(mask.shape[1]) if mask[i, t]]
    if empty:
        assert torch.equal(loss, base_loss) and recorded(trainer)["loss/drift_nll"] == 0
        assert_same_tensors(gradients, base_gradients)
        return
    term = sum(tokens) / len(tokens)
    torch.testing.assert_close(loss, base_loss + 0.4 * term)
    assert recorded(trainer)["loss/drift_nll"] == pytest.approx(term.item(), rel=1e-5)
    (0.4 * term).backward()
    torch.testing.assert_close(
        {n: base_gradients[n] + p.grad for n, p in trainer.model.named_parameters()}, gradients, rtol=1e-4, atol=1e-6
    )


def test_nll_is_trl_s_sft_loss_on_one_process(tiny_path, tokenizer, tmp_path):
    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.001]}
    parent = make_trainer(DPOTrainer, tiny_path, tokenizer, tmp_path, config_class=DPOConfig, **both)
    trainer = make_trainer(DriftDPOTrainer, tiny_path, tokenizer, tmp_path, online_iterations=0)
    batch = first_batch(parent)
    torch.testing.assert_close(loss_and_gradients(trainer, batch), loss_and_gradients(parent, batch))


def test_training_equals_dpo_on_the_rounds_pairs(tiny_path, tokenizer, tmp_path):
    """One iteration, then plain TRL on what it wrote: the feedback is nowhere in the training sequence."""
    # One sample is the rejected answer itself
    options = {"max_steps": 1, "per_device_train_batch_size": 11, "beta": 0.1, "optim": "sgd", "learning_rate": 0.1}
    trainer = drift(tiny_path, tokenizer, tmp_path / "drift", online_iterations=1, drift_nll_coef=0.0, **options)
    trainer.train()
    (pairs,) = rounds(tmp_path / "drift")
    assert len(pairs) == 11
    # TRL ends every text by the end token; samples that were cut have none, so that they are told apart by it
    columns = {key: [pair[key] for pair in pairs] for key in ("prompt", "chosen", "rejected")}
    parent = make_trainer(
        DPOTrainer,
        tiny_path,
        tokenizer,
        tmp_path / "trl",
        config_class=DPOConfig,
        dataset=Dataset.from_dict(columns),
        **options,
    )
    ids = {tuple(pair["prompt_ids"]): pair["chosen_ids"] for pair in pairs}
    parent.train_dataset = parent.train_dataset.map(lambda row: {"chosen_ids": ids[tuple(row["prompt_ids"])]})
    parent.train()
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, weights(parent)[name], rtol=1e-4, atol=1e-6)


def test_rewards_are_kept_for_the_record_only(tiny_path, tokenizer, tmp_path):
    plain = drift(tiny_path, tokenizer, tmp_path / "plain")
    plain.train()
    scored = drift(tiny_path, tokenizer, tmp_path / "scored")
    from papertrl.trainers.preference.online.judging import RewardScorer

    scored.scorer = RewardScorer(
        lambda completions, **kwargs: [float(len(text)) for text in completions], None, None, scored.accelerator, 8
    )
    scored.train()
    assert_same_tensors(weights(plain), weights(scored))
    for pair in rounds(tmp_path / "scored")[0]:
        assert (pair["chosen_score"], pair["rejected_score"]) == (len(pair["chosen"]), len(pair["rejected"]))


@pytest.mark.parametrize("column", ["rejected", "feedback"])
def test_missing_columns_are_named(column, tiny_path, tokenizer, tmp_path):
    dataset = Dataset.from_dict(TURNS).remove_columns(column)
    with pytest.raises(ValueError, match=rf"`train_dataset` lacks \['{column}'\].*its columns are"):
        drift(tiny_path, tokenizer, tmp_path, dataset=dataset)


def test_feedback_that_is_no_text_is_refused(tiny_path, tokenizer, tmp_path):
    dataset = Dataset.from_dict({**TURNS, "feedback": [3] * 12})
    with pytest.raises(ValueError, match="`feedback` must be a text in every row, got 3"):
        drift(tiny_path, tokenizer, tmp_path, dataset=dataset).train()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("drift_nll_coef", -0.1),
        ("drift_max_prompt_length", 0),
        ("online_temperature", 0.0),
        ("drift_text_template", "{prompt}{feedback}"),
        ("drift_text_template", "{prompt}{rejected}{feedback}{mood}"),
        ("drift_text_template", "{prompt"),
    ],
)
def test_refuses_values_out_of_range(field, value, tmp_path):
    with pytest.raises(ValueError, match=f"`{field}` must .*got {value!r}".replace("{", r"\{")):
        DriftDPOConfig(str(tmp_path), **{field: value}, bf16=False, use_cpu=True)
