"""A TRL upgrade fails here, loudly and in one place, before anything trains differently than it says."""

import hashlib
import importlib
import inspect

import pytest

from papertrl.trainers.policy import trl as policy
from papertrl.trainers.preference import trl as preference
from papertrl.trainers.reward import base as reward
from papertrl.trainers.supervised import base as supervised

BASES = {"policy": policy, "preference": preference, "supervised": supervised, "reward": reward}
PINNED = [(family, name) for family, base in BASES.items() for name in base.PINNED]


def resolve(name: str):
    """The object of a dotted name, whatever part of it is module."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name} is gone")


def digest(name: str) -> str:
    """First half of the SHA-256 of the source, which includes the signature."""
    return hashlib.sha256(inspect.getsource(resolve(name)).encode()).hexdigest()[:32]


@pytest.mark.parametrize(("family", "name"), PINNED, ids=lambda value: value)
def test_trl_is_what_the_bases_were_written_for(family, name):
    assert digest(name) == BASES[family].PINNED[name], (
        f"TRL changed `{name}`. Read its new source, carry what matters over to trainers/{family} (the equality tests "
        f"in tests/{family}/test_base.py tell whether it does), then set its entry in "
        f"`{BASES[family].__name__}.PINNED` to '{digest(name)}'."
    )
