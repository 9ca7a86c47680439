"""Write what pages state about methods: catalogue, users of stages, evidence. Run it after adding or measuring one."""

import re
from pathlib import Path

from papertrl.core.catalogue import METHODS, load_trainer, method_table
from papertrl.evidence.tables import evidence_sections, overoptimization_section, read_results, summary_table
from papertrl.trainers.method import Method

ROOT = Path(__file__).parents[1]


def main() -> None:
    results = read_results(ROOT / "claims/results")
    for page, mark, text in (
        ("README.md", "methods", method_table()),
        ("docs/methods.md", "methods", method_table()),
        ("README.md", "evidence", summary_table(results)),
        ("docs/evidence.md", "evidence", summary_table(results)),
        ("docs/evidence.md", "overoptimization", overoptimization_section(ROOT / "claims/results")),
        ("docs/evidence.md", "evidence sections", evidence_sections(results)),
    ):
        write(ROOT / page, mark, text)
    stages = ROOT / "docs/stages.md"
    stages.write_text(with_users(stages.read_text()))


def with_users(page: str) -> str:
    """The page of stages with the last column of its tables, who uses a stage, as the methods declare it."""
    trainers = [load_trainer(name) for name in METHODS]
    family = ""

    def row(match: re.Match) -> str:
        users = [t.method.name for t in trainers if t.family == family and uses(t.method, match[2])]
        return f"{match[1]} {', '.join(f'`{name}`' for name in users)} |".replace("  |", " |")

    lines = []
    for line in page.split("\n"):
        if line.startswith("## "):
            family = line.removeprefix("## ").split(":")[0].lower()
        lines.append(re.sub(r"^(\| `(\w+)` \| `\w+\(.*\|)[^|]*\|$", row, line))
    return "\n".join(lines)


def uses(method: Method, stage: str) -> bool:
    return stage in method.extends or stage in method.replaces


def write(path: Path, mark: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    page, found = marked.subn(lambda match: f"{match[1]}{text}\n{match[2]}", path.read_text())
    if not found:
        raise SystemExit(f"{path.name} has no place for '{mark}', between '<!-- {mark} -->' and '<!-- /{mark} -->'.")
    path.write_text(page)


if __name__ == "__main__":
    main()
