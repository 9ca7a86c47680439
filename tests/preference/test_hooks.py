"""The hooks beside the stages, and the services that say who decides and evaluate pairs once more."""

import pytest
import torch
from peft import LoraConfig

from papertrl import OfsDPOTrainer, RsoDPOTrainer, UpoDPOTrainer, XpoDPOTrainer, compose
from papertrl.losses.terms import LossTerm
from papertrl.trainers.preference.base import PreferenceConfig, PreferenceTrainer

from ..harness.pairs import first_batch, history, loss_and_gradients, make_trainer, pairs, recorded, weights

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


class Hooked(PreferenceTrainer):
    """Notes when it is called."""

    config_class = PreferenceConfig

    def __init__(self, *args, **kwargs):
        self.calls: list = []
        super().__init__(*args, **kwargs)

    def as_pairs(self, dataset):
        dataset = super().as_pairs(dataset)
        return dataset.rename_columns({"better": "chosen", "worse": "rejected"})

    def set_up_optimizer(self, optimizer):
        super().set_up_optimizer(optimizer)
        self.calls.append("optimizer")
        for group in optimizer.param_groups:
            group["lr"] *= 2

    def check_checkpoint(self, folder):
        super().check_checkpoint(folder)
        self.calls.append(folder.name)
        if not (folder / "note").exists():
            raise ValueError(f"no note in {folder.name}")

    def after_backward(self):
        super().after_backward()
        self.calls.append("backward")

    def after_training(self):
        super().after_training()
        self.calls.append("train_loss" in self.state.log_history[-1])


def test_hooks_are_called_when_they_say(tiny_path, tokenizer, tmp_path):
    def hooked():
        return make_trainer(
            Hooked,
            tiny_path,
            tokenizer,
            tmp_path,
            dataset=pairs().rename_columns({"chosen": "better", "rejected": "worse"}),
            gradient_accumulation_steps=2,
            max_steps=2,
            save_strategy="steps",
            save_steps=1,
            lr_scheduler_type="constant",
        )

    trainer = hooked()
    trainer.train()
    assert trainer.calls == ["optimizer", *["backward"] * 4, True]
    assert all(row["learning_rate"] == 2e-3 for row in history(trainer) if "learning_rate" in row)
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="no note in checkpoint-1"):
        hooked().train(str(checkpoint))
    (checkpoint / "note").touch()
    again = hooked()
    again.train(str(checkpoint))
    assert again.calls == ["checkpoint-1", "optimizer", "backward", "backward", True]
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in weights(again).items())


def test_who_decides_a_stage(tmp_path):
    def decides(cls, stage, **options):
        trainer = object.__new__(cls)
        trainer.args = cls.config_class(str(tmp_path), use_cpu=True, bf16=False, **options)
        return trainer.replaced_by(stage)

    assert decides(XpoDPOTrainer, "pair") is None
    assert decides(compose(XpoDPOTrainer, RsoDPOTrainer), "judge", online_num_samples=8) == "rso"
    both, options = compose(UpoDPOTrainer, RsoDPOTrainer), {"upo_mc_passes": 0, "online_num_samples": 8}
    assert decides(both, "pair", upo_pairing="none", **options) == "rso"
    assert decides(both, "pair", rso_pairing="none", **options) == "upo"
    assert decides(both, "judge", rso_pairing="none", **options) is None


class Twice(PreferenceTrainer):
    """Trains a second adapter on the same loss."""

    config_class = PreferenceConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model.add_adapter("second", LORA)
        for name, parameter in self.model.named_parameters():
            if ".second." in name:
                # Unlike the first one, which the same seed made
                parameter.data += 0.1
                parameter.requires_grad_(True)

    def scores(self, record):
        chosen, rejected = super().scores(record)
        self.log_metric("scored", chosen.sum())
        return chosen, rejected

    def extra_terms(self, model, record):
        second = self.pair_statistics(model, record, "second")
        assert second.inputs is record.inputs and torch.equal(second.ref_logps, record.ref_logps)
        assert not torch.equal(second.logps, record.logps) and len(second.margins) == len(record.margins)
        return [LossTerm(f"second_{term.name}", term.values) for term in second.pair_losses]


def test_pairs_once_more_under_another_adapter(tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(Twice, tiny_path, tokenizer, tmp_path, model=tiny_path, peft_config=LORA)
    passes = []
    reference = trainer.reference_model
    trainer.reference_model = lambda: passes.append(1) or reference()
    batch = first_batch(trainer)
    _, both = loss_and_gradients(trainer, batch)
    metrics = recorded(trainer)
    assert len(passes) == 1 and trainer.model.active_adapter == "default"
    assert {"scored", "second/scored", "loss/pair", "loss/second_sigmoid"} <= metrics.keys()
    assert metrics["scored"] != metrics["second/scored"]
    # Each adapter's gradient is that of the loss on it alone
    trainer.extra_terms = lambda model, record: []
    for name in ("default", "second"):
        trainer.model.set_adapter(name)
        _, alone = loss_and_gradients(trainer, batch)
        assert alone and all(f".{name}." in key for key in alone)
        for key, gradient in alone.items():
            torch.testing.assert_close(both[key], gradient, rtol=0, atol=0)


def test_both_adapters_stay_trainable(tiny_path, tokenizer, tmp_path):
    trainer = make_trainer(
        OfsDPOTrainer, tiny_path, tokenizer, tmp_path, model=tiny_path, peft_config=LORA, eval_dataset=pairs(1)
    )

    def trainable():
        return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}

    before = trainable()
    assert any(".default." in name for name in before) and any(".slow." in name for name in before)
    trainer.evaluate()
    assert trainable() == before
    with trainer.reference_model():
        pass
    with trainer.generation_model("reference"):
        pass
    assert trainable() == before
