"""
The tables in `benchmarks/README.md` and on the front page, and `results/steps.png`, from the results.

    python benchmarks/plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from harness import RESULTS, SIDES

TARGETS = {"grpo_a": 2.5, "grpo_b": 2.0, "grpo_c": 3.0, "grpo_d-fp32": 2.0, "grpo_d-bf16": 2.0, "dpo_e": 1.4}
# Rewards, batching and collation take milliseconds
PHASES = {"generation": "#4c78a8", "reference": "#b279a2", "update": "#f58518"}
README = Path(__file__).parent / "README.md"
MARKS = ("<!-- results -->", "<!-- end of results -->")
FRONT_PAGE = README.parents[1] / "README.md"
FRONT_MARKS = ("<!-- benchmarks -->", "<!-- end of benchmarks -->")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def step_table(files: dict[str, dict]) -> str:
    lines = ["| workload | phase | TRL, s | papertrl, s | TRL / papertrl | target |", "|---|---|---|---|---|---|"]
    for name, file in files.items():
        summary = file["results"]["summary"]
        label = f"({name.split('_')[1]}) {file['results']['title']}"
        for phase in ("step", *(p for p in PHASES if p in summary["ratio"])):
            ratio = summary["ratio"][phase]
            bold = "**" if phase == "step" else ""
            cells = [f"{summary[side][phase]['median']:.2f}" for side in SIDES]
            times = f"{bold}{ratio['median']:.2f}×{bold} ({ratio['low']:.2f}–{ratio['high']:.2f})"
            target = f"{TARGETS[name]}×" if phase == "step" else ""
            lines.append(
                f"| {label if phase == 'step' else ''} | {phase} | {' | '.join(cells)} | {times} | {target} |"
            )
    lines += [
        "",
        "| workload | peak memory, TRL, MiB | papertrl, MiB | largest gradient difference | cores used by others |",
        "|---|---|---|---|---|",
    ]
    for name, file in files.items():
        summary = file["results"]["summary"]
        peaks = " | ".join(f"{summary[side]['peak_mib']:.0f}" for side in SIDES)
        difference = f"{summary['gradient_difference']:.1e}"
        lines.append(
            f"| ({name.split('_')[1]}) | {peaks} | {difference} | {file['machine']['cores_used_by_others']:.2f} |"
        )
    return "\n".join(lines)


def front_table(files: dict[str, dict]) -> str:
    """The few columns that the front page shows."""
    lines = [
        "| one optimizer step | TRL | papertrl | faster | peak memory, TRL | papertrl |",
        "|---|---|---|---|---|---|",
    ]
    for name, file in files.items():
        summary = file["results"]["summary"]
        times = " | ".join(f"{summary[side]['step']['median']:.2f} s" for side in SIDES)
        peaks = " | ".join(f"{summary[side]['peak_mib']:.0f} MiB" for side in SIDES)
        faster = f"**{summary['ratio']['step']['median']:.1f}×**"
        lines.append(f"| ({name.split('_')[1]}) {file['results']['title']} | {times} | {faster} | {peaks} |")
    return "\n".join(lines)


def scaling_table(file: dict) -> str:
    lines = [
        "| grows with | sizes | slope, TRL | slope, papertrl | slope of the needed positions |",
        "|---|---|---|---|---|",
    ]
    for axis, result in file["results"]["axes"].items():
        slopes = " | ".join(f"{result['slopes'][name]:.2f}" for name in (*SIDES, "ideal"))
        lines.append(f"| {axis} | {', '.join(map(str, result['sizes']))} | {slopes} |")
    return "\n".join(lines)


def method_table(file: dict) -> str:
    lines = [
        "| method | step, relative to its base | positions with gradient | without, policy | reference |",
        "|---|---|---|---|---|",
    ]
    for name, result in file["results"]["methods"].items():
        relative = result["relative"]
        cells = []
        for kind in ("gradient", "policy", "reference"):
            own, base = (result[key].get(f"{kind}_tokens", 0) for key in ("passes", "base_passes"))
            cells.append(f"{own}, base {base}")
        spread = f"{relative['median']:.2f} ({relative['low']:.2f}–{relative['high']:.2f})"
        lines.append(f"| `{name}` | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(files: dict[str, dict], scaling: dict | None) -> None:
    axes = scaling["results"]["axes"] if scaling else {}
    figure = plt.figure(figsize=(12, 8 if axes else 4.5), layout="constrained")
    rows = figure.subfigures(2 if axes else 1, 1)
    top = (rows[0] if axes else rows).subplots()
    for place, file in enumerate(files.values()):
        summary = file["results"]["summary"]
        whole = summary["trl"]["step"]["median"]
        for side, offset in zip(SIDES, (-0.19, 0.19), strict=True):
            bottom = 0.0
            for phase, color in PHASES.items():
                share = summary[side].get(phase, {"median": 0})["median"] / whole
                top.bar(place + offset, share, 0.34, bottom=bottom, color=color, alpha=1 if side == "ours" else 0.55)
                bottom += share
            text = f"{whole:.1f} s" if side == "trl" else f"{summary['ratio']['step']['median']:.1f}×"
            top.text(place + offset, bottom + 0.015, text, ha="center", weight="normal" if side == "trl" else "bold")
    top.set_xticks(range(len(files)), [f"({name.split('_')[1]})" for name in files])
    top.set_ylabel("time of a step, TRL = 1")
    top.set_ylim(0, 1.3)
    top.set_title("One optimizer step: TRL (left, pale) and papertrl (right) on the same completions")
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in PHASES.values()]
    top.legend(patches, PHASES, ncols=3, loc="upper right")
    if axes:
        for ax, (axis, result) in zip(rows[1].subplots(1, len(axes)), axes.items(), strict=True):
            for side, color in zip(SIDES, ("#888888", "#d62728"), strict=True):
                medians = [at["median"] for at in result["seconds"][side]]
                name = f"{'papertrl' if side == 'ours' else 'TRL'}: {result['slopes'][side]:.2f}"
                ax.loglog(result["sizes"], medians, "o-", color=color, label=name)
            ax.set_xticks(result["sizes"], result["sizes"])
            ax.minorticks_off()
            ax.set_title(f"{axis}; ideal slope {result['slopes']['ideal']:.2f}")
            ax.legend(title="slope")
        rows[1].supylabel("seconds per step")
    figure.savefig(RESULTS / "steps.png", dpi=130)


def main() -> None:
    files = {name: load(name) for name in TARGETS if (RESULTS / f"{name}.json").exists()}
    extra = {name: load(name) if (RESULTS / f"{name}.json").exists() else None for name in ("scaling", "methods")}
    plot(files, extra["scaling"])
    first = next(iter(files.values()))
    machine, versions = first["machine"], first["versions"]
    parts = [
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, {machine['memory_gib']} GiB; "
        + ", ".join(f"{name} {number}" for name, number in versions.items()),
        step_table(files),
    ]
    if extra["scaling"]:
        parts.append(scaling_table(extra["scaling"]))
    if extra["methods"]:
        parts.append(method_table(extra["methods"]))
    fill(README, MARKS, "\n\n".join(parts))
    fill(FRONT_PAGE, FRONT_MARKS, front_table(files))


def fill(page: Path, marks: tuple[str, str], text: str) -> None:
    head, rest = page.read_text(encoding="utf-8").split(marks[0])
    tail = rest.split(marks[1])[1]
    page.write_text(f"{head}{marks[0]}\n\n{text}\n\n{marks[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
