import torch
from transformers import AutoModelForCausalLM, TrainerState
from trl import SFTConfig, SFTTrainer

from papertrl import UpdateSparsity, compose

from ..harness.table import build, dataset, logged, model_path, settings, weights


def share(before, after, tolerance):
    """Changed weights, counted one by one."""
    pairs = [(a, b) for name in before for a, b in zip(before[name].flatten(), after[name].flatten(), strict=True)]
    return sum(abs(float(a) - float(b)) > tolerance for a, b in pairs) / len(pairs)


def test_the_share_is_that_of_weights_beyond_the_tolerance(request, tmp_path):
    trainer_class = compose("dpo", UpdateSparsity)
    values = {"update_sparsity_every": 3, "update_sparsity_tolerance": 2e-3}
    args = trainer_class.config_class(**settings("preference", tmp_path), **values)
    trainer = build(trainer_class, "preference", model_path("preference", request), args)
    before = weights(trainer)
    trainer.train()
    (seen,) = logged(trainer, "update_sparsity/changed_share")
    assert 0 < seen < 1 and abs(seen - share(before, weights(trainer), 2e-3)) < 1e-9


def test_a_resumed_run_compares_with_the_same_start(request, tmp_path):
    trainer_class = compose("sft", UpdateSparsity)
    values = {"update_sparsity_every": 1, "update_sparsity_tolerance": 2e-3, "max_steps": 4}
    values |= {"save_strategy": "steps", "save_steps": 2}
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        args = trainer_class.config_class(**settings("supervised", tmp_path, **values))
        trainer = build(trainer_class, "supervised", model_path("supervised", request), args)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(logged(trainer, "update_sparsity/changed_share"))
    assert found[0] == found[1] and len(found[0]) == 4


def test_a_bare_trl_trainer_takes_the_callback(tiny_path, tmp_path):
    args = SFTConfig(**settings("supervised", tmp_path))
    component = UpdateSparsity(update_sparsity_every=1, update_sparsity_tolerance=1e-4)
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = SFTTrainer(model, args, train_dataset=dataset("supervised"), callbacks=component.callbacks())
    trainer.train()
    seen = logged(trainer, "update_sparsity/changed_share")
    assert len(seen) >= 3 and abs(seen[-1] - share(before, weights(trainer), 1e-4)) < 1e-9


def test_frozen_weights_do_not_count(tiny_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    component = UpdateSparsity()
    component.callbacks()[0].on_train_begin(None, TrainerState(max_steps=50), None, model=model)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
    assert component.look(model) == {"update_sparsity/changed_share": 0.0}
