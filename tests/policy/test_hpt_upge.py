"""UPGE: coefficients against autograd of each method's own loss. HPT: what a real run does, against hand-made sums."""

import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback
from trl import GRPOTrainer

from papertrl import HptUpgeGRPOConfig, HptUpgeGRPOTrainer
from papertrl.core.catalogue import load_trainer
from papertrl.core.compose import compose
from papertrl.core.family import POLICY
from papertrl.losses.masked import masked_mean
from papertrl.losses.policy.hpt_upge import (
    ADVANTAGES,
    DENOMINATORS,
    INSTANCES,
    MASKS,
    SHAPES,
    SOFT_WEIGHTS,
    Estimator,
    choose_advantages,
    coefficient,
    coefficient_loss,
    soft_weights,
    switch_weights,
)
from papertrl.losses.policy.surrogate import cispo_surrogate, clipped_surrogate, log_importance_weights
from papertrl.trainers.policy.record import Source

from ..harness.rollouts import checksum, distributions, gradients, make, metric, run, sampled
from ..harness.table import dataset, settings, weights

shapes = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**31))
LOW, HIGH = 0.8, 1.28


def draw(rows, time, seed, per_token=False):
    """logπ with gradient, logπ_old, advantages and rewards (some 0, some NaN), mask that may have empty rows."""
    g = torch.Generator().manual_seed(seed)
    logps = (-3 * torch.rand(rows, time, generator=g, dtype=torch.float64)).requires_grad_()
    old = logps.detach() - 0.4 * torch.randn(rows, time, generator=g, dtype=torch.float64)
    advantages = torch.randn(rows, time if per_token else 1, generator=g, dtype=torch.float64)
    advantages[torch.rand(advantages.shape, generator=g) < 0.2] = 0.0
    rewards = torch.tensor([0.0, 1.0, -1.0, torch.nan])[torch.randint(4, (rows,), generator=g)]
    mask = (torch.rand(rows, time, generator=g) < 0.7).long()
    return logps, old, advantages, rewards, mask


def sign(reward):
    return 0.0 if math.isnan(reward) else 1.0 if reward > 0 else -1.0


def written_out(name, logps, old, advantages, rewards, mask):
    """Loss of the rows that TRL does not have, token by token from the method's definition."""
    total = logps.sum() * 0
    for i, t in mask.nonzero().tolist():
        logp, a = logps[i, t], advantages[i, t if advantages.shape[1] > 1 else 0]
        p, r = logp.exp(), (logp - old[i, t]).exp()
        if name == "sft":
            total = total - logp
        elif name == "reinforce":
            total = total - sign(rewards[i].item()) * logp
        elif name == "ppo":
            total = total - torch.min(r * a, r.clamp(LOW, HIGH) * a)
        elif name == "cispo" and r <= HIGH:
            total = total - r * a
        elif name == "srft":
            total = total - p * a
        elif name == "luffy":
            total = total - p / (p + 0.1) * a
    return total


def trl_loss(name, logps, old, advantages, mask):
    """Loss by the functions that stand for TRL's own, which tests/policy/test_surrogate.py holds to it."""
    log_ratio = (logps - old) * mask
    level = "sequence" if name == "gspo" else "token"
    ratio = log_importance_weights(log_ratio, mask, level).exp()
    if name == "cispo_minimax":
        loss = cispo_surrogate(ratio, advantages, logps, HIGH)
    else:
        loss = clipped_surrogate(ratio, advantages, 1 - LOW, HIGH - 1)
    return (loss * mask).sum()


def found_gradient(estimator, logps, old, advantages, rewards, mask, **values):
    chosen = choose_advantages(estimator.advantage, advantages, rewards)
    log_ratio = (logps - old) * mask
    found = coefficient(estimator, logps, log_ratio, chosen, mask, LOW, HIGH, **values)
    assert not found.requires_grad
    return torch.autograd.grad((coefficient_loss(found, logps) * mask).sum(), logps)[0]


