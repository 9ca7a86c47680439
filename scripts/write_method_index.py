"""Write the catalogue's table into README.md and docs/methods.md; run it after adding a method."""

import re
from pathlib import Path

from papertrl.catalogue import method_table

ROOT = Path(__file__).parents[1]


def main() -> None:
    for page in ("README.md", "docs/methods.md"):
        path = ROOT / page
        marked = re.compile(r"(<!-- methods -->\n).*?(\n<!-- /methods -->)", re.DOTALL)
        text, found = marked.subn(lambda match: match[1] + method_table() + match[2], path.read_text())
        if not found:
            raise SystemExit(f"{page} has no place for the table, between '<!-- methods -->' and '<!-- /methods -->'.")
        path.write_text(text)


if __name__ == "__main__":
    main()
