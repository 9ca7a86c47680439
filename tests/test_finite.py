"""NaN and infinite numbers stop a training of any family before they reach weights or files."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from papertrl.core.catalogue import load
from papertrl.core.errors import NotFiniteError
from papertrl.core.family import FAMILIES

from .harness.table import build, logged, model_path, settings, weights


def make(family, request, output_dir, trainer_class=None, **values):
    trainer_class = trainer_class or load(FAMILIES[family].plain)
    run = settings(family, output_dir, save_strategy="steps", save_steps=1, **values)
    return build(trainer_class, family, model_path(family, request), trainer_class.config_class(**run))


def at_step(step: int, value: float, trainer) -> float:
    """Factor that breaks what it multiplies in one micro-batch of an optimizer step, counted from 1."""
    return value if trainer.state.global_step + 1 == step else 1.0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("part", "value"), [("loss", math.nan), ("gradient", math.inf)])
def test_a_broken_update_is_not_made(family, part, value, request, tmp_path):
    class Broken(load(FAMILIES[family].plain)):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * at_step(2, value, self) if part == "loss" else loss

    trainer = make(family, request, tmp_path / "broken", Broken)
    if part == "gradient":
        last = list(trainer.model.parameters())[-1]
        last.register_hook(lambda gradient: gradient * at_step(2, value, trainer))
    with pytest.raises(NotFiniteError, match=f"The {part}.* of step 2 is not finite.*`learning_rate` is 0.001"):
        trainer.train()
    assert {path.name for path in (tmp_path / "broken").glob("checkpoint-*")} == {"checkpoint-1"}
    saved = load_file(tmp_path / "broken" / "checkpoint-1" / "model.safetensors")
    for name, weight in weights(trainer).items():
        if name in saved:
            assert weight.isfinite().all() and torch.equal(weight, saved[name])
    assert len(logged(trainer, "loss")) == 1


def test_a_gradient_scaler_may_skip_updates(request, tmp_path, monkeypatch):
    monkeypatch.setattr("papertrl.trainers.finite._MOST_SKIPPED", 2)
    trainer = make("preference", request, tmp_path)
    trainer.training_step = lambda *_: None
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")

    def update(norm, loss=1.0):
        trainer._loss_is_broken = ~torch.tensor(loss).isfinite()
        return trainer._get_grad_norm(trainer.model, torch.tensor(norm))

    for norm in (math.inf, 1.0, math.inf):
        update(norm)
    with pytest.raises(NotFiniteError, match=r"gradient \(norm nan\)"):
        update(math.nan)
    # It scales gradients, and cannot mend a loss
    with pytest.raises(NotFiniteError, match="The loss"):
        update(1.0, loss=math.nan)


@pytest.mark.parametrize(("family", "value"), [("supervised", math.nan), ("policy", -math.inf)])
def test_broken_weights_are_neither_trained_nor_saved(family, value, request, tmp_path):
    trainer = make(family, request, tmp_path)
    name, weight = next(iter(trainer.model.named_parameters()))
    weight.data.view(-1)[7] = value
    trainer.hub_model_id = "somebody/model"
    checkpoint = partial(trainer._save_checkpoint, trainer.model, None)
    for act in (trainer.train, trainer.save_model, checkpoint, trainer.push_to_hub):
        with pytest.raises(NotFiniteError, match=f"among them `{name}`"):
            act()
    assert not list(Path(tmp_path).rglob("*.safetensors"))
