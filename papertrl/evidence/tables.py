"""The page of evidence, written from the result files."""

import json
from pathlib import Path

from ..core.catalogue import METHODS, combinations
from .claim import claimed, load_claim


def read_results(folder: Path) -> dict[str, dict]:
    """Result files of a folder, by method, in the catalogue's order."""
    paths = {name: folder / f"{name}.json" for name in (*METHODS, *combinations())}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def summary_table(results: dict[str, dict]) -> str:
    """One row per method and combination: what was compared, the difference with its interval, the verdict."""
    rows = ["| method | compared | difference [95 % interval] | smallest effect | verdict |", "|---|---|---|---|---|"]
    for name in (*METHODS, *combinations()):
        if name not in results:
            state = "not measured yet" if name in claimed() else "no claim yet"
            rows.append(f"| `{name}` | | | | {state} |")
            continue
        first = results[name]["comparisons"][0]
        rows.append(
            f"| `{name}` | {first['arm']} against {first['against']}: {first['metric'].replace('_', ' ')} | "
            f"{difference(first)} | {first['smallest_effect']:g} | **{results[name]['verdict']}** |"
        )
    return "\n".join(rows)


def evidence_sections(results: dict[str, dict]) -> str:
    """One section per measured method: the paper's claim, what was done, every comparison, the plot."""
    return "\n\n".join(_section(name, result) for name, result in results.items())


def overoptimization_section(folder: Path) -> str:
    """What the experiment on over-optimization found."""
    from .overoptimization import read, section

    outcome = read(folder)
    return "Not measured yet." if outcome is None else section(outcome)


def difference(comparison: dict) -> str:
    """Mean difference with its interval, as text."""
    return f"{comparison['mean']:+.3f} [{comparison['low']:+.3f}, {comparison['high']:+.3f}]"


def _section(name: str, result: dict) -> str:
    rows = [
        "| arm | against | metric | better | difference | at equal sampled tokens | at equal time | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in result["comparisons"]:
        equal = [difference(c["at_equal"][axis]) if axis in c["at_equal"] else "" for axis in AXES_SHOWN]
        broken = [guard for guard, outcome in c["guards"].items() if not outcome["holds"]]
        verdict = c["verdict"] + (f" ({', '.join(broken)} may be worse)" if broken else "")
        rows.append(
            f"| {c['arm']} | {c['against']} | {c['metric'].replace('_', ' ')} | {c['direction']} | {difference(c)} | "
            f"{equal[0]} | {equal[1]} | {verdict} |"
        )
    chosen = "; ".join(f"{arm} {_values(tuned['chosen'])}" for arm, tuned in result["tuning"].items())
    parts = [
        f"## {name}: {result['verdict']}",
        f"Paper: {result['statement']}\nIts figures: {result['figures']}.",
        f"Here: {result['check']}",
        "\n".join(rows),
        f"{len(result['seeds'])} fresh seeds, {result['minutes']:g} minutes. Grids searched on development seeds for "
        f"{result['tuned_on'].replace('_', ' ')}, chosen: {chosen}.",
    ]
    findings = load_claim(name).findings
    return "\n\n".join([*parts, *([findings] if findings else []), f"![{name}](../claims/results/{name}.png)"])


AXES_SHOWN = ("sampled_tokens", "seconds")


def _values(choice: dict) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in choice.items())
