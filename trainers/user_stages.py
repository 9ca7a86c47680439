"""A plain function in a stage: for those who just want to change the advantages."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Parameters that a function may have beside those of its stage
DEFAULT, TRAINER = "default", "trainer"


@dataclass(frozen=True)
class UserStage:
    """
    A user's function that acts in a stage.

    Args:
        stage (`str`):
            Function of the trainer in whose place, or after which, it runs.
        function (`Callable`):
            Takes, by name, any of the stage's arguments, `trainer`, and `default`: what all others in the stage came
            to. With `default` it acts on top of them, without it in place of the base.
        name (`str`):
            How the model card names it.
    """

    stage: str
    function: Callable
    name: str

    @property
    def extends(self) -> bool:
        """Whether it acts on what the others came to."""
        return DEFAULT in inspect.signature(self.function).parameters

    def __call__(self, trainer: Any, given: Mapping[str, Any], default: Any = None) -> Any:
        """
        Run it.

        Raises:
            `ValueError`: if the result is not of the shape that the stage gives.
        """
        values = {**given, TRAINER: trainer, DEFAULT: default}
        parameters = inspect.signature(self.function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            taken = {**given, **{name: values[name] for name in (TRAINER, DEFAULT) if name in parameters}}
        else:
            taken = {name: values[name] for name in parameters if name in values}
        result = self.function(**taken)
        expected = _expected_shape(self.stage, given, default)
        found = tuple(getattr(result, "shape", ()))
        per_row = self.stage == "objective" and expected is not None and found == (expected[0], 1)
        if expected is not None and found != expected and not per_row:
            raise ValueError(
                f"The function '{self.name}' of the stage '{self.stage}' must return a tensor of shape {expected}, "
                f"got {type(result).__name__} of shape {found}."
            )
        return result


def _expected_shape(stage: str, given: Mapping[str, Any], default: Any) -> tuple[int, ...] | None:
    """Shape that a stage's result has, where its arguments or the others' result tell."""
    if isinstance(default, torch.Tensor):
        return tuple(default.shape)
    for name in _SHAPED_LIKE.get(stage, ()):
        value = given
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if isinstance(value, torch.Tensor):
            return tuple(value.shape)
    return None


# Where to read the shape of a result, by stage; the first that is there
_SHAPED_LIKE = {
    "score": ("scored.rewards",),
    "combine_rewards": ("scored.group_ids",),
    "baseline": ("rewards",),
    "scale": ("rewards",),
    "advantages": ("scored.group_ids",),
    "objective": ("stats.logps",),
    "divergence": ("stats.logps",),
    "margin": ("chosen_scores",),
    "smoothing": ("record.margins",),
    "token_loss": ("record.log_probs",),
    "token_weights": ("record.log_probs",),
}


def load_function(path: str) -> Callable:
    """
    The function that a dotted path names.

    Raises:
        `ValueError`: if there is none.
    """
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"`stage`: there is no function '{path}' ({error}). Give `module.function`.") from error
    if not callable(function):
        raise ValueError(f"`stage`: '{path}' is no function, but a {type(function).__name__}.")
    return function


def _check_stage(trainer_class: type, stage: str) -> None:
    functions = [function for names in trainer_class.stages.values() for function in names]
    known = [name for name in functions if not inspect.ismethod(getattr(trainer_class, name))]
    if stage in known:
        return
    if stage in functions:
        why = "is asked of the class, before there is a trainer: write a subclass instead"
    elif stage in trainer_class.stages:
        why = f"consists of several functions: name one of {trainer_class.stages[stage]}"
    else:
        why = f"{trainer_class.__name__} does not have; it has {known}"
    raise ValueError(f"`stages` names '{stage}', which {why}.")


def check_user_stages(
    trainer_class: type, args: Any, stages: Mapping[str, Callable | str] | None
) -> dict[str, UserStage]:
    """
    Check a user's functions against the stages of a trainer.

    Args:
        trainer_class (`type`):
            Trainer of this library.
        args (config):
            Config of the trainer.
        stages (`dict[str, Callable]`, *optional*):
            Functions, or dotted paths of functions, by the stage's function.

    Raises:
        `ValueError`: naming the stage and those there are, the parameter and those that the stage has, or the method
            that decides the stage as well.
        `TypeError`: if something given is no function.
    """
    checked = {}
    stages = {} if stages is None else stages
    if not isinstance(stages, Mapping):
        raise TypeError(f"`stages` must map stages to functions, got `{type(stages).__name__}`.")
    for stage, given in stages.items():
        _check_stage(trainer_class, stage)
        function = load_function(given) if isinstance(given, str) else given
        if not callable(function) or inspect.isclass(function):
            raise TypeError(f"`stages['{stage}']` must be a function, got `{type(function).__name__}`.")
        inner = getattr(function, "func", function)
        name = given if isinstance(given, str) else f"{inner.__module__}.{getattr(inner, '__qualname__', stage)}"
        accepted = [*list(inspect.signature(getattr(trainer_class, stage)).parameters)[1:], DEFAULT, TRAINER]
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError as error:
            raise ValueError(f"`stages['{stage}']`: the parameters of '{name}' cannot be read. Wrap it.") from error
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        unknown = [
            p.name
            for p in parameters
            if p.kind not in several and p.default is p.empty and not (p.kind in by_name and p.name in accepted)
        ]
        if unknown:
            raise ValueError(
                f"`stages['{stage}']`: '{name}' has the parameters {unknown}, but the stage has {accepted[:-2]}, and "
                f"`{DEFAULT}` (what the others in the stage came to) and `{TRAINER}`; take any of these, by name."
            )
        checked[stage] = UserStage(stage, function, name)
        deciding = [] if checked[stage].extends else trainer_class.deciding(trainer_class.stage_of(stage), args)
        if deciding:
            raise ValueError(
                f"`stages['{stage}']`: '{deciding[0].method.name}' replaces the stage '{stage}', which '{name}' would "
                f"do as well. Take a parameter `{DEFAULT}`, to act on what the method came to, or leave one of them "
                "out."
            )
    return checked
