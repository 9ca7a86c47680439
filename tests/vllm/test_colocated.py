"""vLLM itself behind policy trainers, in their process and on the CPU: `bash tests/vllm/run`."""

import json
import math
from importlib.util import find_spec

import pytest
import torch
from trl.generation.vllm_generation import VLLMGeneration

from papertrl import cli
from papertrl.core.catalogue import load_trainer
from papertrl.trainers.policy.base import PolicyTrainer
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import checksum, distributions, frozen, make, metric, run, sampled
from ..harness.table import (
    CASES,
    LORA,
    MATTER,
    active,
    active_config,
    build,
    dataset,
    reward_of,
    settings,
    trainer_of,
    weights,
)
from ..job.conftest import flags

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: `bash tests/vllm/run`"),
]

COLOCATED = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.05, "vllm_max_model_length": 64}
MARKS = "=;:{}()<>"
STOPS = [*"0123456789", *(first + second for first in MARKS for second in MARKS)]
# Prompts of one length
ROWS = list(dataset("policy").select(range(8)))
# What of a method vLLM cannot do, switched off; components of the slot decoding are nothing else
WITHOUT = {"hapo": {"hapo_temperature_tau": 0.0}}
ACTING = [case for case in CASES if case.family == "policy" and case.declaration.slot != "decoding"]


@pytest.fixture
def answers(monkeypatch):
    """Every row that vLLM was asked for: `(prompt ids, completion ids, log-probabilities of its tokens)`."""
    rows, generate = [], VLLMGeneration.generate

    def spied(self, prompts, *args, **kwargs):
        found = generate(self, prompts, *args, **kwargs)
        rows.extend(zip(prompts, map(list, found[1]), [[token[0] for token in row] for row in found[2]], strict=True))
        return found

    monkeypatch.setattr(VLLMGeneration, "generate", spied)
    return rows


def rows_of(batch):
    """Rows of a generation batch in the form of `answers`."""
    prompt_mask, mask = batch["prompt_mask"].bool(), batch["completion_mask"].bool()
    return [
        (
            batch["prompt_ids"][i, prompt_mask[i]].tolist(),
            batch["completion_ids"][i, mask[i]].tolist(),
            batch["sampling_per_token_logps"][i, mask[i]].tolist(),
        )
        for i in range(len(mask))
    ]


def differences(batch, model):
    """Of each sampled token, how far vLLM's log-probability is from that of a plain forward pass of `model`."""
    with torch.no_grad():
        logps = sampled(distributions(model, batch), batch)
    return (logps - batch["sampling_per_token_logps"])[batch["completion_mask"].bool()].abs()


# --- Methods ----------------------------------------------------------------------------------------------------


def test_the_base_trains_on_what_vllm_sampled(answers, policy_path, tmp_path):
    trainer = make(PolicyTrainer, policy_path, tmp_path, **COLOCATED)
    before = weights(trainer)
    trainer.train()
    assert [row for _, batch, *_ in trainer.generations for row in rows_of(batch)] == answers
    assert len(answers) == 3 * 8 and len({tuple(ids) for _, ids, _ in answers}) > 12
    losses = metric(trainer, "loss")
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert any(not torch.equal(value, before[name]) for name, value in weights(trainer).items())
    # vLLM rounds to bfloat16
    _, batch, untrained, _ = trainer.generations[0]
    largest = differences(batch, untrained).max().item()
    assert 0 < largest <= 0.01
    assert metric(trainer, "sampling/sampling_logp_difference/max")[0] == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("case", ACTING, ids=str)
def test_every_method_trains(case, policy_path, tmp_path):
    # Steps enough for a group that fails, whatever is drawn
    values = {"max_steps": 8} | COLOCATED | MATTER.get(case.method, {}) | WITHOUT.get(case.method, {})
    args = active_config(case.trainer, [case.method], tmp_path, **values)
    trainer = build(case.trainer, "policy", policy_path, args, reward=reward_of(case.trainer))
    trainer.train()
    losses = metric(trainer, "loss")
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    assert any(value > 0 for value in metric(trainer, case.declaration.signal))