@pytest.mark.parametrize("name", INSTANCES)
@given(shapes, st.booleans())
def test_the_gradient_is_that_of_the_methods_own_loss(name, shape, per_token):
    logps, old, advantages, rewards, mask = draw(*shape, per_token and name != "gspo")
    if name in ("grpo", "dapo", "dr_grpo", "cispo_minimax", "gspo"):
        direct = trl_loss(name, logps, old, advantages, mask)
    else:
        direct = written_out(name, logps, old, advantages, rewards, mask)
    expected = torch.autograd.grad(direct, logps)[0]
    found = found_gradient(INSTANCES[name], logps, old, advantages, rewards, mask)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@given(shapes, st.floats(1.3, 4))
def test_two_sided_clipping(shape, delta):
    logps, old, advantages, rewards, mask = draw(*shape)
    old = old - 0.6
    direct = clipped_surrogate(((logps - old) * mask).exp(), advantages, 1 - LOW, HIGH - 1, delta)
    expected = torch.autograd.grad((direct * mask).sum(), logps)[0]
    found = found_gradient(INSTANCES["grpo"], logps, old, advantages, rewards, mask, delta=delta)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


parts = st.tuples(*map(st.sampled_from, (MASKS, DENOMINATORS, ADVANTAGES, SHAPES)))


@given(shapes, parts, st.floats(0.01, 2))
def test_any_four_parts_combine(shape, chosen, gamma):
    """c of every combination, one token at a time."""
    mask_kind, denominator, advantage, form = chosen
    logps, old, advantages, rewards, mask = draw(*shape)
    found = found_gradient(Estimator(*chosen), logps, old, advantages, rewards, mask, gamma=gamma)
    for i in range(shape[0]):
        places = mask[i].nonzero().flatten().tolist()
        logs = [(logps[i, t] - old[i, t]).item() for t in places]
        s = math.exp(sum(logs) / len(logs)) if logs else 1.0
        for t in range(shape[1]):
            if t not in places:
                assert found[i, t] == 0
                continue
            p, r = math.exp(logps[i, t].item()), math.exp(logps[i, t].item() - old[i, t].item())
            a = {"rollouts": advantages[i, 0].item(), "one": 1.0, "sign": sign(rewards[i].item())}[advantage]
            x = {"theta": 1.0, "old": r, "one": p, "sequence": s}[denominator]
            weight = x if form == "none" else x * gamma / (x + gamma) ** 2
            q = s if mask_kind == "sequence" else r
            cut = (a > 0 and q > HIGH) or (a < 0 and q < LOW)
            stable = {"none": 1.0, "clip": not cut, "sequence": not cut, "cispo": r <= HIGH, "cap": min(1, HIGH / r)}
            assert found[i, t].item() == pytest.approx(-float(stable[mask_kind]) * a * weight, rel=1e-9, abs=1e-12)


def test_cispo_of_the_table_and_as_published_differ_where_the_weight_is_capped():
    logps = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    ones = torch.ones(1, 1, dtype=torch.float64), torch.ones(1), torch.ones(1, 2)
    assert found_gradient(INSTANCES["cispo"], logps, old, *ones).tolist() == [[-1.0, 0.0]]
    assert found_gradient(INSTANCES["cispo_minimax"], logps, old, *ones).tolist() == [[-1.0, pytest.approx(-HIGH)]]


@given(shapes, st.sampled_from(sorted(INSTANCES)))
def test_padding_does_not_enter(shape, name):
    logps, old, advantages, rewards, mask = draw(*shape)
    found = found_gradient(INSTANCES[name], logps, old, advantages, rewards, mask)
    other = torch.where(mask == 1, logps.detach(), -70.0).requires_grad_()
    again = found_gradient(INSTANCES[name], other, torch.where(mask == 1, old, 5.0), advantages, rewards, mask)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert bool((found[mask == 0] == 0).all())


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finite_at_extremes(name, dtype):
    """Ratios up to e^200; a token that the mask removes has no coefficient, however large its weight."""
    logps = torch.tensor([[-80.0, 0.0, -1e-7, -200.0, 0.0]], dtype=dtype, requires_grad=True)
    old = torch.tensor([[-1e-7, -80.0, -1e-7, 0.0, -200.0]], dtype=dtype)
    mask = torch.tensor([[1, 0, 1, 1, 1]])
    ones = torch.ones(1, 1, dtype=dtype)
    grad = found_gradient(INSTANCES[name], logps, old, ones, torch.ones(1), mask)
    if name != "cispo_minimax":
        assert grad.isfinite().all()
    empty = found_gradient(INSTANCES[name], logps, old, ones, torch.ones(1), torch.zeros_like(mask))
    assert bool((empty == 0).all())


