"""The catalogue: every method there is, by short name, found by its declaration."""

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from .declaration import METHODS_FOLDER, Method, declared, read_declaration
from .family import FAMILIES, Family
from .slots import SLOTS

ENTRY_POINTS = "papertrl.methods"
# The trainers without a method, which train as TRL's do, by the name under which a job asks for them
PLAIN: dict[str, Family] = {family.plain: family for family in FAMILIES.values()}


def _read_catalogue() -> tuple[dict[str, Method], dict[str, str]]:
    """All declarations, and what is wrong with those of other packages that are left out."""
    found = [declared(path.stem) for path in METHODS_FOLDER.glob("*.toml")]
    rooms = [*FAMILIES, *SLOTS, None]
    found.sort(key=lambda m: (rooms.index(m.family if m.kind == "objective" else m.slot), m.name))
    methods = {method.name: method for method in found}
    broken = {}
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name):
        try:
            if point.name in methods:
                raise ValueError("there is a method of that name already")
            methods[point.name] = _read_entry_point(point)
        except ValueError as error:
            broken[point.name] = f"Package '{point.dist.name}' adds the method '{point.name}' in vain: {error}."
    return methods, broken


def _read_entry_point(point: Any) -> Method:
    """Declaration of another package's method: a TOML file of its name beside the module of its class."""
    file = _file_of(point.module)
    if file is None:
        raise ValueError(f"its entry point '{point.value}' names no module")
    toml = file.parent / f"{point.name}.toml"
    if not toml.is_file():
        raise ValueError(f"there is no '{toml.name}' beside '{file}'")
    method = read_declaration(toml, entry=point.value)
    if method.family not in (*FAMILIES, None):
        raise ValueError(f"`family` in '{toml}' must be one of {(*FAMILIES,)}, got {method.family!r}")
    if method.slot not in (*SLOTS, None):
        raise ValueError(f"`slot` in '{toml}' must be one of {(*SLOTS,)}, got {method.slot!r}")
    return method


def _file_of(module: str) -> Path | None:
    """File of a module, found without importing the packages around it, which may import this one."""
    parts = module.split(".")
    spec = importlib.util.find_spec(parts[0])
    for depth in range(2, len(parts) + 1):
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(".".join(parts[:depth]), spec.submodule_search_locations)
    return None if spec is None or spec.origin is None else Path(spec.origin)


DECLARATIONS: dict[str, Method]
# Sentences about entry points that add no method, by name
BROKEN: dict[str, str]
DECLARATIONS, BROKEN = _read_catalogue()
# Short names with the family of an objective, or the slot of a component
METHODS: dict[str, str] = {name: method.family or method.slot or method.kind for name, method in DECLARATIONS.items()}


@lru_cache
def combinations() -> dict[str, tuple[str, ...]]:
    """Methods that go together, with a recipe of their own that lists several `methods`."""
    folder = Path(importlib.util.find_spec("papertrl.recipes").origin).parent
    recipes = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))}
    listed = {name: tuple(recipe.get("methods", ())) for name, recipe in recipes.items()}
    return {name: methods for name, methods in listed.items() if len([m for m in methods if m not in PLAIN]) > 1}


def class_stem(name: str) -> str:
    """
    What the method's classes are called before `Trainer` and `Config`: the short name in camel case and TRL's suffix.

    ```python
    >>> class_stem("lp_reg"), class_stem("ln_dpo")
    ('LpRegGRPO', 'LnDPO')
    ```
    """
    method = DECLARATIONS[name]
    if method.family is None:
        return method.stem
    suffix = FAMILIES[method.family].suffix
    short = name.removesuffix("_" + suffix.lower())
    return "".join(part.capitalize() for part in short.split("_")) + suffix


