import hashlib
import importlib
import inspect

import pytest

from papertrl.trainers.preference.base import PINNED


def resolve(name: str):
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


@pytest.mark.parametrize("name", PINNED)
def test_trl_source_is_the_one_that_the_base_was_written_for(name):
    source = inspect.getsource(resolve(name))
    digest = hashlib.sha256(source.encode()).hexdigest()[:32]
    assert digest == PINNED[name], (
        f"TRL changed `{name}`. Read its new source, carry what matters over to papertrl/trainers/preference (the "
        f"equality tests in tests/preference/test_base.py tell whether it does), then set its entry in "
        f"`papertrl.trainers.preference.base.PINNED` to '{digest}'."
    )
