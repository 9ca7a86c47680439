"""What is known of a paper's method without loading it: one TOML file each."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

KINDS = ("objective", "component", "study")
# TOML has no null
NULL = "null"


@dataclass(frozen=True)
class Paper:
    """
    Where a method comes from.

    Args:
        title (`str`):
            Title of the paper.
        id (`str`):
            arXiv id.
        year (`int`):
            Year of publication.
        key (`str`):
            BibTeX key.
        authors (`tuple[str, ...]`):
            Names, in order.
        booktitle (`str`, *optional*):
            Conference, where it was published at one.
    """

    title: str
    id: str
    year: int
    key: str
    authors: tuple[str, ...] = ()
    booktitle: str | None = None

    @property
    def url(self) -> str:
        """Page of the paper."""
        return f"https://arxiv.org/abs/{self.id}"

    @property
    def citation(self) -> str:
        """BibTeX entry."""
        entries = {
            "title": f"{{{{{self.title}}}}}",
            "author": f"{{{' and '.join(self.authors)}}}",
            "booktitle": self.booktitle and f"{{{self.booktitle}}}",
            "year": str(self.year),
            "eprint": f"{{arXiv:{self.id}}}",
        }
        lines = [f"    {name:<9} = {value}" for name, value in entries.items() if value]
        return f"@{'inproceedings' if self.booktitle else 'article'}{{{self.key},\n" + ",\n".join(lines) + "\n}"


@dataclass(frozen=True, eq=False)
class Method:
    """
    Declaration of one paper's method. [`declared`] reads it from the method's TOML file.

    What a method changes stands on its class instead: see [`~papertrl.core.stages.Staged`].

    Args:
        name (`str`):
            Short name: that of the method's files, and of `--methods`.
        kind (`str`):
            `"objective"` (a trainer of one family), `"component"` (fills a slot of any trainer) or `"study"`.
        summary (`str`):
            What the method does, in one line.
        family (`str`, *optional*):
            Family of an objective; of a component, the only one that it serves, if there is one.
        slot (`str`, *optional*):
            Slot of a component.
        title (`str`, *optional*):
            How the paper calls the method. Defaults to `name`.
        prefix (`str`, *optional*):
            What the names of its config fields begin with. Defaults to `name`.
        tags (`tuple[str, ...]`):
            Tags of the model card beside those of the family.
        signal (`str`):
            Logged metric that is positive when the mechanism acts.
        paper ([`Paper`], *optional*):
            Where it comes from.
        neutral (`dict[str, Any]`):
            Config values under which the trainer equals its TRL parent.
        active (`dict[str, Any]`):
            Config values under which the mechanism acts on the tiny models of the tests.
        entry (`str`, *optional*):
            `module:attribute` of the class, where it does not follow from the name.

    Raises:
        `ValueError`: naming the field, if a value is not accepted.
    """

    name: str
    kind: str = "objective"
    summary: str = ""
    family: str | None = None
    slot: str | None = None
    title: str = ""
    prefix: str = ""
    tags: tuple[str, ...] = ()
    signal: str = ""
    paper: Paper | None = None
    neutral: Mapping[str, Any] = field(default_factory=dict)
    active: Mapping[str, Any] = field(default_factory=dict)
    entry: str | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"`kind` of method '{self.name}' must be one of {KINDS}, got {self.kind!r}.")
        if self.kind == "objective" and self.family is None:
            raise ValueError(f"`family` of method '{self.name}' is missing: an objective belongs to one.")
        if (self.kind == "component") != (self.slot is not None):
            raise ValueError(f"`slot` of method '{self.name}' must be set for components only, got {self.slot!r}.")
        for name, kind in {
            "summary": str,
            "signal": str,
            "prefix": str,
            "neutral": Mapping,
            "active": Mapping,
        }.items():
            if not isinstance(getattr(self, name), kind):
                raise ValueError(
                    f"`{name}` of method '{self.name}' must be a {'text' if kind is str else 'table'}, got "
                    f"{getattr(self, name)!r}."
                )
        object.__setattr__(self, "title", self.title or self.name)
        object.__setattr__(self, "prefix", self.prefix or self.name)

    @property
    def stem(self) -> str:
        """
        The name in camel case.

        ```python
        >>> Method("lp_reg", family="policy").stem
        'LpReg'
        ```
        """
        return "".join(part.capitalize() for part in self.name.split("_"))


def read_declaration(path: Path, entry: str | None = None) -> Method:
    """
    Read a method's TOML file, which is called as the method is.

    Args:
        path (`Path`):
            The file.
        entry (`str`, *optional*):
            `module:attribute` of the method's class, for methods of other packages.

    Raises:
        `ValueError`: naming the file and what is wrong with it.
    """
    try:
        content = _without_null(tomllib.loads(path.read_text(encoding="utf-8")))
        content["tags"] = _list(content, "tags")
        if "paper" in content:
            paper = content["paper"]
            if not isinstance(paper, dict):
                raise ValueError(f"`paper` must be a table, got {paper!r}")
            _refuse_unknown(paper, Paper, "[paper]")
            content["paper"] = Paper(**paper | {"authors": _list(paper, "authors")})
        _refuse_unknown(content, Method, "it")
        return Method(**content | {"name": path.stem, "entry": entry})
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"'{path}' does not declare a method: {error}") from error


def _list(table: dict[str, Any], key: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list):
        raise ValueError(f"`{key}` must be a list of texts, got {value!r}")
    return tuple(value)


def _refuse_unknown(table: dict[str, Any], cls: type, where: str) -> None:
    known = [f.name for f in fields(cls) if f.name not in ("name", "entry")]
    unknown = [key for key in table if key not in known]
    if unknown:
        raise ValueError(f"{where} has the keys {unknown}; keys are {known}")


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items()}
    return None if value == NULL else value


@lru_cache
def declared(name: str, beside: str | None = None) -> Method:
    """
    Declaration of the method `name`.

    Args:
        name (`str`):
            Short name.
        beside (`str`, *optional*):
            `__file__` of a module in whose folder `<name>.toml` lies. Defaults to the methods of this library.

    Raises:
        `ValueError`: if there is no such file, or it declares no method.
    """
    folder = METHODS_FOLDER if beside is None else Path(beside).parent
    return read_declaration(folder / f"{name}.toml")


METHODS_FOLDER = Path(find_spec("papertrl.methods").origin).parent