@given(shapes)
def test_sequence_mean(shape):
    logps, _, _, _, mask = draw(*shape)
    found = masked_mean(logps, mask, dim=1)
    for i in range(shape[0]):
        kept = [logps[i, t].item() for t in range(shape[1]) if mask[i, t]]
        assert found[i].item() == pytest.approx(sum(kept) / len(kept) if kept else 0.0)


def test_weights_of_the_modes():
    assert switch_weights(torch.tensor([True, False])).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    right = torch.arange(9) / 8
    assert soft_weights(right).tolist() == [list(row) for row in SOFT_WEIGHTS]
    # Groups of four and of five go by the nearest eighth; nobody's scores are no reason to imitate
    found = soft_weights(torch.tensor([1 / 4, 2 / 4, 1 / 5, 3 / 5, math.nan]))
    assert found.tolist() == [list(SOFT_WEIGHTS[k]) for k in (2, 4, 2, 5, 8)]


# --- The trainer ------------------------------------------------------------------------------------------------

BATCH = {"per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 1, "check_records": True}
GATED = BATCH | {"hpt_gate": 0.5}


def verdicts(scored, group):
    """Rewards of the group's rollouts as they were sampled."""
    return scored.sampled_rewards[scored.group_ids == group, 0].tolist()


def groups_of(scored):
    return sorted(set(scored.group_ids.tolist()))


@pytest.mark.parametrize("mode", ["switch", "soft"])
def test_what_a_run_demonstrates(mode, policy_path, tokenizer, tmp_path):
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, **(GATED | {"max_steps": 3, "hpt_mode": mode}))
    fractions = []
    for scored, batch, _, rows in trainer.generations:
        groups, learned = groups_of(scored), 0
        share = 0
        per_group = {}
        for group in groups:
            places = (scored.group_ids == group).nonzero().flatten().tolist()
            solved = verdicts(scored, group)
            if mode == "switch":
                shown = sum(solved) / 4 <= 0.5
                row = (0.0, 0.0, 1.0) if shown else (1.0, 0.0, 0.0)
            else:
                shown = True
                row = SOFT_WEIGHTS[round(8 * (1 + sum(solved[1:])) / 4)]
            per_group[group] = row
            share += row[0] > 0
            learned += row[2] > 0
            for n, i in enumerate(places):
                demonstrated = shown and n == 0
                assert scored.source[i] == (Source.DEMONSTRATION if demonstrated else Source.POLICY)
                if demonstrated:
                    text = rows[i]["completion"]
                    expected = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
                    assert batch["completion_ids"][i, : len(expected)].tolist() == expected
                    assert batch["completion_mask"][i].sum() == batch["loss_mask"][i].sum() == len(expected)
                    assert math.isnan(scored.rewards[i, 0]) and not scored.truncated[i]
                else:
                    assert scored.rewards[i, 0] == scored.sampled_rewards[i, 0]
        share /= len(groups)
        for i, group in enumerate(scored.group_ids.tolist()):
            rl, off_policy, sft = per_group[group]
            shown = scored.source[i] == Source.DEMONSTRATION
            assert batch["row_weight"][i].item() == pytest.approx(0.0 if shown else rl * share * 8)
            assert batch["statistics/hpt/sft_weight"][i] == (sft if shown else 0.0)
            assert batch["statistics/hpt/off_policy_weight"][i] == (off_policy if shown else 0.0)
            if mode == "switch" and sft:
                assert scored.advantages[i] == 0
        live = batch["row_weight"] > 0
        assert (
            batch["num_rows_in_batch"] == live.sum() and batch["num_items_in_batch"] == batch["loss_mask"][live].sum()
        )
        fractions.append(learned / len(groups))
    assert metric(trainer, "hpt/sft_prompt_fraction") == pytest.approx(fractions)
    assert max(fractions) > 0 and (mode == "soft" or min(fractions) < 1)
    if mode == "switch":
        share = [sum(sum(verdicts(s, g)) == 0 for g in groups_of(s)) / 4 for s, *_ in trainer.generations]
        assert metric(trainer, "hpt/solve_none") == pytest.approx(share)
    # The demonstrations' rewards are not among those that are logged
    kept = [torch.nanmean(s.rewards).item() for s, *_ in trainer.generations]
    assert metric(trainer, "reward") == pytest.approx(kept, abs=1e-6)


