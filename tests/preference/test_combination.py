"""The family's methods together, and with what TRL works with."""

import itertools
from importlib.resources import files

import pytest
import torch
import yaml
from datasets import IterableDataset
from peft import LoraConfig
from trl import DPOConfig

from papertrl import HypoDPOTrainer, LnDPOTrainer, PreferenceTrainer, RpoDPOTrainer, compose

from ..harness.pairs import (
    assert_same_tensors,
    first_batch,
    history,
    loss_and_gradients,
    make_trainer,
    pairs,
    recorded,
    weights,
)

METHODS = {"ln_dpo": LnDPOTrainer, "rpo": RpoDPOTrainer, "hypo": HypoDPOTrainer}
# Strong enough to see in a step or two
ACTING = {
    "ln_dpo": {},
    "rpo": {"rpo_eta": 1.0},
    "hypo": {"hypo_kl_coef": 0.1, "hypo_kl_max_new_tokens": 4},
}
COMBINATIONS = [(a,) for a in METHODS] + list(itertools.permutations(METHODS, 2)) + [tuple(METHODS)]


def make(names, tiny_path, tokenizer, tmp_path, **options):
    cls = compose(*(METHODS[name] for name in names))
    for name in names:
        options = {**ACTING[name], **options}
    return make_trainer(cls, tiny_path, tokenizer, tmp_path, **options)


@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_every_combination_trains_and_every_mechanism_acts(names, tiny_path, tokenizer, tmp_path):
    trainer = make(names, tiny_path, tokenizer, tmp_path, check_records=True)
    trainer.train()
    rows = [row for row in history(trainer) if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert torch.tensor(row["loss"]).isfinite()
        assert torch.tensor(row["grad_norm"]) > 0
        assert all(row[METHODS[name].method.signal] > 0 for name in names)
    # Where the defaults differ, the first by name decides
    assert trainer.args.beta == METHODS[sorted(names)[0]].config_class("x", bf16=False, use_cpu=True).beta


def test_order_of_methods_does_not_matter(tiny_path, tokenizer, tmp_path):
    results = []
    for names in itertools.permutations(METHODS):
        trainer = make(names, tiny_path, tokenizer, tmp_path, beta=0.5)
        batch = first_batch(trainer)
        results.append((*loss_and_gradients(trainer, batch), recorded(trainer)))
    for loss, gradients, metrics in results[1:]:
        torch.testing.assert_close((loss, gradients), results[0][:2])
        assert metrics == pytest.approx(results[0][2], rel=1e-4)


def test_loss_of_a_combination_is_the_sum_of_its_parts(tiny_path, tokenizer, tmp_path):
    options = {"beta": 0.5, "rpo_eta": 0.4, "hypo_kl_coef": 0.2, "hypo_kl_max_new_tokens": 4}
    trainer = make(tuple(METHODS), tiny_path, tokenizer, tmp_path, **options)
    loss, _ = loss_and_gradients(trainer, first_batch(trainer))
    metrics = recorded(trainer)
    parts = metrics["loss/pair"] + 0.5 * 0.4 * metrics["loss/rpo_nll"] + 0.2 * metrics["loss/online_kl"]
    assert loss.item() == pytest.approx(parts, rel=1e-5)
    normalized = make(("ln_dpo",), tiny_path, tokenizer, tmp_path, beta=0.5)
    pair_loss, _ = loss_and_gradients(normalized, first_batch(normalized))
    assert metrics["loss/pair"] == pytest.approx(pair_loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_gradient_accumulation_is_the_mean_over_micro_batches(name, tiny_path, tokenizer, tmp_path):
    trainer = make((name,), tiny_path, tokenizer, tmp_path, per_device_train_batch_size=2, max_steps=1)
    batches = list(itertools.islice(trainer.get_train_dataloader(), 2))
    expected = [loss_and_gradients(trainer, trainer._prepare_inputs(batch))[1] for batch in batches]
    accumulated = make(
        (name,),
        tiny_path,
        tokenizer,
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    before = weights(accumulated)
    accumulated.train()
    after = weights(accumulated)
    found = {n: before[n] - after[n] for n in before}
    torch.testing.assert_close(found, {n: (expected[0][n] + expected[1][n]) / 2 for n in found}, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_lora_trains_the_adapter_alone(name, tiny_path, tokenizer, tmp_path):
    trainer = make((name,), tiny_path, tokenizer, tmp_path, peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed
    assert all("lora_" in n for n in changed)
    assert history(trainer)[0][METHODS[name].method.signal] > 0


@pytest.mark.parametrize("name", METHODS)
def test_bf16_checkpointing_and_evaluation(name, tiny_path, tokenizer, tmp_path):
    trainer = make(
        (name,),
        tiny_path,
        tokenizer,
        tmp_path,
        bf16=True,
        gradient_checkpointing=True,
        eval_dataset=pairs(1),
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    rows = history(trainer)
    assert all(torch.tensor(row["loss"]).isfinite() for row in rows if "loss" in row)
    assert sum("eval_loss" in row for row in rows) == 2
    assert trainer.model.is_gradient_checkpointing


@pytest.mark.parametrize("name", METHODS)
def test_streams_and_trl_s_own_config(name, tiny_path, tokenizer, tmp_path):
    stream = IterableDataset.from_generator(lambda: iter(pairs(4)))
    trainer = make_trainer(METHODS[name], tiny_path, tokenizer, tmp_path, dataset=stream, config_class=DPOConfig)
    trainer.train()
    assert trainer.state.global_step == 2
    assert type(trainer.args) is METHODS[name].config_class
    assert trainer.args.beta == 0.1
    assert history(trainer)[0][METHODS[name].method.signal] > 0


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize("names", [(), ("ln_dpo",), ("rpo",), ("hypo",), tuple(METHODS)], ids="+".join)
def test_resumed_run_equals_uninterrupted_run(names, logging_steps, tiny_path, tokenizer, tmp_path):
    cls = compose(*(METHODS[name] for name in names)) if names else PreferenceTrainer
    acting = {k: v for name in names for k, v in ACTING[name].items()}
    options = {
        **acting,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": logging_steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    whole = make_trainer(cls, tiny_path, tokenizer, tmp_path / "whole", **options)
    whole.train()
    torch.manual_seed(123)
    resumed = make_trainer(cls, tiny_path, tokenizer, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert_same_tensors(weights(whole), weights(resumed))
    # The log at step 3 spans the checkpoint: `Trainer` itself forgets the running loss, not the metrics
    forgotten = {"train_loss", "total_flos"} | ({"loss"} if logging_steps == 3 else set())
    whole_rows, resumed_rows = (
        [{k: v for k, v in row.items() if k not in forgotten} for row in history(t)] for t in (whole, resumed)
    )
    assert resumed_rows == whole_rows
    assert resumed_rows[0]["num_tokens"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_recipe_holds_fields_of_the_config(name, tmp_path):
    recipe = yaml.safe_load((files("papertrl.recipes") / f"{name}.yaml").read_text())
    assert recipe.pop("method") == name
    config = METHODS[name].config_class(str(tmp_path), use_cpu=True, **recipe)
    assert all(getattr(config, key) == value for key, value in recipe.items() if key != "report_to")