def find(name: str) -> str:
    """
    Check a method's short name, or that of a trainer without a method; hyphens and capitals do not matter.

    Raises:
        `ValueError`: if there is no such method; the message suggests the nearest names, or says why the package that
            should add it does not.
    """
    key = name.lower().replace("-", "_")
    if key not in METHODS and key in BROKEN:
        raise ValueError(BROKEN[key])
    if key not in METHODS and key not in PLAIN:
        near = difflib.get_close_matches(key, METHODS, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        raise ValueError(
            f"Unknown method '{name}'. {hint}Methods are: {', '.join(METHODS)}; without a method: {', '.join(PLAIN)}."
        )
    return key


def find_trained(name: str) -> str:
    """
    [`find`] a method that trains a language model.

    Raises:
        `ValueError`: if there is no such method, or it is a study.
    """
    key = find(name)
    if key in DECLARATIONS and DECLARATIONS[key].kind == "study":
        raise ValueError(
            f"'{key}' is a study, which trains no language model: run `python -m {entry_of(DECLARATIONS[key])[0]}`."
        )
    return key


def entry_of(method: Method) -> tuple[str, str]:
    """Module and name of a method's class."""
    if method.entry is not None:
        module, _, attribute = method.entry.partition(":")
        return module, attribute
    if method.kind == "objective":
        return f"papertrl.trainers.{method.family}.{method.name}", class_stem(method.name) + "Trainer"
    room = SLOTS[method.slot].room if method.kind == "component" else "papertrl.labs"
    return f"{room}.{method.name}", method.stem


@lru_cache
def load(name: str) -> type:
    """Class of the method with this short name, a trainer or a component, or the base of a family."""
    key = find(name)
    if key in PLAIN:
        family = PLAIN[key]
        return getattr(importlib.import_module(family.module), family.base)
    method = DECLARATIONS[key]
    module, attribute = entry_of(method)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        if method.entry is None:
            raise
        raise ValueError(f"Method '{key}' cannot be loaded from its entry point '{method.entry}': {error}.") from error


@lru_cache
def load_trainer(name: str) -> type:
    """
    Trainer class of the method with this short name, or the base of a family.

    A component rides on the base of the family that its declaration names.

    Raises:
        `ValueError`: if there is no such method, or it is a study, or a component without a family.
    """
    key = find_trained(name)
    method = DECLARATIONS.get(key)
    if method is None or method.kind == "objective":
        return load(key)
    if method.family is None:
        raise ValueError(
            f"'{key}' is a component, which any trainer carries: name one beside it, such as `--methods "
            f"{next(iter(PLAIN))} {key}`; without a method: {', '.join(PLAIN)}."
        )
    base, component = load(FAMILIES[method.family].plain), load(key)
    namespace = {"components": (component,), "__module__": component.__module__, "__doc__": component.__doc__}
    return type(class_stem(key) + "Trainer", (base,), namespace)


# Public names beside those of methods and bases
_NAMES = {
    "compose": "papertrl.core.compose",
    "METHODS": "papertrl.core.catalogue",
    "Component": "papertrl.core.slots",
    "revise": "papertrl.evaluation.revision",
}


def exports() -> list[str]:
    """Public names of the package."""
    names = list(_NAMES)
    for family in FAMILIES.values():
        names += [family.base, family.base.removesuffix("Trainer") + "Config"]
    for method in DECLARATIONS.values():
        if method.kind == "component":
            names += [method.stem, method.stem + "Config"]
        if method.family is not None:
            names += [class_stem(method.name) + kind for kind in ("Trainer", "Config")]
    return names


def resolve(name: str) -> Any:
    """
    What stands behind a public name of the package.

    Raises:
        `AttributeError`: if there is no such name.
    """
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    for family in FAMILIES.values():
        if name in (family.base, family.base.removesuffix("Trainer") + "Config"):
            return getattr(importlib.import_module(family.module), name)
    for method in DECLARATIONS.values():
        if method.kind == "component" and name in (method.stem, method.stem + "Config"):
            component = load(method.name)
            return component if name == method.stem else component.config_class
        if method.family is not None and name.startswith(stem := class_stem(method.name)):
            kinds = {stem + "Trainer": load_trainer, stem + "Config": lambda m: load_trainer(m).config_class}
            if name in kinds:
                return kinds[name](method.name)
    raise AttributeError(f"module 'papertrl' has no attribute '{name}'")


def chapters() -> dict[str, list[Method]]:
    """The catalogue under headings: objectives by family, components by slot, studies."""
    headings = {("objective", f.name): f"Objectives of the family {f.name} ({f.suffix})" for f in FAMILIES.values()}
    headings |= {("component", s.name): f"Components of the slot {s.name}: {s.does}" for s in SLOTS.values()}
    headings["study", None] = "Studies"
    found: dict[str, list[Method]] = {heading: [] for heading in headings.values()}
    for method in DECLARATIONS.values():
        where = {"objective": method.family, "component": method.slot, "study": None}[method.kind]
        found[headings[method.kind, where]].append(method)
    return {heading: methods for heading, methods in found.items() if methods}


def method_table(methods: Iterable[Method] | None = None) -> str:
    """Markdown table of `methods`, by default of the whole catalogue, as the method index shows it."""
    rows = ["| method | class | what it does | paper |", "|---|---|---|---|"]
    for method in DECLARATIONS.values() if methods is None else methods:
        paper = f"[{method.paper.title}]({method.paper.url})" if method.paper else ""
        rows.append(f"| `{method.name}` | `{entry_of(method)[1]}` | {method.summary} | {paper} |")
    return "\n".join(rows)
