import gc

import pytest
from datasets import disable_progress_bars


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """Trainers collect garbage several times per run: leave what the imports made out of it."""
    disable_progress_bars()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
