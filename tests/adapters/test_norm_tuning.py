import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from papertrl import NormTuning, compose

from ..harness.table import LORA, build, dataset, model_path, settings, weights


@pytest.mark.parametrize("family", ["grpo", "dpo", "sft"])
def test_only_norms_move(family, request, tmp_path):
    trainer_class = compose(family, NormTuning)
    args = trainer_class.config_class(**settings(trainer_class.family, tmp_path))
    trainer = build(trainer_class, trainer_class.family, model_path(trainer_class.family, request), args)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and changed <= {name for name in before if "norm" in name}


def test_a_model_that_is_made_already_is_taken(tiny_path, tmp_path):
    trainer_class = compose("sft", NormTuning)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    args = trainer_class.config_class(**settings("supervised", tmp_path), norm_tuning_pattern="embed_tokens")
    trainer = trainer_class(model, args, train_dataset=dataset("supervised"))
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == {"model.embed_tokens.weight"}


def test_a_bare_trl_trainer_takes_the_model(tiny_path, tmp_path):
    model = NormTuning().prepare(AutoModelForCausalLM.from_pretrained(tiny_path))
    args = SFTConfig(**settings("supervised", tmp_path))
    trainer = SFTTrainer(model, args, train_dataset=dataset("supervised"))
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert changed and all("norm" in name for name in changed)


def test_refusals(tiny_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    with pytest.raises(ValueError, match="`norm_tuning_pattern` must match the name of a parameter, got 'nothing'"):
        NormTuning(norm_tuning_pattern="nothing").prepare(model)
    trainer_class = compose("sft", NormTuning)
    args = trainer_class.config_class(**settings("supervised", tmp_path))
    with pytest.raises(ValueError, match="`peft_config` must be None with 'norm_tuning'"):
        trainer_class(tiny_path, args, train_dataset=dataset("supervised"), peft_config=LORA)
