"""papertrl: research papers on language-model post-training as trainers that subclass TRL's."""

from .core.catalogue import exports, resolve

__version__ = "0.1.0"

__all__ = sorted(exports())


def __getattr__(name: str):
    return resolve(name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
