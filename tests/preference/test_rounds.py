"""The online loop: what a round makes of prompts, where its reference stands, and that a killed run goes on."""

import asyncio
import json
import math
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, TrainerCallback

from papertrl import DriftDPOTrainer, HypoDPOTrainer, LnDPOTrainer, PreferenceTrainer, RpoDPOTrainer, compose
from papertrl.core.declaration import Method
from papertrl.models.tiny import tiny_tokenizer
from papertrl.trainers.preference.base import PreferenceConfig
from papertrl.trainers.preference.online.candidates import Candidate, Group, Pair, best_against_worst, pairs_dataset
from papertrl.trainers.preference.online.judging import compare
from papertrl.trainers.preference.online.loop import cycled

from ..harness.pairs import assert_same_tensors, history, make_trainer, perturbed, weights

PROMPTS = [f"{i}+{i}=" for i in range(14)]


def digits(completions, **kwargs):
    """As many points as digits, and a fraction that tells texts apart."""
    return [sum(c.isdigit() for c in text) + (sum(map(ord, text)) % 97) / 1000 for text in completions]


def online(tiny_path, tokenizer, output_dir, cls=PreferenceTrainer, **options):
    judged = {"reward_funcs": digits} if "judge" not in options else {"judge": options.pop("judge")}
    judged |= {k: options.pop(k) for k in ("reward_funcs", "callbacks", "reward_processing_classes") if k in options}
    settings = {
        "online_iterations": 3,
        "online_num_samples": 3,
        "online_max_new_tokens": 5,
        "online_batch_size": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "dataset": Dataset.from_dict({"prompt": PROMPTS}),
    } | options
    make = make_trainer

    class Judged(cls):
        config_class = cls.config_class

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, **judged)

    return make(Judged, tiny_path, tokenizer, output_dir, **settings)


def rounds(output_dir, kind="pairs") -> list[list[dict]]:
    folders = sorted((Path(output_dir) / "rounds").iterdir())
    return [pq.read_table(folder / f"{kind}.parquet").to_pylist() for folder in folders]


def test_rewards_of_a_round_get_all_that_training_gives(tiny_path, tokenizer, tmp_path):
    class Notes:
        async def __call__(self, prompts, completions, trainer_state, log_extra, log_metric, **columns):
            assert columns.keys() == {"completion_ids", "kind"} and set(columns["kind"]) == {"sum"}
            log_extra("first", [text[:1] for text in completions])
            log_metric("step", float(trainer_state.global_step))
            return digits(completions)

    data = Dataset.from_dict({"prompt": PROMPTS, "kind": ["sum"] * 14, "completion": ["kept back"] * 14})
    options = {"online_num_prompts": 4, "online_iterations": 2, "max_steps": 4, "dataset": data}
    trainer = online(tiny_path, tokenizer, tmp_path, reward_funcs=[partial(Notes())], **options)

    async def in_a_notebook():
        trainer.train()

    asyncio.run(in_a_notebook())
    assert [log["online/step"] for log in trainer.state.log_history if "online/step" in log] == [0.0, 2.0]
    for row in rounds(tmp_path, "candidates")[1]:
        assert row["extra_first"] == [text[:1] for text in row["completions"]]
        assert row["reward_Notes"] == row["scores"]