def hybrid_loss(generation, mode, loss_type, coef):
    """Eq. 13 over a generation batch, on policy, prompt by prompt from the model that sampled it."""
    scored, batch, model, _ = generation
    logps = sampled(distributions(model, batch), batch)
    groups = groups_of(scored)
    tokens = dict.fromkeys(groups, 0)
    policy = dict.fromkeys(groups, 0.0)
    shown = dict.fromkeys(groups, 0.0)
    rl = {}
    for g in groups:
        places = (scored.group_ids == g).nonzero().flatten().tolist()
        solved = verdicts(scored, g)
        if mode == "switch":
            rl[g], off, sft = (0, 0, 1) if sum(solved) / 4 <= 0.5 else (1, 0, 0)
            rewards = solved
        else:
            rl[g], off, sft = SOFT_WEIGHTS[round(8 * (1 + sum(solved[1:])) / 4)]
            rewards = [1.0, *solved[1:]]
        mean = sum(rewards) / 4
        std = math.sqrt(sum((x - mean) ** 2 for x in rewards) / 3)
        for i, reward in zip(places, rewards, strict=True):
            a = (reward - mean) / (std + 1e-4)
            length = int(batch["completion_mask"][i].sum())
            if scored.source[i] == Source.DEMONSTRATION:
                for t in range(length):
                    p = logps[i, t].exp()
                    shown[g] = shown[g] - (coef * sft * logps[i, t] + off * a * p / (p + 0.1)) / length
            elif rl[g]:
                tokens[g] += length
                norm = {"dr_grpo": 1, "grpo": length, "dapo": 1}[loss_type]
                policy[g] = policy[g] - rl[g] * a * logps[i, :length].sum() / norm
    live = [g for g in groups if rl[g] > 0]
    per_prompt = 4 if mode == "switch" else 3
    total = sum(shown[g] for g in groups) / len(groups)
    if live and loss_type == "dapo":
        total = total + sum(policy[g] for g in live) / sum(tokens[g] for g in live) * len(live) / len(groups)
    elif live:
        total = total + sum(policy[g] for g in live) / (per_prompt * len(groups))
    return total, model