def test_hinted_rows_come_from_vllm(answers, policy_path, tmp_path):
    trainer_class = load_trainer("scaf_grpo")
    values = active(["scaf_grpo"], trainer_class) | MATTER["scaf_grpo"]
    trainer = run(trainer_class, policy_path, tmp_path, reward_of(trainer_class), **COLOCATED, **values)
    hinted = [
        row
        for _, batch, *_ in trainer.generations
        for row, source in zip(rows_of(batch), batch["source"].tolist(), strict=True)
        if source == Source.HINTED
    ]
    assert len(hinted) == sum(metric(trainer, "scaf/repaired_groups")) > 0
    hints = {tuple(ids) for row in dataset("policy")["hints"] for ids in trainer.tokenize_prompts(row)}
    assert all(row in answers and tuple(row[0]) in hints for row in hinted)
    # Hints are tried within a step, on the weights that sampled the rest of it
    assert all(differences(batch, model).max() <= 0.02 for _, batch, model, _ in trainer.generations)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hapo", "Component 'entropy_temperature' needs the rollout loop.*`use_vllm` must be False, got True"),
        ("entropy_temperature", "Component 'entropy_temperature' needs.*`use_vllm` must be False, got True"),
        ("rlg", "Component 'rlg' needs the rollout loop.*`use_vllm` must be False, got True"),
    ],
)
def test_what_needs_another_law_refuses_before_vllm_starts(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(VLLMGeneration, "__init__", None)
    with pytest.raises(ValueError, match=message):
        trainer_of(name, "policy").config_class(**settings("policy", tmp_path, **COLOCATED))


# --- Weights ----------------------------------------------------------------------------------------------------


def test_vllm_answers_with_the_weights_of_the_last_update(policy_path, tmp_path):
    trainer = run(PolicyTrainer, policy_path, tmp_path, max_steps=2, learning_rate=0.03, **COLOCATED)
    (_, _, start, _), (_, batch, updated, _) = trainer.generations
    assert differences(batch, updated).max() <= 0.02
    assert differences(batch, start).mean() > 0.2
    greedy = trainer.answer(ROWS, 8)
    assert greedy == answered(trainer, frozen(trainer.model)) != answered(trainer, updated)


def test_vllm_answers_with_merged_adapters(policy_path, tmp_path):
    args = PolicyTrainer.config_class(**settings("policy", tmp_path, learning_rate=0.05, **COLOCATED))
    trainer = PolicyTrainer(policy_path, checksum, args, train_dataset=dataset("policy"), peft_config=LORA)
    trainer.train()
    greedy = trainer.answer(ROWS, 8)
    assert greedy == answered(trainer, trainer.model)
    with trainer.model.disable_adapter():
        assert greedy != answered(trainer, trainer.model)


def answered(trainer, model):
    """Greedy completions of `ROWS`, eight tokens or up to an end token, by `generate`."""
    ids = torch.tensor(trainer.tokenize_prompts([row["prompt"] for row in ROWS]))
    ends = trainer.eos_token_ids
    found = model.generate(input_ids=ids, do_sample=False, max_new_tokens=8, eos_token_id=ends, pad_token_id=0)
    return [
        row[: next((i for i, token in enumerate(row, 1) if token in ends), 8)]
        for row in found[:, ids.shape[1] :].tolist()
    ]


def test_a_job_measures_held_out_answers_of_vllm(answers, policy_path, tmp_path):
    given = {"model_name_or_path": policy_path, "start_model_steps": None, "max_steps": 2, "max_completion_length": 8}
    told = flags(**given, task="addition", output_dir=tmp_path / "out", **COLOCATED)
    assert cli.main(["train", "--methods", "grpo", "lion", *told]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert sum("held_out/accuracy" in line for line in lines) == 2
    # 8 before and after training, and 16 for each step
    assert len(answers) == 2 * 8 + 2 * 16


# --- What ends a completion -------------------------------------------------------------------------------------


def test_stop_strings_of_vllm_end_a_completion(policy_path, tokenizer, tmp_path):
    trainer = run(
        PolicyTrainer, policy_path, tmp_path, max_steps=1, per_device_train_batch_size=16, max_completion_length=2,
        skip_zero_rows=False, mask_truncated_completions=True, generation_kwargs={"stop": STOPS}, **COLOCATED,
    )  # fmt: skip
    scored, batch, *_ = trainer.generations[0]
    lengths, finished = set(), []
    for i, ids in enumerate(batch["completion_ids"].tolist()):
        ids = ids[: int(scored.lengths[i])]
        text = tokenizer.decode(ids)
        stop = next((stop for stop in STOPS if text.endswith(stop)), "")
        ended = bool(stop) or ids[-1] in trainer.eos_token_ids
        assert not any(stop in text[:-1] for stop in STOPS) and (ended or len(ids) == 2)
        assert bool(scored.truncated[i]) != ended
        assert int(batch["completion_mask"][i].sum()) == (len(ids) if ended else 0)
        lengths.add(len(stop))
        finished.append(ended)
    # Stop strings of one and of two tokens, and completions that end in other ways
    assert lengths == {0, 1, 2} and not all(finished)
    assert metric(trainer, "completions/clipped_ratio") == pytest.approx([1 - sum(finished) / len(finished)])