def test_a_round_pairs_best_and_worst_samples_of_the_policy(tiny_path, tokenizer, tmp_path):
    trainer = online(tiny_path, tokenizer, tmp_path, online_num_prompts=4)
    trainer.train()
    seen = []
    for i, (candidates, pairs) in enumerate(zip(rounds(tmp_path, "candidates"), rounds(tmp_path), strict=True)):
        assert [row["iteration"] for row in candidates] == [i] * 4
        seen += [row["row"] for row in candidates]
        by_row = {row["row"]: row for row in candidates}
        for pair in pairs:
            group = by_row[pair["row"]]
            assert group["scores"] == pytest.approx(digits(group["completions"])) and len(group["scores"]) == 3
            assert pair["chosen_score"] == max(group["scores"]) > pair["rejected_score"] == min(group["scores"])
            assert pair["chosen"] == group["completions"][group["scores"].index(pair["chosen_score"])]
            assert pair["prompt"] == PROMPTS[pair["row"]] == tokenizer.decode(pair["prompt_ids"])
            assert tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True) == pair["chosen"]
            ended = group["finished"][group["completions"].index(pair["chosen"])]
            assert (pair["chosen_ids"][-1] == tokenizer.eos_token_id) == ended
        provenance = json.loads((tmp_path / "rounds" / f"round_{i}" / "provenance.json").read_text())
        assert provenance["iteration"] == i and provenance["step"] == 2 * i and provenance["model"] == tiny_path
        assert provenance["rewards"] == {"digits": 1.0} and provenance["sampling"]["num_samples"] == 3
        assert (provenance["prompts"], provenance["candidates"], provenance["pairs"]) == (4, 12, len(pairs))
    # Every prompt once before any of them twice
    assert len(set(seen)) == 12
    logs = [row for row in trainer.state.log_history if "online/score" in row]
    assert [row["online/iteration"] for row in logs] == [0, 1, 2]
    expected = [s for row in rounds(tmp_path, "candidates")[1] for s in row["scores"]]
    assert logs[1]["online/score"] == pytest.approx(sum(expected) / len(expected))


def test_stop_strings_of_the_model_end_candidates(tiny_path, tokenizer, tmp_path):
    stops = list("0123456789abcdefghijklm")
    trainer = online(tiny_path, tokenizer, tmp_path, online_iterations=1, online_num_prompts=8, max_steps=1)
    trainer.model.generation_config.stop_strings = stops
    trainer.train()
    rows = [
        pair
        for row in rounds(tmp_path, "candidates")[0]
        for pair in zip(row["completions"], row["finished"], strict=True)
    ]
    stopped = [text.endswith(tuple(stops)) for text, _ in rows]
    assert any(stopped) and all(finished for (_, finished), stop in zip(rows, stopped, strict=True) if stop)
    assert not any(stop in text[:-1] for text, _ in rows for stop in stops)
    assert not all(finished for _, finished in rows)


