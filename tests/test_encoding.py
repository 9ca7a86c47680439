"""Text files are read and written as UTF-8, whatever the alphabet of the machine."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for p in ROOT.rglob("*.py") if "tests" not in p.parts and ".venv" not in p.parts)


def without_encoding(source: str) -> list[ast.Call]:
    """Calls that open a file as text in the machine's alphabet."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(keyword.arg in ("encoding", None) for keyword in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
        of_path = isinstance(call.func, ast.Attribute)
        if name == "open":
            places = call.args[: 1 if of_path else 2][-1:] if of_path else call.args[1:2]
            modes = [*places, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
            written = [mode.value for mode in modes if isinstance(mode, ast.Constant)]
            module = call.func.value.id if of_path and isinstance(call.func.value, ast.Name) else None
            if module not in ("os", "Image", "webbrowser", "tarfile", "zipfile") and "b" not in "".join(written):
                found.append(call)
        elif of_path and name in ("read_text", "write_text"):
            found.append(call)
    return found


@pytest.mark.parametrize("found", [1, 0])
def test_what_counts(found):
    with_, without = ', encoding="utf-8"', ""
    for call in ("open(p{})", "open(p, 'w'{})", "p.open('a'{})", "p.read_text({})", "p.write_text(t{})"):
        source = call.format(without if found else with_.lstrip(", ") if call.endswith("({})") else with_)
        assert len(without_encoding(source)) == found, source
    assert not without_encoding("open(p, 'rb'); p.open('wb'); os.open(p, os.O_RDONLY); open(p, mode='rb')")


def test_every_text_file_has_an_encoding():
    found = [
        f"{p.relative_to(ROOT)}:{call.lineno}" for p in SOURCES for call in without_encoding(p.read_text("utf-8"))
    ]
    assert not found, found
