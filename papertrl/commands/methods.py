"""`papertrl methods`: the catalogue, and all there is to know of one method."""

import dataclasses
import json
from typing import Any

from ..core.catalogue import DECLARATIONS, PLAIN, chapters, entry_of, find, load
from ..core.declaration import Method
from ..core.family import FAMILIES
from ..core.parsing import CommandParser
from ..core.slots import SLOTS
from ..core.stages import remedy
from .settings import Setting, loaded_settings, settings_of

USAGE = """\
usage: papertrl methods [NAME ...] [--json]

List the methods, or show of each that is named its paper, settings with defaults, stages and what it clashes with.

  --json   as JSON, for programs: of all methods what their declarations say, of named ones everything
"""


def main(argv: list[str]) -> int:
    """
    Print the catalogue, or methods.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl methods`.

    Raises:
        `ValueError`: if there is no such method.
    """
    parser = CommandParser(prog="papertrl methods", add_help=False)
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    args = parser.parse_args(argv)
    if args.help:
        print(USAGE, end="")
        return 0
    names = [find(name) for name in args.methods]
    if args.json:
        found = [details(name) for name in names] or [facts(method) for method in DECLARATIONS.values()]
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(page, names)) if names else method_list())
    return 0


def method_list() -> str:
    """The catalogue as text, from the declarations: importing the methods would take seconds."""
    width = max(map(len, DECLARATIONS)) + 2
    parts = []
    for heading, methods in chapters().items():
        lines = [f"{m.name:<{width}}{m.summary}\n{paper(m, ' ' * width)}".rstrip() for m in methods]
        parts.append("\n".join([heading, *(f"  {line}".replace("\n", "\n  ") for line in lines)]))
    return "\n\n".join(parts)


def paper(method: Method, indent: str) -> str:
    """Title and id of the method's paper, in a line."""
    return f"{indent}{method.paper.title}, arXiv:{method.paper.id}\n" if method.paper else ""


def facts(method: Method) -> dict[str, Any]:
    """What a method's declaration says, as JSON has it."""
    return {
        "name": method.name,
        "kind": method.kind,
        "family": method.family,
        "slot": method.slot,
        "summary": method.summary,
        "class": entry_of(method)[1],
        "paper": method.paper and dataclasses.asdict(method.paper) | {"url": method.paper.url},
        "neutral": dict(method.neutral),
        "signal": method.signal or None,
    }


def details(name: str) -> dict[str, Any]:
    """What a method's declaration, config and class say, as JSON has it."""
    if name in PLAIN:
        cls, family = load(name), PLAIN[name]
        summary = f"{family.parent} of TRL, opened into stages; no method"
        about = {"name": name, "kind": "base", "family": family.name, "summary": summary, "class": cls.__name__}
        settings = loaded_settings(cls.config_class)
        return about | {"settings": list(map(dataclasses.asdict, settings)), "stages": list(cls.stages)}
    method = DECLARATIONS[name]
    found = facts(method)
    if method.kind == "study":
        return found
    found["settings"] = list(map(dataclasses.asdict, settings_of(name)))
    if method.kind == "objective":
        cls = load(name)
        for kind in ("extends", "replaces"):
            stages = cls.__dict__.get(kind, {})
            found[kind] = {stage: remedy(off) or None for stage, off in stages.items()}
    found["clashes"] = clashes(name)
    return found


def clashes(name: str) -> dict[str, str]:
    """Methods that a method does not combine with as they are, with the stage or slot that both want."""
    method = DECLARATIONS[name]
    if method.kind == "component":
        rivals = [m.name for m in DECLARATIONS.values() if m.slot == method.slot and m is not method]
        return dict.fromkeys(rivals, f"slot '{method.slot}'") if SLOTS[method.slot].single else {}
    own = load(name).__dict__.get("replaces", {})
    found = {}
    for other in DECLARATIONS.values():
        if other.kind == "objective" and other.family == method.family and other is not method:
            theirs = load(other.name).__dict__.get("replaces", {})
            shared = [stage for stage in own if stage in theirs]
            if shared:
                ways = [text for stage in shared for text in (remedy(own[stage]), remedy(theirs[stage])) if text]
                unless = f", unless {' or '.join(dict.fromkeys(ways))}" if ways else ""
                found[other.name] = f"stage {', '.join(map(repr, shared))}{unless}"
    return found


def page(name: str) -> str:
    """All that [`details`] tells, for people."""
    found = details(name)
    lines = [f"{name}: {found['summary']}", f"{found['class']}, {_place(found)}"]
    if found.get("paper"):
        method = DECLARATIONS[name]
        lines += ["", method.paper.title, ", ".join(method.paper.authors), method.paper.url, "", method.paper.citation]
    if found.get("settings"):
        lines += ["", "Settings:", *(str(Setting(**setting)).rstrip() for setting in found["settings"])]
    for key, heading in (("extends", "Acts in the stages"), ("replaces", "Decides alone the stages")):
        if found.get(key):
            lines += ["", f"{heading}:"]
            lines += [f"  {stage}{f', off with {off}' if off else ''}" for stage, off in found[key].items()]
    if found.get("stages"):
        lines += ["", f"Stages: {', '.join(found['stages'])}"]
    if "clashes" in found:
        lines += ["", "Does not combine, as they are, with:" if found["clashes"] else "Clashes with no other method."]
        lines += [f"  {other}: {why}" for other, why in found["clashes"].items()]
    if found["kind"] != "study":
        listed = name if found["kind"] != "component" or found["family"] else f"grpo {name}"
        lines += ["", f"papertrl train --method{'s' if ' ' in listed else ''} {listed}"]
    return "\n".join(lines)


def _place(found: dict[str, Any]) -> str:
    family = found["family"] and f"the family {found['family']} ({FAMILIES[found['family']].suffix})"
    if found["kind"] == "component":
        return f"a component of the slot {found['slot']}" + (f", for {family}" if family else ", for every family")
    return {"objective": f"an objective of {family}", "base": f"the base of {family}", "study": "a study"}[
        found["kind"]
    ]
