"""papertrl: research papers on language-model post-training as trainers that subclass TRL's."""

import importlib

from .core.catalogue import exports

__version__ = "0.1.0"

_EXPORTS = exports()
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'papertrl' has no attribute '{name}'")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
