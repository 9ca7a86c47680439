"""Trainers made of several methods: objectives by inheritance, components in their slots."""

from .catalogue import PLAIN, find_trained, load
from .family import FAMILIES
from .slots import Component


def compose(*parts: type | str, name: str | None = None) -> type:
    """
    Trainer class that combines methods: objectives of one family, and components.

    The order in which stages run is fixed by the family's base. Within a stage, those that extend it act in the order
    given here, around the one that replaces it. Where configs set different defaults for one field, that of the
    config whose name comes first in the alphabet holds, whatever the order.

    Args:
        parts (trainer classes, [`~papertrl.core.slots.Component`] classes, or short names of either):
            At least one objective, or the trainer without a method (`"grpo"`, `"dpo"`, `"sft"`, `"reward"`).
        name (`str`, *optional*):
            Name of the class. Defaults to the methods' names run together.

    Raises:
        `TypeError`: if there is no trainer among them, they are of different families, one is listed twice, or a
            trainer without a method stands beside one with a method.
        `ValueError`: if there is no method of a name, or it is a study.

    Example:

    ```python
    >>> from papertrl import DlerGRPOTrainer, LpRegGRPOTrainer, compose
    >>> compose(LpRegGRPOTrainer, DlerGRPOTrainer).__name__
    'LpRegDlerGRPOTrainer'
    >>> compose("lp_reg", "gain_rl").__name__
    'LpRegGainRlGRPOTrainer'
    ```
    """
    loaded = [load(find_trained(part)) if isinstance(part, str) else part for part in parts]
    components = [part for part in loaded if isinstance(part, type) and issubclass(part, Component)]
    trainers = [part for part in loaded if part not in components]
    odd = [part for part in trainers if not hasattr(part, "family")]
    if odd:
        raise TypeError(f"`compose` takes trainers and components of this library, or names of methods; got {odd}.")
    if len(set(loaded)) != len(loaded):
        raise TypeError(f"`compose`: a method is listed twice in {[part.__name__ for part in loaded]}.")
    if not trainers:
        trainers = _bases_of(components)
    bases = [t.__name__ for t in trainers if not t.methods]
    if bases and len(trainers) > 1:
        raise TypeError(f"`compose`: {bases} have no method; leave them out, every other trainer builds on its base.")
    families = {t.__name__: t.family.name for t in trainers}
    if len(set(families.values())) > 1:
        raise TypeError(f"`compose`: methods of different families do not combine, got {families}.")
    if len(loaded) == 1 and not components:
        return trainers[0]
    suffix = trainers[0].family.suffix + "Trainer"
    if name is None:
        stems = [t.__name__.removesuffix(suffix) for t in loaded if t in trainers and t.methods]
        name = "".join([*stems, *(c.__name__ for c in components)]) + suffix
    doc = f"Combination of {', '.join(part.__name__ for part in loaded)}."
    body = {"__module__": __name__, "__doc__": doc, "components": tuple(components)}
    held = [method.name for trainer in trainers for method in trainer.methods]
    repeated = [name for name in dict.fromkeys(held) if held.count(name) > 1]
    try:
        return type(name, tuple(_without_parts(trainers)), body)
    except TypeError as error:
        if repeated and "MRO" in str(error):
            raise TypeError(
                f"`compose`: {repeated} are parts of several of {[t.__name__ for t in trainers]}, which list them in "
                "different orders. Name each method once."
            ) from error
        raise


def _without_parts(trainers: list[type]) -> list[type]:
    """Trainers without those that others are made of, which bring them along."""
    return [t for t in trainers if not any(other is not t and issubclass(other, t) for other in trainers)]


def _bases_of(components: list[type[Component]]) -> list[type]:
    if not components:
        raise TypeError("`compose` needs at least one trainer.")
    families = {component.method.family for component in components} - {None}
    if len(families) != 1:
        raise TypeError(
            f"`compose`: {[c.__name__ for c in components]} are components, which a trainer carries: name one beside "
            f"them, without a method {', '.join(PLAIN)}."
        )
    return [load(FAMILIES[families.pop()].plain)]
