"""Write the generated tables: the catalogue and the evidence. Run it after adding a method or measuring a claim."""

import re
from pathlib import Path

from papertrl.catalogue import method_table
from papertrl.evidence.tables import evidence_sections, read_results, summary_table

ROOT = Path(__file__).parents[1]


def main() -> None:
    results = read_results(ROOT / "claims/results")
    for page, mark, text in (
        ("README.md", "methods", method_table()),
        ("docs/methods.md", "methods", method_table()),
        ("README.md", "evidence", summary_table(results)),
        ("docs/evidence.md", "evidence", summary_table(results)),
        ("docs/evidence.md", "evidence sections", evidence_sections(results)),
    ):
        write(ROOT / page, mark, text)


def write(path: Path, mark: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    marked = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    page, found = marked.subn(lambda match: f"{match[1]}{text}\n{match[2]}", path.read_text())
    if not found:
        raise SystemExit(f"{path.name} has no place for '{mark}', between '<!-- {mark} -->' and '<!-- /{mark} -->'.")
    path.write_text(page)


if __name__ == "__main__":
    main()
