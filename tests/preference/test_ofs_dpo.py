import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from papertrl import (
    IrpoDPOTrainer,
    LnDPOTrainer,
    OfsDPOConfig,
    OfsDPOTrainer,
    SemDPOTrainer,
    SrpoDPOTrainer,
    compose,
)
from papertrl.losses.preference.ofs_dpo import chase
from papertrl.trainers.preference.base import PreferenceTrainer
from papertrl.trainers.preference.ofs_dpo import Roles

from ..harness.pairs import first_batch, history, loss_and_gradients, make_trainer, recorded

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="gaussian")


def ofs(tiny_path, tokenizer, folder, cls=OfsDPOTrainer, **options):
    return make_trainer(cls, tiny_path, tokenizer, folder, model=tiny_path, peft_config=LORA, **options)


def adapter(trainer, name):
    """Weights of one adapter, under names without it."""
    return {
        key.replace(f".{name}", ""): p.detach().clone()
        for key, p in trainer.model.named_parameters()
        if f".{name}." in key
    }


def move(trainer, scale=0.2):
    """Move both adapters away from their common start, differently."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


# --- The chase -------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=6),
    st.floats(0.05, 2),
    st.none() | st.floats(0.5, 10),
)
def test_chase_raises_both_margins_alike(pairs, beta, clip):
    fast, slow = (torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in zip(*pairs, strict=True))
    leads, follows = chase(fast, slow, beta, clip)
    values, slopes = [], []
    for f, s in pairs:
        gap = beta * (f - s)
        bounded = gap if clip is None else max(-clip, min(clip, gap))
        values.append(math.log1p(math.exp(-bounded)))
        slopes.append(-beta / (1 + math.exp(gap)) if clip is None or abs(gap) <= clip else 0.0)
    assert leads.tolist() == follows.tolist() == pytest.approx(values)
    # As the trainer weighs them
    (0.3 * leads - 0.3 * follows).sum().backward()
    assert fast.grad.tolist() == slow.grad.tolist() == pytest.approx([0.3 * slope for slope in slopes])


def test_roles_go_to_the_lower_loss_of_an_interval():
    roles = Roles()
    roles.decide(0)
    assert (roles.fast, roles.swaps, roles.better()) == (0, 0, 0)
    for losses in ([0.7, 0.6], [0.5, 0.55]):
        roles.observe(torch.tensor(losses))
    roles.decide(0)
    assert roles.fast == 0 and roles.better() == 1
    roles = Roles(**roles.state())
    roles.decide(1)
    assert (roles.fast, roles.swaps, roles.losses) == (1, 1, None)
    roles.decide(1)
    roles.observe(torch.tensor([0.4, 0.4]))
    roles.decide(2)
    assert (roles.fast, roles.swaps) == (1, 1)
    roles.observe(torch.tensor([0.4, math.nan]))
    roles.decide(3)
    assert roles.fast == 0


# --- The loss in the trainer -----------------------------------------------------------------------------------------


def margins_of(trainer, batch, name):
    """Δ of each pair under one adapter, from full logits."""
    ids, mask = batch["input_ids"], batch["completion_mask"]
    totals = []
    for active in (name, None):
        if active is None:
            with trainer.model.disable_adapter(), torch.no_grad():
                logits = trainer.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        else:
            trainer.model.set_adapter(active)
            logits = trainer.model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
        logps = logits[:, :-1].log_softmax(-1)
        rows = [
            sum(logps[i, t, ids[i, t + 1]] for t in range(logps.shape[1]) if mask[i, t + 1]) for i in range(len(ids))
        ]
        totals.append(rows)
    half = len(totals[0]) // 2
    ratios = [policy - reference for policy, reference in zip(*totals, strict=True)]
    return torch.stack([chosen - rejected for chosen, rejected in zip(ratios[:half], ratios[half:], strict=True)])


@pytest.mark.parametrize("fast", [0, 1])
def test_loss_and_gradients_are_the_formula(fast, tiny_path, tokenizer, tmp_path):
    trainer = ofs(tiny_path, tokenizer, tmp_path, ofs_alpha=0.4, beta=0.3)
    move(trainer)
    trainer._roles.fast = fast
    batch = first_batch(trainer)
    loss, found = loss_and_gradients(trainer, batch)
    metrics = recorded(trainer)

    expected, values = {}, {}
    detached = {name: margins_of(trainer, batch, name).detach() for name in ("default", "slow")}
    for name in ("default", "slow"):
        trainer.model.zero_grad()
        margins = margins_of(trainer, batch, name)
        other = detached["slow" if name == "default" else "default"]
        has_fast_role = (name == "slow") == bool(fast)
        gap = margins - other if has_fast_role else other - margins
        base = -torch.nn.functional.logsigmoid(0.3 * margins).mean()
        lead = -torch.nn.functional.logsigmoid(0.3 * gap).mean()
        (base + (0.4 if has_fast_role else -0.4) * lead).backward()
        values[name] = base.item()
        expected |= {n: p.grad for n, p in trainer.model.named_parameters() if f".{name}." in n}
    assert loss.item() == pytest.approx(values["default"] + values["slow"], rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for name, gradient in expected.items() if ".slow." in name)
    assert metrics["loss/pair"] == pytest.approx(values["default"], rel=1e-5)
    assert metrics["loss/slow_sigmoid"] == pytest.approx(values["slow"], rel=1e-5)
    gap = 0.3 * (detached["default"] - detached["slow"]).mean().item() * (-1) ** fast
    assert metrics["ofs/margin_gap"] == pytest.approx(gap, rel=1e-4)
    assert metrics["loss/ofs_chase"] == metrics["loss/ofs_chased"] > 0
    assert metrics["ofs/role"] == fast


def test_without_chase_it_is_two_runs_of_dpo(tiny_path, tokenizer, tmp_path):
    options = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4, "beta": 0.5}
    trainer = ofs(tiny_path, tokenizer, tmp_path, ofs_alpha=0.0, ofs_slow_lr_ratio=0.5, **options)
    alone = [
        ofs(tiny_path, tokenizer, tmp_path, PreferenceTrainer, **(options | {"learning_rate": rate}))
        for rate in (0.1, 0.05)
    ]
    assert all(torch.equal(p, adapter(alone[0], "default")[n]) for n, p in adapter(trainer, "slow").items())
    trainer.train()
    for name, other in zip(("default", "slow"), alone, strict=True):
        start = adapter(other, "default")
        other.train()
        end = adapter(other, "default")
        assert any((end[n] - p).abs().max() > 1e-3 for n, p in start.items())
        for n, p in adapter(trainer, name).items():
            torch.testing.assert_close(p, end[n], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [IrpoDPOTrainer, LnDPOTrainer, SemDPOTrainer, SrpoDPOTrainer])
def test_slow_module_is_trained_by_the_other_methods_loss(method, tiny_path, tokenizer, tmp_path):
    needed = {"sem_encoder": "characters"} if method is SemDPOTrainer else {}
    trainer = ofs(tiny_path, tokenizer, tmp_path, compose(OfsDPOTrainer, method), ofs_alpha=0.0, beta=0.5, **needed)
    move(trainer)
    with torch.no_grad():
        for fast, slow in zip(*trainer._module_parameters.values(), strict=True):
            slow.copy_(fast)
    passes = []
    reference = trainer.reference_model
    trainer.reference_model = lambda: passes.append(1) or reference()
    _, gradients = loss_and_gradients(trainer, first_batch(trainer))
    by_module = [
        {name.replace(f".{module}", ""): g for name, g in gradients.items() if f".{module}." in name}
        for module in ("default", "slow")
    ]
    assert by_module[0].keys() == by_module[1].keys()
    for name, gradient in by_module[0].items():
        torch.testing.assert_close(by_module[1][name], gradient)
    assert max(gradient.abs().max() for gradient in by_module[1].values()) > 1e-3
    alone = ofs(tiny_path, tokenizer, tmp_path, method, beta=0.5, **needed)
    counted, passes[:] = len(passes), []
    reference_alone = alone.reference_model
    alone.reference_model = lambda: passes.append(1) or reference_alone()
    loss_and_gradients(alone, first_batch(alone))
    assert counted == len(passes)


def test_chase_spreads_the_modules_and_logs_it(tiny_path, tokenizer, tmp_path):
    gaps = {}
    for alpha in (0.0, 1.0):
        trainer = ofs(
            tiny_path,
            tokenizer,
            tmp_path,
            ofs_alpha=alpha,
            beta=0.5,
            max_steps=12,
            learning_rate=0.2,
            optim="sgd",
            max_grad_norm=0.0,
        )
        trainer.train()
        rows = [row for row in history(trainer) if "ofs/margin_gap" in row]
        assert rows[0]["ofs/margin_gap"] == 0.0 and rows[-1]["ofs/margin_gap"] > 0.1
        assert all(row["ofs/grad_norm_default"] > 0 and row["ofs/grad_norm_slow"] > 0 for row in rows)
        gaps[alpha] = rows[-1]
    # Late in training, where base gradients fade, the chase keeps them up
    assert gaps[1.0]["ofs/grad_norm_slow"] > gaps[0.0]["ofs/grad_norm_slow"]
    assert gaps[1.0]["rewards/margins"] > gaps[0.0]["rewards/margins"]


def test_rates_stay_with_the_modules(tiny_path, tokenizer, tmp_path):
    trainer = ofs(tiny_path, tokenizer, tmp_path, ofs_slow_lr_ratio=0.25, lr_scheduler_type="linear", max_steps=4)
    trainer.train()
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    rates = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            rates.setdefault(".slow." in names[id(parameter)], set()).add(group["initial_lr"])
    assert rates == {False: {1e-3}, True: {0.25e-3}}
    trained = sum(p.requires_grad for p in trainer.model.parameters())
    assert trained == sum(len(group["params"]) for group in trainer.optimizer.param_groups)


@pytest.mark.parametrize("worse", ["default", "slow"])
def test_the_better_module_is_what_is_saved(worse, tiny_path, tokenizer, tmp_path):
    # Pairs that contradict each other, so that to move is to be worse, or pairs to learn
    chosen, rejected = ["2", "33333"] * 8, ["33333", "2"] * 8
    data = Dataset.from_dict({"prompt": ["1+1="] * 16, "chosen": chosen, "rejected": rejected})
    rate, data = (0.1, data) if worse == "default" else (1e-2, None)
    trainer = ofs(
        tiny_path, tokenizer, tmp_path, ofs_alpha=0.0, ofs_slow_lr_ratio=1e-3, learning_rate=rate, dataset=data,
        beta=1.0, max_steps=12,
        ofs_chasing_interval=3, save_strategy="steps", save_steps=12,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in history(trainer) if "ofs/role" in row]
    served = next(row["ofs/served_slow"] for row in history(trainer) if "ofs/served_slow" in row)
    assert rows[-1]["ofs/role"] == served == (worse == "default")
    assert rows[-1]["ofs/swaps"] >= served
    trainer.save_model(str(tmp_path / "model"))
    checkpoint, model = tmp_path / "checkpoint-12", tmp_path / "model"
    saved = {name: load_file(folder / "adapter_model.safetensors") for name, folder in {
        "default": checkpoint, "slow": checkpoint / "slow", "first": model, "second": model / "slow"
    }.items()}  # fmt: skip
    better, other = ("slow", "default") if worse == "default" else ("default", "slow")
    assert all(torch.equal(saved["first"][n], p) for n, p in saved[better].items())
    assert all(torch.equal(saved["second"][n], p) for n, p in saved[other].items())
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    loaded = PeftModel.from_pretrained(base, model).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    trainer.model.eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_checkpoint_without_a_whole_second_adapter_is_refused(damage, tiny_path, tokenizer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    ofs(tiny_path, tokenizer, tmp_path, **options).train()
    file = tmp_path / "checkpoint-2" / "slow" / "adapter_model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"`resume_from_checkpoint`: '.*checkpoint-2"):
        ofs(tiny_path, tokenizer, tmp_path, **options).train(str(tmp_path / "checkpoint-2"))


def test_goes_on_from_a_given_adapter(tiny_path, tokenizer, tmp_path):
    torch.manual_seed(0)
    given = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), LORA)
    with torch.no_grad():
        for name, parameter in given.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trainer = make_trainer(OfsDPOTrainer, tiny_path, tokenizer, tmp_path, model=given, ofs_chasing_interval=1)
    assert all(torch.equal(p, adapter(trainer, "default")[n]) for n, p in adapter(trainer, "slow").items())
    start = adapter(trainer, "ref")
    trainer.train()
    assert all(torch.equal(p, start[n]) for n, p in adapter(trainer, "ref").items())
    for name in ("default", "slow"):
        assert any(not torch.equal(p, start[n]) for n, p in adapter(trainer, name).items())
    rewards = [row["rewards/margins"] for row in history(trainer) if "rewards/margins" in row]
    assert rewards[0] == pytest.approx(0.0, abs=1e-5)


def test_other_methods_act_on_both_modules_and_log_them_apart(tiny_path, tokenizer, tmp_path):
    trainer = ofs(tiny_path, tokenizer, tmp_path, compose(LnDPOTrainer, OfsDPOTrainer), beta=0.5)
    move(trainer)
    batch = first_batch(trainer)
    loss_and_gradients(trainer, batch)
    metrics = recorded(trainer)
    assert metrics["length_norm/divisor"] == metrics["slow/length_norm/divisor"] > 1
    for name, key in (("default", "loss/pair"), ("slow", "loss/slow_sigmoid")):
        trainer.model.set_adapter(name)
        record = trainer.statistics(trainer.model, batch)
        chosen, rejected = (record.logratios / batch["completion_mask"].sum(1)).chunk(2)
        expected = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean().item()
        assert metrics[key] == pytest.approx(expected, rel=1e-4)


def test_evaluation_is_plain_dpo(tiny_path, tokenizer, tmp_path):
    trainer = ofs(tiny_path, tokenizer, tmp_path, eval_dataset=None)
    move(trainer)
    batch = first_batch(trainer)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    assert all(p.requires_grad for n, p in trainer.model.named_parameters() if ".slow." in n)
    margins = margins_of(trainer, batch, "default")
    assert loss.item() == pytest.approx(-torch.nn.functional.logsigmoid(0.1 * margins).mean().item(), rel=1e-5)


# --- What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ofs_alpha", -0.1),
        ("ofs_alpha", 1.5),
        ("ofs_slow_lr_ratio", 0.0),
        ("ofs_chasing_interval", 0),
        ("ofs_margin_clip", 0.0),
        ("gradient_checkpointing", True),
        ("ddp_find_unused_parameters", True),
        ("load_best_model_at_end", True),
    ],
)
def test_refuses_values(field, value, tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 500} if field == "load_best_model_at_end" else {}
    with pytest.raises(ValueError, match=f"`{field}` must be .*got {value!r}"):
        OfsDPOConfig(str(tmp_path), **{field: value}, **more, bf16=False, use_cpu=True)
    neutral = {"ofs_alpha": None, field: value}
    if value is True:
        OfsDPOConfig(str(tmp_path), **neutral, **more, bf16=False, use_cpu=True)


def test_refuses_models_without_lora(tiny_path, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"Pass `peft_config=LoraConfig\(...\)` \(`--use_peft`\)"):
        make_trainer(OfsDPOTrainer, tiny_path, tokenizer, tmp_path)
    ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"to be LoRA; the adapters are .*IA3Config"):
        make_trainer(OfsDPOTrainer, tiny_path, tokenizer, tmp_path, peft_config=ia3)
    given = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), LORA)
    given.add_adapter("slow", LORA)
    with pytest.raises(ValueError, match="named 'slow', but the model has one"):
        make_trainer(OfsDPOTrainer, tiny_path, tokenizer, tmp_path, model=given)
