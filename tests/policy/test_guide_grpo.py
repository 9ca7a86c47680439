"""Guide-GRPO against the card's equations, computed by hand."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from papertrl import GuideGRPOConfig, GuideGRPOTrainer
from papertrl.losses.policy.guide_grpo import percentile_gamma, reshape_ratio
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import distributions, gradients, make, metric, run, sampled
from ..harness.table import settings

ratios = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30)
BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "num_generations": 4}


@given(ratios, st.floats(1e-4, 100))
def test_reshaping_and_its_weight(values, gamma):
    ratio = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    shaped = reshape_ratio(ratio, gamma)
    assert shaped.tolist() == pytest.approx([r / (r + gamma) for r in values], rel=1e-12)
    (gradient,) = torch.autograd.grad(shaped.sum(), ratio)
    weight = (gradient * ratio).detach()
    assert weight.tolist() == pytest.approx([r * gamma / (r + gamma) ** 2 for r in values], rel=1e-9)
    assert (weight <= 0.25 + 1e-12).all()


@given(ratios, st.floats(0.01, 1))
def test_gamma_is_the_quantile(values, level):
    found = percentile_gamma(torch.tensor(values, dtype=torch.float64), level)
    assert float(found) == pytest.approx(max(float(np.quantile(values, level)), 1e-4), rel=1e-9)


def test_gamma_without_tokens():
    assert percentile_gamma(torch.zeros(0), 0.9) == pytest.approx(1e-4)


def rare(completions, **kwargs):
    """Reward 1 for about a fifth of all texts."""
    return [float(sum(map(ord, c)) % 5 == 0) for c in completions]


def never(completions, **kwargs):
    return [0.0] * len(completions)


def data(hints=True):
    prompts = [f"{i}+{i + 1}=" for i in range(16)]
    hinted = [f"{p}[1{i % 2}]" if hints else None for i, p in enumerate(prompts)]
    return Dataset.from_dict({"prompt": prompts, "hint": hinted})


@pytest.mark.parametrize("updates", [1, 2])
def test_loss_and_gradient_by_hand(updates, policy_path, tmp_path):
    """-A f(r) on guided rows with the old log-probabilities under the hint, the clipped loss elsewhere."""
    options = BATCH | {"steps_per_generation": 2 * updates, "max_steps": updates, "guide_max_resample_batches": 0}
    values = {"loss_type": "grpo", "epsilon": 0.2, "learning_rate": 1e-2}
    trainer = run(GuideGRPOTrainer, policy_path, tmp_path, rare, data(), **(options | values))
    _, batch, sampler, inputs = trainer.generations[0]
    guided = batch["source"] == Source.HINTED
    assert guided.any() and not guided.all() and guided.view(-1, 4).all(1).eq(guided.view(-1, 4).any(1)).all()

    # Every completion is scored under the dataset's prompt, and was sampled under the one with the hint
    tokenizer = trainer.processing_class
    for row, (ids, sampled_ids) in enumerate(zip(batch["prompt_ids"], batch["sampled_prompt_ids"], strict=True)):
        assert tokenizer.decode(ids, skip_special_tokens=True) == inputs[row]["prompt"]
        wanted = inputs[row]["hint"] if guided[row] else inputs[row]["prompt"]
        assert tokenizer.decode(sampled_ids, skip_special_tokens=True) == wanted
    under_hint = dict(batch, prompt_ids=batch["sampled_prompt_ids"], prompt_mask=batch["sampled_prompt_mask"])
    mask = batch["completion_mask"].bool()
    with torch.no_grad():
        old = sampled(distributions(sampler, under_hint), batch)
    torch.testing.assert_close(batch["old_per_token_logps"][mask], old[mask], rtol=1e-4, atol=1e-5)

    for part, model, _ in trainer.micro_batches:
        logps = sampled(distributions(model, part), part)
        ratio = (logps - part["old_per_token_logps"]).exp()
        hinted = part["source"] == Source.HINTED
        valid = part["completion_mask"].bool()
        flat = ratio[hinted.unsqueeze(1) & valid].detach().double().numpy()
        gamma = max(float(np.quantile(flat, 0.9)), 1e-4) if flat.size else 1.0
        loss = 0.0
        for row in range(len(hinted)):
            total = 0.0
            for t in range(int(valid[row].sum())):
                a, r = part["advantages"][row], ratio[row, t]
                total = total - (a * r / (r + gamma) if hinted[row] else torch.min(a * r, a * r.clamp(0.8, 1.2)))
            loss = loss + total / valid[row].sum() / 8 / 2
        model.zero_grad()
        again = GuideGRPOTrainer._compute_loss(trainer_at(trainer, model), trainer.model, part)
        assert again.item() == pytest.approx(loss.item(), rel=1e-3, abs=1e-6)
        expected = gradients(loss, model)
        found = gradients(again, trainer.model)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=1e-6)


def trainer_at(trainer, model):
    """The trainer with the weights of `model`."""
    trainer.model.load_state_dict(model.state_dict())
    return trainer


def test_only_failing_groups_are_sampled_again(policy_path, tmp_path):
    trainer = make(GuideGRPOTrainer, policy_path, tmp_path, rare, data(), **BATCH, max_steps=2)
    trainer.args.guide_max_resample_batches = 0
    calls, solved = [], []
    inner = trainer.reroll

    def counted(inputs, prompts, group_size=1):
        calls.append((list(inputs), list(prompts), group_size))
        return inner(inputs, prompts, group_size)

    def scored(batch):
        solved.append(batch.rewards.sum(1).view(-1, 4).sum(1).tolist())
        return type(trainer).__mro__[1].groups_to_repair(trainer, batch)

    trainer.reroll, trainer.groups_to_repair = counted, scored
    trainer.train()
    assert len(solved) == 2 and any(0 in groups for groups in solved)
    failing = [sum(share == 0 for share in groups) for groups in solved]
    assert [len(prompts) // 4 for _, prompts, _ in calls] == [count for count in failing if count]
    for inputs, prompts, size in calls:
        assert size == 4 and prompts == [row["hint"] for row in inputs]
    assert metric(trainer, "guide/reroll_fraction") == [count / 4 for count in failing]


def test_groups_without_a_hint_stay(policy_path, tmp_path):
    options = BATCH | {"max_steps": 1, "guide_max_resample_batches": 0}
    trainer = run(
        GuideGRPOTrainer,
        policy_path,
        tmp_path,
        never,
        data(False),
        **options,
    )
    assert (trainer.generations[0][1]["source"] == Source.POLICY).all()
    assert metric(trainer, "loss") == [0.0]


def test_where_hints_do_not_help_the_batch_is_filled_up_without_effect(policy_path, tmp_path):
    options = BATCH | {"max_steps": 1, "guide_max_resample_batches": 1}
    trainer = run(GuideGRPOTrainer, policy_path, tmp_path, never, data(), **options)
    assert metric(trainer, "groups/unfilled_fraction") == [1.0] and metric(trainer, "groups/refill_rounds") == [1.0]
    assert metric(trainer, "loss") == [0.0] and metric(trainer, "guide/kept_hinted_groups") == [0.0]


def test_an_adapter_is_scored_with_its_own_weights(policy_path, tmp_path):
    """With PEFT the old log-probabilities are those of the adapted policy under the hint."""
    args = GuideGRPOConfig(**settings("policy", tmp_path, **BATCH, max_steps=2, beta=0.1, learning_rate=1e-2))
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = GuideGRPOTrainer(policy_path, [rare], args, train_dataset=data(), peft_config=peft)
    batches = []
    inner = trainer._generate_and_score_completions

    def kept(inputs):
        batch = inner(inputs)
        if "sampled_prompt_ids" in batch:
            under = dict(batch, prompt_ids=batch["sampled_prompt_ids"], prompt_mask=batch["sampled_prompt_mask"])
            with torch.no_grad():
                batches.append((batch, sampled(distributions(trainer.model, under), batch)))
        return batch

    trainer._generate_and_score_completions = kept
    trainer.train()
    assert batches
    for batch, old in batches:
        mask = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["old_per_token_logps"][mask], old[mask], rtol=1e-4, atol=1e-5)


def test_evaluation_gives_no_hints(policy_path, tmp_path):
    trainer = make(GuideGRPOTrainer, policy_path, tmp_path, rare, data(), **BATCH, per_device_eval_batch_size=8)
    assert math.isfinite(trainer.evaluate(data().select(range(4)))["eval_loss"])
    assert (trainer.generations[0][1]["source"] == Source.POLICY).all()


def test_hints_never_reach_the_reward_functions_as_prompt(policy_path, tmp_path):
    seen = set()

    def reward(completions, prompts, **kwargs):
        seen.update(prompts)
        return [0.0] * len(completions)

    run(GuideGRPOTrainer, policy_path, tmp_path, reward, data(), **BATCH, max_steps=1)
    assert seen and not any("[" in prompt for prompt in seen)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"guide_reroll_threshold": 1.0}, r"`guide_reroll_threshold` must be a number in \[0, 1\), got 1.0"),
        ({"guide_gamma": 1.5}, r"`guide_gamma` must be in \(0, 1\] with `guide_reshape='percentile'`, got 1.5"),
        ({"guide_gamma": 0}, r"`guide_gamma` must be a number in \(0, inf\), got 0"),
        ({"guide_reshape": "log"}, "`guide_reshape` must be one of 'percentile', 'constant', 'power', 'none'"),
        ({"guide_keep_high": 0.0005}, "`guide_keep_high` must be above `guide_reroll_threshold`=0.001, got 0.0005"),
        ({"loss_type": "cispo"}, "`loss_type` must be one of"),
        ({"importance_sampling_level": "sequence"}, "`importance_sampling_level` 'token'"),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        GuideGRPOConfig(**settings("policy", tmp_path, **values))


def test_a_missing_column_is_named(policy_path, tmp_path):
    with pytest.raises(ValueError, match=r"\['guide_grpo'\] need the dataset column 'hint', but the columns are"):
        make(GuideGRPOTrainer, policy_path, tmp_path, data=data().remove_columns("hint"))
    with pytest.raises(ValueError, match=r"`remove_unused_columns` must be False, got True.*'hint'"):
        make(GuideGRPOTrainer, policy_path, tmp_path, data=data(), remove_unused_columns=True)