def test_training_is_dpo_on_the_rounds_pairs(tiny_path, tokenizer, tmp_path):
    """One iteration equals offline training on what it sampled, row by row in the loop's order."""
    trainer = online(tiny_path, tokenizer, tmp_path, online_iterations=1, optim="sgd", learning_rate=0.05)
    start = {k: v.clone() for k, v in weights(trainer).items()}
    trainer.train()
    (pairs,) = rounds(tmp_path)
    order = cycled(trainer.args.seed, len(pairs), 0, 2 * 2 * 6, "pairs", 0)
    assert sorted(order[: len(pairs)]) == list(range(len(pairs)))
    rows = Dataset.from_list([pairs[i] for i in order]).select_columns(["prompt", "chosen", "rejected"])
    offline = make_trainer(
        PreferenceTrainer, tiny_path, tokenizer, tmp_path / "offline", dataset=rows, max_steps=6,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd", learning_rate=0.05,
    )  # fmt: skip
    assert_same_tensors(start, weights(offline))
    ids = [{k: pairs[i][k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for i in order]
    offline.train_dataset = Dataset.from_list(ids)
    offline._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(offline.train_dataset)
    offline.train()
    for name, value in weights(offline).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-5, atol=1e-7)
    assert any((value - start[name]).abs().max() > 1e-4 for name, value in weights(trainer).items())


def test_base_pairing_is_the_extremes():
    def group(scores):
        return Group({"prompt": ""}, 0, [1], [Candidate(str(i), [i], True, score=s) for i, s in enumerate(scores)])

    cases = {
        (1.0, 3.0, 3.0, 0.0, 0.0): ("1", "3"),
        (math.nan, 2.0, 1.0): ("1", "2"),
        (1.0, 1.0): None,
        (math.nan, 1.0): None,
        (math.nan,): None,
        (): None,
    }
    for scores, expected in cases.items():
        pairs = best_against_worst([group(scores)])
        found = (pairs[0].chosen.completion, pairs[0].rejected.completion) if pairs else None
        assert found == expected, scores


def test_a_pairwise_judge_is_asked_in_both_orders(tiny_path, tokenizer, tmp_path):
    asked = []

    def judge(prompts, firsts, seconds):
        asked.append((list(prompts), list(firsts), list(seconds)))
        # Right half of the time, and otherwise for whoever stands first
        return [0.5 * (len(set(a)) > len(set(b))) + 0.25 * (len(set(a)) == len(set(b))) + 0.5 for a, b in
                zip(firsts, seconds, strict=True)]  # fmt: skip

    trainer = online(tiny_path, tokenizer, tmp_path, judge=judge, online_iterations=1, online_num_prompts=5)
    trainer.train()
    assert asked[0][1] == asked[1][2] and asked[0][2] == asked[1][1] and len(asked[0][0]) == 5 * 3
    for row in rounds(tmp_path, "candidates")[0]:
        varied = [len(set(text)) for text in row["completions"]]
        for i, score in enumerate(row["scores"]):
            wins = [0.5 + 0.25 * ((varied[i] > v) - (varied[i] < v)) for j, v in enumerate(varied) if j != i]
            assert score == pytest.approx(sum(wins) / 2)
    with pytest.raises(ValueError, match=r"`judge` must return a probability in \[0, 1\] for each of 1 pairs"):
        compare(lambda p, a, b: [2.0], ["x"], ["a"], ["b"])
    assert compare(None, [], [], []) == []


def test_several_rewards_and_a_reward_model(tiny_path, tokenizer, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "judge").eval()

    def sometimes(completions, **kwargs):
        return [None if text[:1].isdigit() else 1.0 for text in completions]

    options = {"online_reward_weights": [2.0, 1.0, -1.0], "online_iterations": 1}
    funcs = [str(tmp_path / "judge"), digits, sometimes]
    online(tiny_path, tokenizer, tmp_path / "out", reward_funcs=funcs, **options).train()
    for row in rounds(tmp_path / "out", "candidates")[0]:
        columns = (row[name] for name in ("completions", "scores", "reward_judge", "finished"))
        for text, score, by_model, finished in zip(*columns, strict=True):
            inputs = tokenizer(row["prompt"] + text + tokenizer.eos_token * finished, return_tensors="pt")
            given = model(**inputs).logits.item()
            assert by_model == pytest.approx(given, abs=1e-5)
            third = 0.0 if text[:1].isdigit() else 1.0
            assert score == pytest.approx(2 * given + digits([text])[0] - third, abs=1e-4)
    with pytest.raises(ValueError, match=r"`online_reward_weights` must have one entry per reward function \(2\)"):
        online(tiny_path, tokenizer, tmp_path / "x", reward_funcs=[digits, sometimes], online_reward_weights=[1.0])


def test_chats_are_sampled_as_answers(tiny_path, tmp_path):
    chat = tiny_tokenizer()
    chat.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token if m.role == 'assistant' else ';' }}"
        "{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    dataset = Dataset.from_dict({"prompt": [[{"role": "user", "content": p}] for p in PROMPTS]})

    def of_messages(prompts, completions, **kwargs):
        assert prompts[0][0]["role"] == "user" and completions[0][0]["role"] == "assistant"
        return digits([c[0]["content"] for c in completions])

    trainer = online(tiny_path, chat, tmp_path, dataset=dataset, reward_funcs=of_messages, online_iterations=1)
    trainer.train()
    row = rounds(tmp_path)[0][0]
    assert chat.decode(row["prompt_ids"]) == f"u:{row['prompt'][0]['content']};a:"
    assert [m["role"] for m in row["chosen"]] == ["assistant"]


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("kind", ["initial", "previous", "ema"])
def test_where_the_reference_stands(kind, peft, tiny_path, tokenizer, tmp_path):
    if peft and kind == "ema":
        with pytest.raises(ValueError, match=r"`online_reference='ema'` changes the reference.*an adapter"):
            online(tiny_path, tokenizer, tmp_path, online_reference=kind, peft_config=LoraConfig(r=2))
        return
    policies, references = [], []

    class Watched(PreferenceTrainer):
        config_class = PreferenceConfig

        def choose_prompts(self, count, round):
            # A fixed sequence tells models apart
            ids = torch.tensor([[5, 6, 7, 8]])
            mask = torch.ones_like(ids)
            policies.append(self.score_sequences(self.model, ids, mask, mask).sum().item())
            references.append(self.score_sequences(self.model, ids, mask, mask, role="reference").sum().item())
            return super().choose_prompts(count, round)

    options = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if peft else {}
    trainer = online(
        tiny_path, tokenizer, tmp_path, cls=Watched, online_reference=kind, online_reference_decay=0.25,
        learning_rate=1e-2, **options,
    )  # fmt: skip
    trainer.train()
    assert len(set(policies)) == 3
    if kind == "initial":
        assert references == [references[0]] * 3 and references[0] not in policies[1:]
    elif kind == "previous":
        assert references[1:] == pytest.approx(policies[1:], rel=1e-6)
    else:
        assert references[0] not in references[1:] and references[1] not in policies


