"""The slot *prompts* in families that draw rows for each optimizer step."""

import pytest
import torch

from papertrl.core.catalogue import load
from papertrl.core.compose import compose
from papertrl.core.configuration import ComponentConfig, method_config, method_field
from papertrl.core.declaration import Method
from papertrl.core.family import FAMILIES
from papertrl.core.slots import Component
from papertrl.trainers.slots import HOOKS

from .harness.table import build, dataset, history, model_path, settings, weights

FAMILY = [name for name in FAMILIES if name != "policy"]


@method_config
class HardestConfig(ComponentConfig):
    """Configuration of [`Hardest`]."""

    hardest_explore: int = method_field(2, "Rows of every draw that are random.", ge=0)


class Hardest(Component):
    """Draws the rows of largest loss so far, those not seen yet first."""

    method = Method("hardest", kind="component", slot="prompts")
    config_class = HardestConfig

    def attach(self, trainer):
        super().attach(trainer)
        self.losses = torch.full((len(trainer.train_dataset),), torch.inf)
        self.drawn, self.seen = [], []

    def choose(self, count, round, generator):
        order = torch.argsort(self.losses, descending=True, stable=True)[: count - self.config.hardest_explore]
        random = torch.randint(len(self.losses), (count - len(order),), generator=generator)
        self.drawn.append([*order.tolist(), *random.tolist()])
        return self.drawn[-1]

    def observe(self, rows, losses):
        assert len(self.drawn) == self.trainer.state.global_step + 1
        self.losses[rows] = losses
        self.seen.append((rows, losses))

    def state_dict(self):
        return {"losses": self.losses, "drawn": self.drawn}

    def load_state_dict(self, state):
        self.losses, self.drawn = state["losses"], state["drawn"]


def make(family, request, folder, **values):
    trainer_class = compose(FAMILIES[family].plain, Hardest)
    args = trainer_class.config_class(**settings(family, folder, max_steps=4, **values))
    trainer = build(trainer_class, family, model_path(family, request), args)
    return trainer, trainer.slots.prompts()


@pytest.mark.parametrize("family", FAMILY)
def test_rows_are_chosen_right_before_each_step(family, request, tmp_path):
    trainer, chooser = make(family, request, tmp_path)
    trained = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *args, **kwargs: (
        trained.append(inputs["input_ids"]) or compute_loss(model, inputs, *args, **kwargs)
    )
    trainer.train()
    # Two micro-batches of four rows a step; what was observed of one step decides about the next
    assert len(chooser.drawn) == 4 and len(chooser.seen) == 8 == len(trained)
    assert [row for rows, _ in chooser.seen for row in rows] == [row for drawn in chooser.drawn for row in drawn]
    assert all(losses.isfinite().all() and len(losses) == 4 for _, losses in chooser.seen)
    # What was trained on are the chosen rows
    batch = trainer.data_collator(trainer.train_dataset.__getitems__(chooser.drawn[2][:4]))
    assert torch.equal(trained[4], batch["input_ids"])


def test_what_is_observed_is_the_loss_of_each_row(request, tmp_path):
    trainer, chooser = make("supervised", request, tmp_path, hardest_explore=0, learning_rate=0.0)
    trainer.train()
    model = trainer.model.eval()
    for rows, losses in chooser.seen[:2]:
        for row, loss in zip(rows, losses, strict=True):
            batch = trainer.data_collator([trainer.train_dataset[row]])
            with torch.no_grad():
                expected = type(model).forward(model, input_ids=batch["input_ids"]).logits[0, :-1].log_softmax(-1)
            labels = batch["labels"][0, 1:]
            known = labels != -100
            assert float(-expected[known, labels[known]].mean()) == pytest.approx(float(loss), rel=1e-4)


@pytest.mark.parametrize("family", FAMILY)
def test_a_resumed_run_chooses_as_one_that_was_not_stopped(family, request, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole, chooser = make(family, request, tmp_path, **saving)
    whole.train()
    again, resumed = make(family, request, tmp_path / "again", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.drawn == chooser.drawn
    for name, value in weights(again).items():
        assert torch.equal(value, weights(whole)[name])
    assert [e for e in history(again) if "loss" in e] == [e for e in history(whole) if "loss" in e]


def test_what_hides_rows_is_refused(request, tmp_path):
    trainer_class = compose("sft", Hardest)
    args = trainer_class.config_class(**settings("supervised", tmp_path), packing=True)
    with pytest.raises(ValueError, match="`packing` must be False with component 'hardest'"):
        build(trainer_class, "supervised", model_path("supervised", request), args)
    args = trainer_class.config_class(**settings("supervised", tmp_path))
    streamed = dataset("supervised").to_iterable_dataset()
    with pytest.raises(ValueError, match="'hardest' chooses rows and needs a map-style `train_dataset`"):
        build(trainer_class, "supervised", model_path("supervised", request), args, data=streamed)


def even(completions, **kwargs):
    return [float(len(text) % 2 == 0) for text in completions]


class Evenness(Component):
    """Adds a reward for texts of even length."""

    method = Method("evenness", kind="component", slot="reward")
    config_class = HardestConfig

    def reward_funcs(self):
        return [even]


def test_a_reward_joins_those_of_the_online_loop(request, tmp_path):
    trainer_class = compose("dpo", Evenness)
    values = {"online_iterations": 1, "online_max_new_tokens": 4, "max_steps": 2}
    args = trainer_class.config_class(**settings("preference", tmp_path, **values))
    trainer = build(trainer_class, "preference", model_path("preference", request), args)
    assert trainer.scorer.names == ["digit_parity", "even"]
    trainer.train()


def test_a_reward_is_refused_where_nothing_is_judged(request, tmp_path):
    trainer_class = compose("sft", Evenness)
    args = trainer_class.config_class(**settings("supervised", tmp_path))
    with pytest.raises(ValueError, match="'evenness' adds a reward, but the family supervised samples nothing"):
        build(trainer_class, "supervised", model_path("supervised", request), args)


def test_a_component_of_another_family_is_refused():
    with pytest.raises(TypeError, match=r"Components \['gain_rl'\] do not serve the family preference"):
        compose("dpo", "gain_rl")


def test_hooks_that_a_function_could_hide_are_there():
    functions = {
        name for family in FAMILIES.values() for names in load(family.plain).stages.values() for name in names
    }
    assert functions >= HOOKS.keys() and all(hasattr(Component, hook) for hook in HOOKS.values())