@pytest.mark.parametrize("mode", ["switch", "soft"])
@pytest.mark.parametrize("loss_type", ["dr_grpo", "grpo", "dapo"])
@pytest.mark.parametrize("plain", [False, True])
def test_gradient_is_that_of_the_hybrid_loss(mode, loss_type, plain, policy_path, tmp_path):
    options = GATED | {"hpt_mode": mode, "loss_type": loss_type, "hpt_sft_coef": 0.7} | (POLICY.exact if plain else {})
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, **options)
    loss, model = hybrid_loss(trainer.generations[0], mode, loss_type, 0.7)
    expected = gradients(loss, model)
    trainer.model.load_state_dict(model.state_dict())
    trainer.current_gradient_accumulation_steps = 2
    batches = [inputs for inputs, _, _ in trainer.micro_batches]
    total = sum(trainer._compute_loss(trainer.model, inputs) for inputs in batches)
    for name, gradient in gradients(total, trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("balance", ["paper", "released", "loss_type"])
def test_balance_of_rollouts_and_demonstrations_under_several_caps(balance, policy_path, tmp_path):
    """The gradients of Eq. 11 and 12 and of the released losses, and that a mere cap does not change them."""
    for cap in (8, 48):
        options = GATED | {"max_completion_length": cap, "hpt_balance": balance}
        trainer = make(HptUpgeGRPOTrainer, policy_path, tmp_path / str(cap), **options)
        inner = trainer._generate_single_turn

        def cut(*args, inner=inner, **kwargs):
            ids, _ = inner(*args, **kwargs)
            return [row[: 3 + i % 4] for i, row in enumerate(ids)], None

        trainer._generate_single_turn = cut
        trainer.train()
        scored, batch, model, _ = trainer.generations[0]
        logps = sampled(distributions(model, batch), batch)
        mask, shown = batch["completion_mask"], batch["source"] == Source.DEMONSTRATION
        switched = shown.view(-1, 4).any(1).repeat_interleave(4)
        assert shown.any() and not switched.all()
        sums = (logps * mask).sum(1)
        rollouts = -(scored.advantages * sums)[~switched].sum()
        lengths = mask.sum(1)
        if balance == "released":
            # Two micro-batches, whose sums are averaged; the mean over all tokens of demonstrations
            loss = rollouts / lengths.max() / 2 - sums[shown].sum() / lengths[shown].sum()
        else:
            divisor = len(mask) * (cap if balance == "loss_type" else 1)
            loss = rollouts / divisor - (sums / lengths)[shown].sum() / 4
        expected = gradients(loss, model)
        trainer.model.load_state_dict(model.state_dict())
        trainer.current_gradient_accumulation_steps = 2
        batches = [inputs for inputs, _, _ in trainer.micro_batches]
        total = sum(trainer._compute_loss(trainer.model, inputs) for inputs in batches)
        for name, gradient in gradients(total, trainer.model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-6)


OFF_POLICY = BATCH | {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "hpt_mode": "none"}
TRL = {
    "grpo": {},
    "dapo": {"loss_type": "dapo"},
    "dr_grpo": {"scale_rewards": "none"},
    "gspo": {"importance_sampling_level": "sequence"},
    "cispo_minimax": {"loss_type": "cispo", "epsilon_high": 1.05},
}


@pytest.mark.parametrize("name", TRL)
def test_gradient_in_a_run_equals_trls_loss(name, policy_path, tmp_path):
    """TRL's `_compute_loss` itself, on batches that the policy has moved away from."""
    options = OFF_POLICY | POLICY.exact | {"epsilon": 0.05, "hpt_upge_instance": name, "learning_rate": 1e-3}
    loss_types = {"dapo": "dapo", "cispo_minimax": "cispo"}
    scale = TRL[name].get("scale_rewards", "group")
    options |= {"loss_type": loss_types.get(name, "dr_grpo"), "scale_rewards": scale, "epsilon_high": 0.05}
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, **options)
    if name != "cispo_minimax":
        assert 0 < metric(trainer, "upge/masked_tokens")[1] < 1
    args = trainer.args
    largest = 0.0
    for batch, model, _ in trainer.micro_batches[2:]:
        trainer.model.load_state_dict(model.state_dict())
        trainer.current_gradient_accumulation_steps = 2
        found = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
        trainer.importance_sampling_level = TRL[name].get("importance_sampling_level", "token")
        trainer.epsilon_high = TRL[name].get("epsilon_high", 0.05)
        expected = gradients(GRPOTrainer._compute_loss(trainer, trainer.model, batch), trainer.model)
        trainer.importance_sampling_level, trainer.epsilon_high = "token", args.epsilon_high
        largest = max(largest, *(gradient.abs().max() for gradient in expected.values()))
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6)
    assert largest > 1e-3


