"""Settings of a method as people read them: without loading it, where its source says all."""

import ast
import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.catalogue import DECLARATIONS, entry_of, load
from ..core.configuration import field_default, own_fields
from ..core.ranges import Valid


@dataclass(frozen=True)
class Setting:
    """A field of a method's config: `valid` is what it accepts, as text, `None` where that is not declared."""

    name: str
    default: Any
    help: str
    valid: str | None

    def __str__(self) -> str:
        limits = f" Valid: {self.valid}." if self.valid else ""
        return f"  --{self.name} (default: {self.default!r})\n      {self.help}{limits}\n"


def settings_of(name: str) -> list[Setting]:
    """What a method adds to the flags of its family, read from its source, or from its class where that needs more."""
    try:
        return _written(name)
    except _Computed:
        return loaded_settings(load(name).config_class)


def loaded_settings(config_class: type) -> list[Setting]:
    """The fields that a config class itself introduces or overrides."""
    return [
        Setting(
            f.name, field_default(f), f.metadata["help"], str(valid) if (valid := f.metadata.get("valid")) else None
        )
        for f in own_fields(config_class)
    ]


class _Computed(Exception):
    """A field's declaration is not literal."""


def _written(name: str) -> list[Setting]:
    module, attribute = entry_of(DECLARATIONS[name])
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise _Computed
    config = attribute.removesuffix("Trainer") + "Config"
    classes = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    body = next((c.body for c in classes if isinstance(c, ast.ClassDef) and c.name == config), None)
    if body is None:
        raise _Computed
    return [_setting(line) for line in body if isinstance(line, ast.AnnAssign)]


def _setting(line: ast.AnnAssign) -> Setting:
    call = line.value
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "method_field"):
        raise _Computed
    default, help = (_literal(argument) for argument in call.args)
    valid = {word.arg: _literal(word.value) for word in call.keywords if word.arg != "was"}
    optional = "None" in ast.unparse(line.annotation) or default is None
    text = str(Valid(**{"optional": optional} | valid)) if valid else None
    return Setting(line.target.id, default, help, text)


def _literal(node: ast.expr) -> Any:
    if ast.unparse(node) in ("math.inf", "-math.inf"):
        return math.inf if ast.unparse(node) == "math.inf" else -math.inf
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise _Computed from None
