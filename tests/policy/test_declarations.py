"""What the policy methods declare of the stages that they change."""

from types import SimpleNamespace

import pytest

from papertrl.core.catalogue import DECLARATIONS, load
from papertrl.core.configuration import field_default
from papertrl.core.stages import is_off

OBJECTIVES = [name for name, m in DECLARATIONS.items() if m.kind == "objective" and m.family == "policy"]
# Replaced so that nobody else does, without a function of their own
LEFT_TO_THE_BASE = {
    ("constrained_rlhf", "combine_rewards"),
    ("dynamic_reward_weighting", "combine_rewards"),
    ("disco", "spread"),
    ("disco", "trust_region"),
}


def declared(name):
    return vars(load(name)).get("extends", {}) | vars(load(name)).get("replaces", {})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_stage_is_off_under_the_neutral_settings(name):
    fields = load(name).config_class.__dataclass_fields__
    args = SimpleNamespace(**{field: field_default(f) for field, f in fields.items()} | DECLARATIONS[name].neutral)
    assert [stage for stage, off in declared(name).items() if not is_off(off, args)] == []


@pytest.mark.parametrize("name", OBJECTIVES)
def test_stages_that_are_declared_are_overridden(name):
    trainer = load(name)
    idle = {(name, stage) for stage in declared(name) if not vars(trainer).keys() & set(trainer.stages[stage])}
    assert idle == {place for place in LEFT_TO_THE_BASE if place[0] == name}
    assert all(stage in trainer.replaces for _, stage in idle)
