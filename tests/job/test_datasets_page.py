"""docs/datasets.md says what the code does."""

import re
from pathlib import Path

from papertrl import data
from papertrl.data import FORMATS

PAGE = (Path(__file__).parents[2] / "docs/datasets.md").read_text()


def test_examples_run():
    namespace = {}
    for source in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        exec(compile(source, "docs/datasets.md", "exec"), namespace)


def test_every_format_and_converter_is_there():
    formats, ways, _ = re.split(r"^## (?:From one|On the)", PAGE, flags=re.MULTILINE)
    assert set(re.findall(r"^\| `(\w+)` \|", formats, flags=re.MULTILINE)) == FORMATS.keys()
    first_that_counts = re.search(r"the first of (.*) counts", formats)[1]
    assert re.findall(r"`(\w+)`", first_that_counts) == list(FORMATS)
    for name, form in FORMATS.items():
        row = next(line for line in formats.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{column}`" in row for column in (*form.columns, *form.one_of))
    told = set(re.findall(r"`(\w+)\(dataset", ways)) - {"detect_format"}
    ways = {name for name in data.__all__ if name.startswith("as_") or name.endswith("_prompts") or "_to_" in name}
    assert told == {name for name in ways if not name.startswith("check_")}
