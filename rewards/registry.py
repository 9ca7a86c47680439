"""Reward functions by name: ours, TRL's, or a dotted path to anyone's."""

import difflib
import importlib
import os
from collections.abc import Callable

from ..core.parsing import find_modules_here
from .length_shaping import boxed_format, cosine_length, relative_length
from .matching import boxed_match, exact_match, last_number_match

OURS: dict[str, Callable] = {
    "exact_match": exact_match,
    "last_number_match": last_number_match,
    "boxed_match": boxed_match,
    "boxed_format": boxed_format,
}
# Rewards on the length of what another reward says is right: `cosine_length:exact_match`
ON_LENGTH = ("cosine_length", "relative_length")
FROM_TRL = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def load_reward(name: str, max_completion_length: int) -> Callable:
    """
    Reward function of the given name.

    Args:
        name (`str`):
            A name of this library, one of TRL's, or a dotted path `package.module.function`; modules of the working
            directory are found. `cosine_length` and `relative_length` take the reward that says which completions are
            right after a colon (default `boxed_match`).
        max_completion_length (`int`):
            Length in tokens from which `get_soft_overlong_punishment` punishes in full; it starts at four fifths of
            it. Also that from which `cosine_length` stays the same.

    Raises:
        `ValueError`: if there is no such function; the message lists what exists.
    """
    if name in OURS:
        return OURS[name]
    if name in FROM_TRL:
        from trl import rewards

        function = getattr(rewards, name)
        if name == "get_soft_overlong_punishment":
            function = function(max_completion_length, max(1, max_completion_length // 5))
        return function
    shape, _, verifier = name.partition(":")
    if shape in ON_LENGTH:
        correct = load_reward(verifier, max_completion_length) if verifier else boxed_match
        if shape == "cosine_length":
            return cosine_length(correct, max_completion_length, "tokens")
        return relative_length(correct, "tokens")
    if "." not in name:
        known = [*OURS, *ON_LENGTH, *FROM_TRL]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean '{near[0]}'? " if near else ""
        raise ValueError(
            f"`--reward_funcs`: unknown reward '{name}'. {hint}Rewards are: {', '.join(known)}, or a dotted path "
            "`package.module.function`."
        )
    return _import(name)


def load_judge(name: str, trust_remote_code: bool = False) -> Callable:
    """
    Pairwise judge of the given name.

    Args:
        name (`str`):
            Folder or Hub id of a language model, for a [`~papertrl.rewards.pairwise.PairwiseModel`], or a dotted path
            `package.module.function`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code of the model's repository may run.

    Raises:
        `ValueError`: if there is no such function.
    """
    from .pairwise import PairwiseModel

    if os.path.isdir(name) or "/" in name:
        return PairwiseModel(name, trust_remote_code=trust_remote_code)
    if "." not in name:
        raise ValueError(
            f"`--judge`: there is no folder '{name}', and it is neither a Hub id nor a dotted path `module.function`."
        )
    return _import(name, "--judge")


def _import(path: str, flag: str = "--reward_funcs") -> Callable:
    module_name, function_name = path.rsplit(".", 1)
    find_modules_here()
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"`{flag}`: '{path}' cannot be imported ({error}). Give `package.module.function`, importable "
            f"from '{os.getcwd()}' or from an installed package."
        ) from error
    if not callable(function):
        raise ValueError(f"`{flag}`: '{path}' is a {type(function).__name__}, not a function.")
    if isinstance(function, type):
        raise ValueError(f"`{flag}`: '{path}' is a class. Make an instance in the module, and give its name.")
    return function
