"""The floors of the house: no file imports from a floor above its own, and no files import each other in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {
    "papertrl/core": 1,
    "losses": 1,
    "metrics": 1,
    "methods": 1,
    "models": 2,
    "samplers": 2,
    "optimizers": 2,
    "adapters": 2,
    "callbacks": 2,
    "rewards": 2,
    "model_cards": 2,
    "papertrl/hub": 2,
    "papertrl/data": 3,
    "papertrl/tasks": 3,
    "papertrl/evaluation": 3,
    "recipes": 3,
    "trainers": 4,
    "papertrl/job": 5,
    "papertrl/evidence": 5,
    "claims": 5,
    "labs": 5,
    "papertrl": 6,
    "spaces": 6,
}
# `core` and the maths stand at the bottom, `core` below the rest of that floor
BELOW_ALL = "papertrl/core"


def room_of(path: str) -> str:
    return max((room for room in ROOMS if path.startswith(room + "/")), key=len)


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "papertrl" else ("papertrl", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for room in {r.split("/")[0] for r in ROOMS} for path in (ROOT / room).rglob("*.py")}


def imports(module: str) -> set[str]:
    """Modules of this package that `module` imports, anywhere in its file."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return {name for name in found if name in FILES and name != module}


GRAPH = {module: imports(module) for module in FILES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach each other, by Tarjan's algorithm."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = low[module] = len(number)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in number:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], number[other])
        if low[module] == number[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in sorted(graph):
        if module not in number:
            visit(module)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports that run up, as text."""
    found = []
    for module, imported in graph.items():
        here = room_of(str(FILES[module].relative_to(ROOT)))
        for other in imported:
            there = room_of(str(FILES[other].relative_to(ROOT)))
            if ROOMS[there] > ROOMS[here] or (here == BELOW_ALL and there != here):
                found.append(f"{module} ({here}, floor {ROOMS[here]}) imports {other} ({there}, floor {ROOMS[there]})")
    return sorted(found)


def test_no_import_runs_up():
    assert upward(GRAPH) == []


def test_no_circle_of_files():
    assert circles(GRAPH) == []


def test_the_tests_see_what_they_forbid():
    up = {**GRAPH, "papertrl.core.errors": {"papertrl.trainers.method"}}
    assert len(upward(up)) == 1
    circle = {
        **GRAPH,
        "papertrl.core.errors": {"papertrl.core.parsing"},
        "papertrl.core.parsing": {"papertrl.core.errors"},
    }
    assert ["papertrl.core.errors", "papertrl.core.parsing"] in circles(circle)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_of_the_table_exists(room):
    assert (ROOT / room).is_dir()