def test_the_ratio_is_to_whatever_the_record_says(policy_path, tmp_path):
    """Rows sampled under another prompt differ in `old_per_token_logps` alone."""
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, **(OFF_POLICY | {"hpt_upge_instance": "grpo"}))
    trainer.current_gradient_accumulation_steps = 2
    batch = dict(trainer.micro_batches[0][0])
    moved = 0.1 * torch.linspace(-1, 1, batch["old_per_token_logps"].numel()).view_as(batch["old_per_token_logps"])
    batch["old_per_token_logps"] = batch["old_per_token_logps"] + moved
    logps = sampled(distributions(trainer.model, batch), batch)
    loss = logps.sum() * 0
    for i, t in batch["loss_mask"].nonzero().tolist():
        r, a = (logps[i, t] - batch["old_per_token_logps"][i, t]).exp(), batch["advantages"][i]
        loss = loss - torch.min(r * a, r.clamp(0.8, 1.2) * a)
    expected = gradients(loss / (batch["num_rows_in_batch"] * 8), trainer.model)
    found = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-3, atol=1e-6)


def test_padding_and_prompt_do_not_enter(policy_path, tmp_path):
    trainer = run(
        HptUpgeGRPOTrainer, policy_path, tmp_path, **(GATED | {"hpt_mode": "soft", "hpt_upge_instance": "grpo"})
    )
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer.micro_batches[0][0]
    padding = batch["completion_mask"] == 0
    assert padding.any()
    expected = gradients(trainer._compute_loss(trainer.model, batch), trainer.model)
    changed = batch | {"completion_ids": torch.where(padding, 9, batch["completion_ids"])}
    for name, gradient in gradients(trainer._compute_loss(trainer.model, changed), trainer.model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", ["switch", "soft"])
@pytest.mark.parametrize("reward", [0.0, 1.0, math.nan])
def test_constant_rewards(mode, reward, policy_path, tmp_path):
    """All fail: demonstrations alone. All solve, or nobody scores: nothing to learn."""

    def constant(completions, **kwargs):
        return [None if math.isnan(reward) else reward] * len(completions)

    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, constant, **(BATCH | {"hpt_mode": mode}))
    fails = reward == 0
    assert metric(trainer, "hpt/sft_prompt_fraction") == [float(fails)]
    assert (metric(trainer, "grad_norm")[0] > 0) == fails and math.isfinite(metric(trainer, "loss")[0])
    if fails and mode == "switch":
        # The loss of supervised learning: mean over demonstrations of the mean over their tokens
        scored, batch, model, _ = trainer.generations[0]
        logps = sampled(distributions(model, batch), batch)
        shown = [i for i, source in enumerate(scored.source.tolist()) if source == Source.DEMONSTRATION]
        losses = [-logps[i][batch["completion_mask"][i].bool()].mean().item() for i in shown]
        assert metric(trainer, "loss")[0] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
        # All of them fit into one of two micro-batches
        assert metric(trainer, "loss/hpt_sft") == pytest.approx([sum(losses) / len(losses) / 2], rel=1e-4)


