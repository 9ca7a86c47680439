"""Config files of a job: YAML, or the recipe of a name, with every value of the type that its flag takes."""

import difflib
import enum
import importlib.util
import os
import re
import types
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..core.errors import UsageError
from ..core.ranges import range_of

TRUE, FALSE = ("yes", "true", "on", "1"), ("no", "false", "off", "0")
# Read by the flag itself, in more forms than its annotation has
FREE_FORM = ("stage",)


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-5` is a number, and no key stands twice in a mapping."""

    def construct_mapping(self, node, deep=False):
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:merge" and isinstance(key, str) and key in seen:
                raise UsageError(f"has the key `{key}` twice, in line {seen[key]} and in line {line}. Drop one.")
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_config(name: str) -> dict[str, Any]:
    """
    Read a YAML file, or the recipe of this name.

    Raises:
        [`UsageError`]: if there is no such file or recipe, or it holds no mapping of names to values.
    """
    path = _find(name)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except UsageError as error:
        raise UsageError(f"`--config`: '{path}' {error}") from error
    except OSError as error:
        raise UsageError(f"`--config`: '{path}' cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        hint = " A line is indented by a tab; YAML takes spaces only." if "'\\t'" in str(error) else ""
        raise UsageError(f"`--config`: '{path}' is not valid YAML: {error}.{hint}") from error
    mapping = "a mapping of flags to values, as in `learning_rate: 1.0e-6`"
    if config is None:
        raise UsageError(f"`--config`: '{path}' is empty. It must hold {mapping}.")
    if not isinstance(config, dict):
        raise UsageError(f"`--config`: '{path}' must hold {mapping}, got a {_kind(config)}.")
    odd = [key for key in config if not isinstance(key, str)]
    if odd:
        raise UsageError(f"`--config`: '{path}' must hold {mapping}, but has the key {odd[0]!r}.")
    environment = config.pop("env", {})
    if not isinstance(environment, dict):
        raise UsageError(f"`--config`: `env` of '{path}' must be a mapping of variables to values.")
    for key, value in environment.items():
        os.environ[str(key)] = str(value)
    return config


def _find(name: str) -> Path:
    path = Path(name)
    if path.is_file():
        return path
    recipes = Path(importlib.util.find_spec("papertrl.recipes").origin).parent
    recipe = recipes / f"{path.name.removesuffix('.yaml').replace('-', '_')}.yaml"
    if recipe.is_file() and path.parent.name in ("", "recipes"):
        return recipe
    known = sorted(recipe.stem for recipe in recipes.glob("*.yaml"))
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"Did you mean '{near[0]}'? " if near else ""
    what = "is a folder" if name and path.is_dir() else "is no file and no recipe"
    raise UsageError(f"`--config`: '{name}' {what}. {hint}Recipes are: {', '.join(known)}.")


# --- Values ---------------------------------------------------------------------------------------------------------


def fit_values(config: dict[str, Any], classes: Iterable[type]) -> dict[str, Any]:
    """
    The config with each value as its field has it: a single value of a list field as a list of one, numbers that YAML
    took for text as numbers.

    Args:
        config (`dict[str, Any]`):
            Values by name of a field.
        classes (dataclasses):
            Where the fields stand.

    Raises:
        [`UsageError`]: naming the key, the value and what is accepted.
    """
    fitted = dict(config)
    for cls in classes:
        hints = get_type_hints(cls)
        for f in fields(cls):
            if f.name not in config or f.name in FREE_FORM:
                continue
            value, valid = config[f.name], range_of(cls, f)
            if valid is not None and valid.choices and valid.accepts(value):
                continue
            try:
                fitted[f.name] = fit(value, hints[f.name])
            except ValueError as error:
                shown = "nothing" if value is None else repr(value)
                raise UsageError(f"`{f.name}` of the config file must be {error}, got {shown}.") from error
    return fitted


def fit(value: Any, annotation: Any) -> Any:
    """
    `value` as something of the type that `annotation` names.

    Raises:
        `ValueError`: whose text is what is accepted.
    """
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return _fit_one_of(value, parts)
    if origin is list:
        return [fit(item, parts[0]) for item in (value if isinstance(value, (list, tuple)) else [value])]
    if origin is Literal:
        if value in parts:
            return value
        raise ValueError(" or ".join(map(repr, parts)))
    if origin is dict or annotation is dict:
        if isinstance(value, dict) or (isinstance(value, str) and value.strip().startswith("{")):
            return value
        raise ValueError("a mapping")
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        names = [member.value for member in annotation]
        # What YAML 1.1 makes of a plain `no`
        value = "no" if value is False else getattr(value, "value", value)
        if value in names:
            return value
        raise ValueError("one of " + ", ".join(map(repr, names)))
    return _SCALARS[annotation](value) if annotation in _SCALARS else value


def _fit_one_of(value: Any, parts: tuple) -> Any:
    none = type(None) in parts
    if none and (value is None or (str not in parts and str(value).lower() in ("none", "null"))):
        return None
    # Text last: everything can be written down
    kinds = sorted((part for part in parts if part is not type(None)), key=lambda part: part is str)
    if any(isinstance(kind, type) and issubclass(kind, enum.Enum) for kind in kinds):
        kinds.remove(str)
    accepted = []
    for kind in kinds:
        try:
            return fit(value, kind)
        except ValueError as error:
            accepted.append(str(error))
    raise ValueError(" or ".join([*dict.fromkeys(accepted), *(["null"] if none else [])]))


def _bool(value: Any) -> bool:
    text = str(value).lower()
    if isinstance(value, (bool, int, str)) and text in (*TRUE, *FALSE):
        return text in TRUE
    raise ValueError("true or false")


def _int(value: Any) -> int:
    number = _number(value)
    if number is None or number != number or abs(number) == float("inf") or int(number) != number:
        raise ValueError("an integer")
    return int(number)


def _float(value: Any) -> float:
    number = _number(value)
    if number is None:
        raise ValueError("a number")
    return number


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return None
    return value if isinstance(value, Real) and not isinstance(value, bool) else None


def _str(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError("text, in quotes where YAML reads it as true or false,")
    if isinstance(value, (str, Integral, Real)):
        return str(value)
    raise ValueError("text")


_SCALARS = {bool: _bool, int: _int, float: _float, str: _str}


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else f"single value: {value!r:.40}"