def test_ema_averages_weights(tiny_path, tokenizer, tmp_path):
    trainer = online(tiny_path, tokenizer, tmp_path, online_reference="ema", online_reference_decay=0.75)
    before = {k: v.clone() for k, v in trainer.online.reference.weights().items()}
    trainer.online.reference.move()
    for name, value in weights(trainer).items():
        torch.testing.assert_close(trainer.online.reference.weights()[name], 0.75 * before[name] + 0.25 * value)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


# Inside an iteration, where one ends, and twice at the same step
@pytest.mark.parametrize(
    ("kind", "peft", "kills"),
    [
        ("initial", False, (1, 5)),
        ("previous", False, (2, 4)),
        ("previous", True, (3, 3)),
        ("ema", False, (3, 5)),
        ("initial", True, (2, 4)),
    ],
)
def test_a_run_that_was_killed_twice_is_the_run_that_was_not(kind, peft, kills, tiny_path, tokenizer, tmp_path):
    options = {
        "online_reference": kind,
        "online_accumulate": kind == "previous",
        "save_strategy": "steps",
        "save_steps": 100 if kills == (2, 4) else 1,
        "cls": compose(LnDPOTrainer, HypoDPOTrainer, RpoDPOTrainer),
        "hypo_kl_max_new_tokens": 3,
        "max_steps": 6,
    }

    def make(folder, **more):
        # A trainer changes the config that it is given
        adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")} if peft else {}
        return online(tiny_path, tokenizer, tmp_path / folder, **options, **adapter, **more)

    whole = make("whole")
    whole.train()
    resume = None
    for step in kills:
        with pytest.raises(Killed):
            make("killed", callbacks=[KillAt(step)]).train(resume_from_checkpoint=resume)
        resume = any((tmp_path / "killed").glob("checkpoint-*")) or None
        if resume is None:
            shutil.rmtree(tmp_path / "killed")
    # A kill in the middle of writing leaves this behind
    (tmp_path / "killed" / "rounds" / "round_2.partial").mkdir(exist_ok=True)
    again = make("killed")
    again.train(resume_from_checkpoint=True)
    assert_same_tensors(weights(whole), weights(again))
    assert rounds(tmp_path / "whole") == rounds_without_partial(tmp_path / "killed")
    expected = [row for row in history(whole) if "loss" in row]
    assert len(expected) == 6 and [row for row in history(again) if "loss" in row] == expected
    assert again.sampled_tokens == whole.sampled_tokens > 0
    assert again.trained_tokens == whole.trained_tokens > 0


def rounds_without_partial(output_dir) -> list[list[dict]]:
    for folder in (output_dir / "rounds").glob("*.partial"):
        shutil.rmtree(folder)
    return rounds(output_dir)


