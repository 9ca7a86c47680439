"""Write what pages state about methods: catalogue, users of stages, evidence. Run it after adding or measuring one."""

import re
from collections import Counter
from pathlib import Path

from papertrl.core.catalogue import DECLARATIONS, chapters, combinations, load, method_table
from papertrl.core.family import FAMILIES, Family
from papertrl.evidence.tables import evidence_sections, overoptimization_section, read_results, summary_table
from papertrl.trainers.method import MethodTrainer

ROOT = Path(__file__).parents[1]
VERDICTS = ("holds", "not shown", "reversed")


def main() -> None:
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """Every page that states something about methods, as it must be."""
    results = read_results(ROOT / "claims/results")
    texts = {
        path: (ROOT / path).read_text(encoding="utf-8")
        for path in ("README.md", "docs/methods.md", "docs/evidence.md")
    }
    for page, mark, text in (
        ("README.md", "counts", count_table(results)),
        ("docs/methods.md", "methods", method_sections()),
        ("docs/evidence.md", "evidence", summary_table(results)),
        ("docs/evidence.md", "overoptimization", overoptimization_section(ROOT / "claims/results")),
        ("docs/evidence.md", "evidence sections", evidence_sections(results)),
    ):
        texts[page] = with_text(texts[page], mark, text)
    texts["docs/stages.md"] = with_users((ROOT / "docs/stages.md").read_text(encoding="utf-8"))
    return {ROOT / path: text for path, text in texts.items()}


# --- Catalogue ------------------------------------------------------------------------------------------------------


def method_sections() -> str:
    """The catalogue, a table under each heading."""
    return "\n\n".join(f"## {heading}\n\n{method_table(methods)}" for heading, methods in chapters().items())


def count_table(results: dict[str, dict]) -> str:
    """How many methods of each kind there are, and what came of their claims."""
    groups = {heading.partition(":")[0]: [m.name for m in methods] for heading, methods in chapters().items()}
    groups["Combinations with a recipe"] = list(combinations())
    rows = [f"| | methods | {' | '.join(VERDICTS)} | not measured |", "|---|---|---|---|---|---|"]
    rows += [counts(heading, names, results) for heading, names in groups.items()]
    return "\n".join([*rows, counts("**All**", [name for names in groups.values() for name in names], results)])


def counts(heading: str, names: list[str], results: dict[str, dict]) -> str:
    """A row: number of methods, of each verdict, and of those without one."""
    found = Counter(results[name]["verdict"] for name in names if name in results)
    numbers = [len(names), *(found[verdict] for verdict in VERDICTS), len(names) - found.total()]
    return f"| {heading} | {' | '.join(map(str, numbers))} |"


# --- Users of stages ------------------------------------------------------------------------------------------------


def with_users(page: str) -> str:
    """The page of stages with the last column of its tables: who acts in a stage, as the classes declare it."""
    families: list[Family] = []
    lines = []
    for line in page.split("\n"):
        if line.startswith("## "):
            families = [family for family in FAMILIES.values() if f"`{family.base}(" in line]
            if f"`{MethodTrainer.__name__}`" in line:
                families = list(FAMILIES.values())
        row = re.match(r"(\| `(\w+)` \| `\w+\(.*\|)[^|]*\|$", line)
        if families and row:
            users = ", ".join(f"`{name}`" for family in families for name in users_of(family, row[2]))
            line = f"{row[1]} {users} |" if users else f"{row[1]} |"
        lines.append(line)
    return "\n".join(lines)


def users_of(family: Family, stage: str) -> list[str]:
    """Names of the objectives of a family that extend or replace a stage."""
    found = []
    for method in DECLARATIONS.values():
        if method.kind == "objective" and method.family == family.name:
            acts = [
                {**o.__dict__.get("extends", {}), **o.__dict__.get("replaces", {})} for o in load(method.name).owners()
            ]
            found += [method.name] * any(stage in stages for stages in acts)
    return found


def with_text(page: str, mark: str, text: str) -> str:
    """The page with `text` between two marks."""
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    page, found = marked.subn(lambda match: f"{match[1]}{text}\n{match[2]}", page)
    if not found:
        raise SystemExit(f"A page has no place for '{mark}', between '<!-- {mark} -->' and '<!-- /{mark} -->'.")
    return page


if __name__ == "__main__":
    main()