def chat_dataset(**columns):
    prompts = [[{"role": "user", "content": f"{i}+1="}] for i in range(4)]
    return Dataset.from_dict({"prompt": prompts} | {name: [value] * 4 for name, value in columns.items()})


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] }}{{ eos_token + '\n' if m['role'] == 'assistant' "
    "else '\n' }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def demonstrated(trainer):
    scored, batch, _, _ = trainer.generations[0]
    i = (scored.source == Source.DEMONSTRATION).nonzero().flatten().tolist()[0]
    return batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist(), bool(scored.truncated[i])


def wrong(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize("target", ["42", [{"role": "assistant", "content": "42"}]], ids=["text", "messages"])
def test_demonstration_under_a_chat_template(target, policy_path, tokenizer, tmp_path):
    data = chat_dataset(target=target)
    trainer = make(HptUpgeGRPOTrainer, policy_path, tmp_path, wrong, data, **(BATCH | {"hpt_demo_column": "target"}))
    trainer._tokenizer.chat_template = trainer.chat_template = TEMPLATE
    trainer.train()
    # Up to the end token: the line break after it is the template's, not the policy's
    assert demonstrated(trainer) == ([*tokenizer("42")["input_ids"], tokenizer.eos_token_id], False)


def test_a_long_demonstration_is_cut_without_an_end(policy_path, tokenizer, tmp_path):
    data = Dataset.from_dict({"prompt": ["1+1="] * 4, "completion": ["1234567890"] * 4})
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, wrong, data, **BATCH)
    assert demonstrated(trainer) == (tokenizer("12345678")["input_ids"], True)


def test_a_prompt_without_a_demonstration_keeps_its_rollouts(policy_path, tmp_path):
    data = Dataset.from_dict({"prompt": ["1+1=", "2+1=", "3+1=", "4+1="], "completion": ["2", None, None, "5"]})
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, wrong, data, **BATCH)
    scored, _, _, rows = trainer.generations[0]
    for i, (source, row) in enumerate(zip(scored.source.tolist(), rows, strict=True)):
        assert (source == Source.DEMONSTRATION) == (i % 4 == 0 and row["completion"] is not None)
    assert metric(trainer, "hpt/sft_prompt_fraction") == [0.5]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (dataset("policy").remove_columns("completion"), "need the dataset column 'completion'"),
        (dataset("policy").map(lambda row: {"completion": [row["prompt"]]}), "must hold text where prompts are text"),
        (chat_dataset(completion=[{"role": "user", "content": "1"}]), r"one assistant message .* of \['user'\]"),
    ],
    ids=["no column", "list", "roles"],
)
def test_bad_demonstrations_are_refused(data, message, policy_path, tmp_path):
    def train():
        trainer = make(HptUpgeGRPOTrainer, policy_path, tmp_path, wrong, data, **BATCH)
        trainer._tokenizer.chat_template = trainer.chat_template = TEMPLATE
        trainer.train()

    with pytest.raises(ValueError, match=message):
        train()


def test_without_demonstrations_no_column_is_needed(policy_path, tmp_path):
    data = dataset("policy").remove_columns("completion")
    trainer = run(HptUpgeGRPOTrainer, policy_path, tmp_path, data=data, **(BATCH | {"hpt_mode": "none"}))
    assert math.isfinite(metric(trainer, "loss")[0])


def test_evaluation_shows_nothing(policy_path, tmp_path):
    trainer = make(HptUpgeGRPOTrainer, policy_path, tmp_path, wrong, **BATCH, per_device_eval_batch_size=8)
    assert math.isfinite(trainer.evaluate(dataset("policy").select(range(4)))["eval_loss"])
    for scored, _, _, _ in trainer.generations:
        assert bool((scored.source == Source.POLICY).all())


def test_a_large_gradient_is_no_step_for_weights_or_optimizer(policy_path, tmp_path):
    class Guard(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                args.hpt_max_grad_norm_skip = 1e-9
                kept.update(weights=weights(trainer), state=moments())

    def moments():
        return [{k: v.clone() for k, v in s.items()} for s in trainer.optimizer.state.values()]

    kept = {}
    trainer = make(HptUpgeGRPOTrainer, policy_path, tmp_path, **(GATED | {"max_steps": 3}))
    before = weights(trainer)
    trainer.add_callback(Guard())
    trainer.train()
    assert any(not torch.equal(kept["weights"][name], value) for name, value in before.items())
    for name, value in weights(trainer).items():
        torch.testing.assert_close(value, kept["weights"][name], rtol=0, atol=0)
    assert len(kept["state"]) > 0
    for then, now in zip(kept["state"], moments(), strict=True):
        assert all(torch.equal(then[key], now[key]) for key in then)
    assert metric(trainer, "hpt/skipped_steps") == [0.0, 1.0, 1.0]
    assert min(metric(trainer, "grad_norm")) > 1e-9


@pytest.mark.parametrize("other", ["d3s", "lp_reg", "dler"])
def test_the_order_of_listing_changes_nothing(other, policy_path, tmp_path):
    same = {"epsilon": 0.2, "epsilon_high": 0.28, "delta": None, "beta": 0.0, "loss_type": "dapo"}
    extra = {"d3s": {}, "lp_reg": {"lp_reg_kappa": 0.2, "lp_reg_rho": 0.6}, "dler": {"dler_truncation_length": 4}}[
        other
    ]
    options = GATED | same | extra | {"max_steps": 2, "num_iterations": 2, "hpt_upge_instance": "grpo"}
    results = []
    for names in ([other, "hpt_upge"], ["hpt_upge", other]):
        trainer = run(compose(*map(load_trainer, names)), policy_path, tmp_path / names[0], **options)
        results.append(weights(trainer))
        assert max(metric(trainer, "hpt/sft_prompt_fraction")) > 0
        # Selection among rollouts leaves demonstrations whole
        scored, batch, _, _ = trainer.generations[0]
        shown = scored.source == Source.DEMONSTRATION
        assert torch.equal(batch["loss_mask"][shown], batch["completion_mask"][shown])
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=0, atol=0)


