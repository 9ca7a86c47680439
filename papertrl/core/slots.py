"""Slots: where components are carried by any trainer, ours or a bare one of TRL."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from .configuration import ComponentConfig
from .declaration import Method


@dataclass(frozen=True)
class Slot:
    """
    A place in a trainer that components fill.

    Args:
        name (`str`):
            Name in declarations.
        room (`str`):
            Package in which such components stand.
        does (`str`):
            What a component does there.
        single (`bool`):
            Whether one component at a time fills it; the others are ordered lists.
    """

    name: str
    room: str
    does: str
    single: bool = False


SLOTS = {
    slot.name: slot
    for slot in (
        Slot("data", "papertrl.data", "rows → rows, before tokenization"),
        Slot("prompts", "papertrl.samplers.prompts", "chooses the rows to train on next, and observes them", True),
        Slot("decoding", "papertrl.samplers.decoding", "changes the distribution that completions are sampled from"),
        Slot("reward", "papertrl.rewards", "adds reward functions"),
        Slot("model", "papertrl.adapters", "changes the model before it is wrapped"),
        Slot("optimizer", "papertrl.optimizers", "brings the optimizer", True),
        Slot("schedule", "papertrl.optimizers", "changes learning rates or other numbers as training goes on"),
        Slot("observer", "papertrl.callbacks", "watches"),
    )
}


class Component:
    """
    A method that any trainer carries in a slot, on top of its objective.

    A subclass sets `method` (its [`~papertrl.core.declaration.Method`], which names the slot) and `config_class`, and
    overrides the functions of its slot. What it does not override does nothing. A trainer of this library makes it
    from its own config, which has the component's fields, calls [`attach`] at the end of its constructor, and saves
    and restores [`state_dict`] with each checkpoint. In a bare TRL trainer it goes through the doors that TRL offers;
    the class says which.

    Args:
        config ([`ComponentConfig`], *optional*):
            Its own config, or any that has its fields. Defaults to the defaults.
        **settings:
            Fields of a config to make instead.

    Raises:
        `TypeError`: if both are given.
    """

    method: ClassVar[Method]
    config_class: ClassVar[type[ComponentConfig]]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        known = {f.name for f in fields(cls.config_class)} if is_dataclass(cls.config_class) else set()
        unknown = [name for name in cls.method.neutral if name not in known]
        if unknown:
            raise TypeError(
                f"The declaration of component '{cls.method.name}' has the neutral settings {unknown}, but "
                f"`{cls.config_class.__name__}` has no such field."
            )

    def __init__(self, config: Any = None, **settings: Any):
        if config is not None and settings:
            raise TypeError(f"`{type(self).__name__}` takes a config or settings, got both.")
        self.config = self.config_class(**settings) if config is None else config
        self.trainer: Any = None

    @property
    def on(self) -> bool:
        """Whether it does anything under its config: not at the neutral values of its declaration."""
        neutral = self.method.neutral
        return not neutral or any(getattr(self.config, name) != value for name, value in neutral.items())

    # --- For every slot -----------------------------------------------------------------------------------------

    def attach(self, trainer: Any) -> None:
        """Called once, when the trainer has its model, tokenizer, datasets and accelerator."""
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """State that is saved with a checkpoint, the same on every rank: plain values and tensors."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`] returned."""

    def log_metric(self, name: str, value: Any) -> None:
        """Record a value of metric `name`; in a bare TRL trainer, where its metrics are kept."""
        if hasattr(self.trainer, "log_metric"):
            self.trainer.log_metric(name, value)
        elif self.trainer is not None:
            self.trainer._metrics["train"][name].append(float(value))

    # --- data ---------------------------------------------------------------------------------------------------

    def rows(self, dataset: Any) -> Any:
        """Slot *data*: the training rows in place of `dataset`, before they are tokenized."""
        return dataset

    # --- prompts ------------------------------------------------------------------------------------------------

    def choose(self, count: int, round: int, generator: Any) -> list[int]:
        """
        Slot *prompts*: rows of the training dataset to use next.

        Called on every rank right before they are needed: in the policy family before a generation batch, in the
        online loop before a round, elsewhere before an optimizer step, so that what was observed of all earlier ones
        has arrived. All ranks must answer alike.

        Args:
            count (`int`):
                Number of rows, over all ranks.
            round (`int`):
                0, or the number of the round in which filtered groups are refilled (policy), or the iteration of the
                online loop.
            generator (`torch.Generator`):
                Keyed by seed and step: the same on every rank and after a resume.

        Returns:
            `list[int]` of length `count`.
        """
        raise NotImplementedError

    def observe(self, *finished: Any) -> None:
        """
        Slot *prompts*: what came of the chosen rows, the same on every rank.

        In the policy family `scored` and `record` of a generation batch. Elsewhere the chosen rows of a micro-batch,
        `list[int]`, and their losses `(rows,)`, before the next step's rows are chosen.
        """

    # --- prompts and decoding -----------------------------------------------------------------------------------

    def needs(self) -> frozenset[str]:
        """What [`see_rollouts`] needs of the pass over rollouts; see `old_pass_needs` of the policy family."""
        return frozenset()

    def see_rollouts(self, record: Any, scored: Any, old_pass: Any) -> None:
        """The pass over finished rollouts, where there is one, before advantages; policy family."""

    def prepared(self, record: Any) -> None:
        """Rollouts are selected and their advantages final, before the loss is computed; policy family."""

    # --- decoding -----------------------------------------------------------------------------------------------

    def logits_processors(self) -> list[Any]:
        """Slot *decoding*: what changes next-token logits of rollouts, before temperature and filters."""
        return []

    def sampled(self) -> None:
        """Slot *decoding*: the stage *roll out* is over, which used the processors that were given last, if any."""

    # --- reward -------------------------------------------------------------------------------------------------

    def reward_funcs(self) -> list[Any]:
        """Slot *reward*: reward functions that act beside the user's."""
        return []

    # --- model --------------------------------------------------------------------------------------------------

    def prepare(self, model: Any) -> Any:
        """Slot *model*: the model in place of `model`, before adapters and wrappers."""
        return model

    # --- optimizer ----------------------------------------------------------------------------------------------

    def optimizer_cls_and_kwargs(self, args: Any, model: Any) -> tuple[type, dict[str, Any]]:
        """Slot *optimizer*: class and keyword arguments, as TRL's argument of this name has them."""
        raise NotImplementedError

    # --- schedule -----------------------------------------------------------------------------------------------

    def after_backward(self) -> None:
        """Slot *schedule*, and others that watch: the gradient of one more micro-batch of this rank has been added."""

    def before_update(self, grad_norm: Any) -> None:
        """
        Slot *schedule*, and others that watch: the gradient is complete and clipped.

        Learning rates that are changed hold for this update: the scheduler sets them anew afterwards.
        """

    def computes_all_rows(self) -> bool:
        """Slot *schedule*: whether rows without effect on the loss must be computed all the same; policy family."""
        return False

    # --- observer -----------------------------------------------------------------------------------------------

    def callbacks(self) -> list[Any]:
        """Slot *observer*: `TrainerCallback`s; other slots may have some too."""
        return []