def test_missing_rounds_and_old_ones_are_named(tiny_path, tokenizer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1}
    online(tiny_path, tokenizer, tmp_path, **options).train()
    with pytest.raises(ValueError, match="rounds' holds what an earlier run sampled"):
        online(tiny_path, tokenizer, tmp_path, **options).train()
    shutil.rmtree(tmp_path / "rounds" / "round_1")
    with pytest.raises(ValueError, match="round_1' is missing, whose pairs this run is training on"):
        online(tiny_path, tokenizer, tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_pairs_of_all_iterations_or_of_the_last(tiny_path, tokenizer, tmp_path):
    sizes = {}
    for accumulate in (False, True):
        trainer = online(tiny_path, tokenizer, tmp_path / str(accumulate), online_accumulate=accumulate)
        trainer.train()
        sizes[accumulate] = len(trainer.online.pairs)
        made = [len(r) for r in rounds(tmp_path / str(accumulate))]
        assert sizes[accumulate] == (sum(made) if accumulate else made[-1])


def test_an_iteration_without_pairs_keeps_those_before(tiny_path, tokenizer, tmp_path, caplog):
    def only_first(completions, trainer_state, **kwargs):
        return digits(completions) if trainer_state.global_step == 0 else [1.0] * len(completions)

    trainer = online(tiny_path, tokenizer, tmp_path, reward_funcs=only_first)
    trainer.train()
    assert len(trainer.online.pairs) == pq.read_table(tmp_path / "rounds" / "round_0" / "pairs.parquet").num_rows
    assert not (tmp_path / "rounds" / "round_1" / "pairs.parquet").exists()
    with pytest.raises(ValueError, match="iteration 0 made no pair to train on"):
        online(tiny_path, tokenizer, tmp_path / "x", reward_funcs=lambda prompts, **_: [0] * len(prompts)).train()


def test_steps_follow_from_prompts_and_epochs(tiny_path, tokenizer, tmp_path):
    trainer = online(
        tiny_path, tokenizer, tmp_path, max_steps=-1, num_train_epochs=2, online_num_prompts=4, online_iterations=2
    )
    trainer.train()
    # 2 iterations of 4 prompts, 4 pairs a step, 2 epochs
    assert trainer.state.global_step == 4
    assert [row["online/iteration"] for row in trainer.state.log_history if "online/iteration" in row] == [0, 1]


@pytest.mark.parametrize(("number", "same"), [(None, 14), (5, 5)])
def test_iterations_may_have_the_same_prompts(number, same, tiny_path, tokenizer, tmp_path):
    reused = {"online_reuse_prompts": True, "online_num_prompts": number}
    trainer = online(tiny_path, tokenizer, tmp_path, max_steps=-1, num_train_epochs=1, online_iterations=2, **reused)
    trainer.train()
    first, second = ([row["row"] for row in candidates] for candidates in rounds(tmp_path, "candidates"))
    assert set(first) == set(second) and len(set(first)) == len(first) == same
    # Each has its own answers
    texts = [[row["completions"] for row in candidates] for candidates in rounds(tmp_path, "candidates")]
    assert texts[0] != texts[1]
    # An epoch goes through the prompts of all iterations
    assert trainer.state.global_step == -(-2 * same // 4)


def test_candidates_come_from_where_they_say(tiny_path, tokenizer, tmp_path):
    """Greedy where the temperature is next to 0, from the policy, the reference, and under another prompt."""

    class Both(PreferenceTrainer):
        config_class = PreferenceConfig

        def propose(self, groups):
            self.draw(groups, 1)
            self.draw(groups, 1, source="reference")
            self.draw(groups, 1, prompts=["9*9=" for _ in groups])

    trainer = online(
        tiny_path, tokenizer, tmp_path, cls=Both, online_temperature=1e-4, online_iterations=1, online_top_k=5
    )
    policy, reference = perturbed(tiny_path).eval(), AutoModelForCausalLM.from_pretrained(tiny_path).eval()
    trainer.train()

    def greedy(model, prompt):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(5):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
        text = ids[0, len(tokenizer(prompt)["input_ids"]) :].tolist()
        ended = text.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in text else len(text)
        return tokenizer.decode(text[:ended], skip_special_tokens=True)

    for row in rounds(tmp_path, "candidates")[0]:
        assert row["sources"] == ["policy", "reference", "policy"]
        expected = [greedy(policy, row["prompt"]), greedy(reference, row["prompt"]), greedy(policy, "9*9=")]
        assert row["completions"] == expected


@pytest.mark.parametrize("trainer_class", [PreferenceTrainer, DriftDPOTrainer], ids=lambda c: c.__name__)
def test_nobody_judges_without_the_loop(trainer_class, tmp_path):
    args = trainer_class.config_class(str(tmp_path), use_cpu=True, bf16=False, online_iterations=0)
    assert not trainer_class.needs_scores(args) and trainer_class.dataset_formats(args) == ("pairs",)
    args.online_iterations = 1
    assert trainer_class.needs_scores(args) == (trainer_class is PreferenceTrainer)


def test_bad_input_is_refused_before_anything_runs(tiny_path, tokenizer, tmp_path):
    prompts = Dataset.from_dict({"prompt": PROMPTS})

    def make(judged=None, data=prompts, **options):
        class Judged(PreferenceTrainer):
            config_class = PreferenceConfig

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs, **(judged or {}))

        settings = {"online_iterations": 2, "max_steps": 4, **options}
        return make_trainer(Judged, tiny_path, tokenizer, tmp_path, dataset=data, **settings)

    both = {"reward_funcs": digits, "judge": lambda *a: []}
    for message, arguments in {
        "needs `reward_funcs`.*or `judge`": {},
        "`reward_funcs` and `judge` are both given": {"judged": both},
        "`reward_funcs` judges completions.*`online_iterations` is 0": {
            "judged": {"reward_funcs": digits},
            "online_iterations": 0,
            "data": Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
        },
        "map-style `Dataset` of prompts": {"judged": {"reward_funcs": digits}, "data": prompts.to_iterable_dataset()},
        "needs the column `prompt`.*question": {
            "judged": {"reward_funcs": digits},
            "data": prompts.rename_column("prompt", "question"),
        },
        "`online_iterations` must be at most `max_steps`": {"max_steps": 1},
        "`precompute_ref_log_probs` must be False": {"precompute_ref_log_probs": True},
        "needs `truncation_mode='keep_start'`": {"truncation_mode": "keep_end"},
        "`online_reference` must be": {"online_reference": "last"},
    }.items():
        with pytest.raises(ValueError, match=message):
            make(**arguments)
    with pytest.raises(ValueError, match="`max_length=2`: no prompt of iteration 0 leaves room"):
        make({"reward_funcs": digits}, max_length=2).train()


def test_extras_of_pairs_are_columns():
    group = Group({"prompt": "p"}, 3, [1], [])
    first, second = Candidate("a", [1], True, score=1.0), Candidate("b", [2], False, "reference", 0.0)
    rows = pairs_dataset([Pair(group, first, second, {"hint": 1}), Pair(group, second, first, {"hint": 2})], 4)
    assert rows["hint"] == [1, 2] and rows["iteration"] == [4, 4] and rows["chosen_source"] == ["policy", "reference"]
    for extras in ([{"hint": 1}, {}], [{"row": 1}, {"row": 1}]):
        with pytest.raises(ValueError, match="`extras` of pairs must have the same names"):
            pairs_dataset([Pair(group, first, second, e) for e in extras], 0)


def test_a_method_changes_a_stage(tiny_path, tokenizer, tmp_path):
    class Half(PreferenceTrainer):
        method = Method("half", family="preference")
        extends = {stage: {} for stage in ("select_pairs", "prepare", "collate", "pair_weights")}
        config_class = PreferenceConfig
        _name, _tag_names, _paper = "H", ["trl"], {"title": "", "id": "", "citation": ""}

        def select_pairs(self, pairs):
            pairs = super().select_pairs(pairs)
            for pair in pairs:
                pair.extras["half_gap"] = pair.chosen.score - pair.rejected.score
            return [pairs[i] for i in sorted(self.round_random("half").sample(range(len(pairs)), len(pairs) // 2))]

        def carried(self):
            return [*super().carried(), "half_gap"]

        def collate(self, examples):
            return super().collate(examples) | {"half_gap": torch.tensor([row["half_gap"] for row in examples])}

        def pair_weights(self, record):
            self.log_metric("half/gap", record.extras["half_gap"].mean())
            return record.extras["half_gap"]

    trainer = online(tiny_path, tokenizer, tmp_path, cls=compose(Half, LnDPOTrainer), online_iterations=1)
    trainer.train()
    (pairs,) = rounds(tmp_path)
    assert len(pairs) <= 7
    assert all(p["half_gap"] == pytest.approx(p["chosen_score"] - p["rejected_score"]) for p in pairs)
    assert max(row.get("half/gap", 0) for row in trainer.state.log_history) > 0


def test_a_method_chooses_prompts(tiny_path, tokenizer, tmp_path):
    asked = []

    class Last(PreferenceTrainer):
        config_class = PreferenceConfig

        def choose_prompts(self, count, round):
            asked.append((count, round))
            return [13, 12] if round == 1 else super().choose_prompts(count, round)

    trainer = online(tiny_path, tokenizer, tmp_path, cls=Last, online_num_prompts=3)
    trainer.train()
    assert asked == [(3, 0), (3, 1), (3, 2)]
    first, second, third = ([row["row"] for row in table] for table in rounds(tmp_path, "candidates"))
    assert second == [13, 12]
    # The loop's own order goes on as if it had been asked
    order = cycled(trainer.args.seed, len(PROMPTS), 0, 9, "prompts")
    assert (first, third) == (order[:3], order[6:])


def test_tokens_are_counted(tiny_path, tokenizer, tmp_path):
    trainer = online(
        tiny_path, tokenizer, tmp_path, cls=HypoDPOTrainer, online_kl_num_samples=2, online_kl_max_new_tokens=3
    )
    lengths = []
    sample = trainer.sample

    def measured(inputs):
        samples = sample(inputs)
        lengths.extend(samples["hypo"].completion_mask.sum(1).tolist())
        return samples

    trainer.sample = measured
    assert trainer.sampled_tokens == trainer.trained_tokens == 0
    trainer.train()
    # Two micro-batches of two pairs in each of six steps
    assert len(lengths) == 2 * 2 * 2 * 6
    of_rounds = [n for table in rounds(tmp_path, "candidates") for row in table for n in row["lengths"]]
    assert trainer.sampled_tokens == sum(lengths) + sum(of_rounds)
    assert trainer.trained_tokens == [row for row in history(trainer) if "num_tokens" in row][-1]["num_tokens"]


RANKS = {"save_strategy": "no", "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "online_num_prompts": 5}


def train(tiny_path: str, out: str, world: int) -> None:
    trainer = online(
        tiny_path, tiny_tokenizer(), f"{out}_run", per_device_train_batch_size=2 // world, online_reference="previous",
        **RANKS,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == world
    trainer.train()
    if trainer.accelerator.is_main_process:
        torch.save({"weights": weights(trainer), "history": history(trainer)}, out)


def test_two_processes_equal_one(tiny_path, tmp_path):
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + (os.getpid() + 7000) % 20000),
    }
    command = [sys.executable, "-m", "tests.preference.test_rounds", tiny_path, str(tmp_path / "two")]
    workers = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
            stdout=(tmp_path / f"{rank}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        train(tiny_path, str(tmp_path / "one"), world=1)
        codes = [worker.wait(timeout=400) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{rank}.txt").read_text()[-3000:] for rank in range(2))
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    first, second = rounds(tmp_path / "one_run"), rounds(tmp_path / "two_run")
    assert [[p["chosen_ids"] for p in r] for r in first] == [[p["chosen_ids"] for p in r] for r in second]
    for name, value in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-5)
    for one_row, two_row in zip(one["history"], two["history"], strict=True):
        assert {k: v for k, v in two_row.items() if k != "total_flos"} == pytest.approx(
            {k: v for k, v in one_row.items() if k != "total_flos"}, rel=1e-3, abs=1e-5
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], sys.argv[2], world=2)