def test_ratios_of_another_method_keep_its_loss(policy_path, tmp_path):
    """A method that reshapes ratios in the stage *ratios* is not overruled by the table."""

    class Reshaped(HptUpgeGRPOTrainer):
        def change_ratios(self, stats, record):
            super().change_ratios(stats, record)
            first = (record.group_ids == 0).unsqueeze(1)
            stats.reshape(first, stats.ratio / (stats.ratio + 0.5))
            stats.unclip(first)

    results = []
    for instance in (None, "grpo"):
        options = OFF_POLICY | {"hpt_upge_instance": instance}
        trainer = run(Reshaped, policy_path, tmp_path / str(instance), checksum, **options)
        results.append(weights(trainer))
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hpt_gate": -0.1}, r"`hpt_gate` must be a number in \[0, 1\], got -0.1"),
        ({"hpt_gate": math.nan}, r"`hpt_gate` must be a number in \[0, 1\], got nan"),
        ({"hpt_mode": "mix"}, "`hpt_mode` must be one of 'switch', 'soft', 'none', got 'mix'"),
        ({"hpt_sft_coef": -1.0}, r"`hpt_sft_coef` must be a number in \[0, inf\), got -1.0"),
        ({"hpt_upge_instance": "rloo"}, "`hpt_upge_instance` must be one of 'sft', 'ppo', .* or None, got 'rloo'"),
        ({"hpt_upge_gamma": 0.0}, r"`hpt_upge_gamma` must be a number in \(0, inf\), got 0.0"),
        ({"hpt_max_grad_norm_skip": 0.0}, r"`hpt_max_grad_norm_skip` must be a number in \(0, inf\) or None"),
        (
            {"hpt_upge_denominator": "one"},
            "`hpt_upge_denominator` is 'one', but changes a row .*`hpt_upge_instance` names none",
        ),
        ({"hpt_upge_instance": "grpo", "loss_type": "sapo"}, "`loss_type` is the normalizer of .* got 'sapo'"),
        (
            {"hpt_upge_instance": "grpo", "importance_sampling_level": "sequence"},
            "`importance_sampling_level` is 'sequence', but .*'gspo'",
        ),
        ({"hpt_upge_instance": "dr_grpo"}, "'dr_grpo'` goes with `scale_rewards='none'`, got 'group'"),
        (
            {"hpt_mode": "soft", "multi_objective_aggregation": "normalize_then_sum"},
            "`multi_objective_aggregation` must be 'sum_then_normalize', got 'normalize_then_sum'",
        ),
    ],
)
def test_bad_values_are_refused(values, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HptUpgeGRPOConfig(**settings("policy", tmp_path, **values))


def test_deepspeed_cannot_be_held_back(tmp_path):
    args = HptUpgeGRPOConfig(**settings("policy", tmp_path))
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match=r"`hpt_max_grad_norm_skip` is 80\.0, but DeepSpeed .* Set it to None"):
        args.validate()


def test_parts_override_the_row(tmp_path):
    args = HptUpgeGRPOConfig(**settings("policy", tmp_path, hpt_upge_instance="grpo", hpt_upge_mask="none"))
    assert args.estimator() == Estimator("none", "old", "rollouts", "none")