class Components(list[Component]):
    """Those components of one trainer that are on, in the order in which they were listed."""

    def of(self, *slots: str) -> list[Component]:
        """Those that fill one of `slots`."""
        return [component for component in self if component.method.slot in slots]

    def prompts(self) -> Component | None:
        """The one that chooses prompts, or `None`."""
        return next(iter(self.of("prompts")), None)

    def state_dict(self) -> dict[str, Any]:
        """State of all, by name."""
        return {component.method.name: component.state_dict() for component in self}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what [`state_dict`] returned; a component that was not there begins anew."""
        for component in self:
            if component.method.name in state:
                component.load_state_dict(state[component.method.name])


def refuse_shared_slots(components: Iterable[type[Component]], args: Any) -> None:
    """
    Check that no two components that are on fill a slot that holds one.

    Raises:
        `ValueError`: naming both, the slot, and what to do.
    """
    holders: dict[str, type[Component]] = {}
    for component in components:
        slot = component.method.slot
        if not SLOTS[slot].single or not component(args).on:
            continue
        first = holders.setdefault(slot, component)
        if first is not component:
            ways = " or ".join(
                ", ".join(f"{name}={value!r}" for name, value in c.method.neutral.items())
                for c in (first, component)
                if c.method.neutral
            )
            raise ValueError(
                f"Components '{first.method.name}' and '{component.method.name}' do not combine as they are: both "
                f"fill the slot '{slot}', which holds one. Leave one of them out{f', or set {ways}' if ways else ''}."
            )
