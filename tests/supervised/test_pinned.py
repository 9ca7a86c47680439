import hashlib
import inspect
import pkgutil

import pytest
from papertrl.trainers.supervised.base import PINNED


@pytest.mark.parametrize("name", PINNED)
def test_trl_source_is_the_one_the_base_was_written_for(name):
    found = hashlib.sha256(inspect.getsource(pkgutil.resolve_name(name)).encode()).hexdigest()
    assert found == PINNED[name], (
        f"TRL's `{name}` changed. Read the change, see whether `trainers/supervised/` still holds, then set its entry "
        f"of `PINNED` in trainers/supervised/base.py to {found}."
    )
