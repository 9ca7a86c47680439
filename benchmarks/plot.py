"""
The tables in `benchmarks/README.md` and on the front page, and `results/steps.png`, from the results.

    python benchmarks/plot.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from grpo_step import WORKLOADS
from harness import AXIS_NAMES, RESULTS, SIDES

NAMES = sorted([f"grpo_{name}" for name in WORKLOADS] + ["dpo_e"], key=lambda name: name.split("_")[1])
# With TRL's defaults, by the letter of the workload: TRL's time over ours, and those that need half of the memory
TARGETS = {"a": 4, "b": 3.5, "c": 4.5, "d": 3.5, "e": 4, "f": 3.5, "g": 3}
HALF_MEMORY = "acde"
LARGEST_DIFFERENCE = 1e-5
# By how much a slope may exceed that of the needed positions
SLOPE_MARGIN = 0.05
# Rewards, batching and collation take milliseconds
PHASES = {"generation": "#4c78a8", "reference": "#b279a2", "update": "#f58518"}
README = Path(__file__).parent / "README.md"
MARKS = ("<!-- results -->", "<!-- end of results -->")
FRONT_PAGE = README.parents[1] / "README.md"
FRONT_MARKS = ("<!-- benchmarks -->", "<!-- end of benchmarks -->")


def load(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def axis_files(files: dict[str, dict], axis: str) -> dict[str, tuple[str, dict, dict]]:
    """Label, summary and machine of the workloads that were measured under an axis."""
    return {
        name: (f"({name.split('_')[1]}) {file['results']['title']}", axes[axis]["summary"], file["machine"])
        for name, file in files.items()
        if axis in (axes := file["results"]["axes"])
    }


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"


def step_table(files: dict[str, dict], axis: str, judged: bool) -> str:
    """Times, then memory and gradients; `judged` with targets."""
    columns = ["workload", "phase", "TRL, s", "papertrl, s", "limit, s", "TRL / papertrl", *["target"] * judged]
    lines = header(columns)
    more = ["workload", "peak memory, TRL, MiB", "papertrl, MiB", "share", "largest gradient difference"]
    more += ["tokens/s, TRL", "papertrl", "cores used by others"]
    others = ["", *header(more)]
    for name, (label, summary, machine) in axis_files(files, axis).items():
        letter = name.split("_")[1][0]
        for phase in ("step", *(p for p in PHASES if p in summary["ratio"])):
            ratio, first = summary["ratio"][phase], phase == "step"
            times = [f"{summary[side][phase]['median']:.2f}" for side in SIDES] + [f"{summary['limit'][phase]:.2f}"]
            bold = "**" if first else ""
            times.append(f"{bold}{ratio['median']:.2f}×{bold} ({ratio['low']:.2f}–{ratio['high']:.2f})")
            target = TARGETS.get(letter) if first else None
            aim = "" if target is None else f"≥ {target}×, {verdict(ratio['median'] >= target)}"
            lines.append(row([label if first else "", phase, *times, *[aim] * judged]))
        peaks, difference = [summary[side]["peak_mib"] for side in SIDES], summary["gradient_difference"]
        share, shown = f"{peaks[1] / peaks[0]:.2f}", f"{difference:.1e}"
        if judged and letter in HALF_MEMORY:
            share += f" (≤ 0.5, {verdict(peaks[1] <= peaks[0] / 2)})"
        if judged and name != "grpo_d-bf16":
            shown += f" (≤ 1e-5, {verdict(difference <= LARGEST_DIFFERENCE)})"
        rates = [f"{summary[side]['tokens_per_second']:.0f}" for side in SIDES]
        load = f"{machine['cores_used_by_others']:.2f}"
        cells = [f"({name.split('_')[1]})", *(f"{peak:.0f}" for peak in peaks), share, shown, *rates, load]
        others.append(row(cells))
    return "\n".join(lines + others)


def header(columns: list[str]) -> list[str]:
    return [row(columns), "|" + "---|" * len(columns)]


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def front_table(files: dict[str, dict]) -> str:
    """The few columns that the front page shows."""
    columns = ["one optimizer step, TRL's defaults", "TRL", "papertrl", "faster"]
    columns += ["peak memory, TRL", "papertrl", "faster without gradient checkpointing"]
    lines = header(columns)
    off = axis_files(files, "off")
    for name, (label, summary, _) in axis_files(files, "defaults").items():
        times = [f"{summary[side]['step']['median']:.2f} s" for side in SIDES]
        peaks = [f"{summary[side]['peak_mib']:.0f} MiB" for side in SIDES]
        faster = f"**{summary['ratio']['step']['median']:.1f}×**"
        without = f"{off[name][1]['ratio']['step']['median']:.1f}×" if name in off else ""
        lines.append(row([label, *times, faster, *peaks, without]))
    return "\n".join(lines)


def scaling_table(found: dict) -> str:
    columns = ["grows with", "sizes", "slope, TRL", "slope, papertrl", "slope of the needed positions"]
    columns.append(f"at most {SLOPE_MARGIN} above it")
    lines = header(columns)
    for name, result in found.items():
        slopes = result["slopes"]
        cells = [f"{slopes[key]:.2f}" for key in (*SIDES, "ideal")]
        met = slopes["ours"] <= slopes["ideal"] + SLOPE_MARGIN
        lines.append(row([name, ", ".join(map(str, result["sizes"])), *cells, verdict(met)]))
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


def plot_steps(ax, files: dict[str, dict], axis: str) -> None:
    for place, (_, summary, _) in enumerate(axis_files(files, axis).values()):
        whole = summary["trl"]["step"]["median"]
        for side, offset in zip(SIDES, (-0.19, 0.19), strict=True):
            bottom = 0.0
            for phase, color in PHASES.items():
                share = summary[side].get(phase, {"median": 0})["median"] / whole
                ax.bar(place + offset, share, 0.34, bottom=bottom, color=color, alpha=1 if side == "ours" else 0.55)
                bottom += share
            text = f"{whole:.1f} s" if side == "trl" else f"{summary['ratio']['step']['median']:.1f}×"
            ax.text(place + offset, bottom + 0.015, text, ha="center", weight="normal" if side == "trl" else "bold")
        limit = summary["limit"]["step"] / whole
        ax.plot([place + 0.02, place + 0.36], [limit, limit], color="black", linewidth=1.5)
    labels = [label.split()[0] for label, *_ in axis_files(files, axis).values()]
    ax.set_xticks(range(len(labels)), labels)
    ax.set_ylabel("time of a step, TRL = 1")
    ax.set_ylim(0, 1.3)
    ax.set_title(f"One optimizer step, {AXIS_NAMES[axis]}: TRL (left, pale) and papertrl (right; line: limit)")
    patches = [plt.Rectangle((0, 0), 1, 1, color=color) for color in PHASES.values()]
    ax.legend(patches, PHASES, ncols=3, loc="upper right")


def plot_scaling(figure, found: dict, axis: str) -> None:
    for ax, (name, result) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        for side, color in zip(SIDES, ("#888888", "#d62728"), strict=True):
            medians = [at["median"] for at in result["seconds"][side]]
            label = f"{'papertrl' if side == 'ours' else 'TRL'}: {result['slopes'][side]:.2f}"
            ax.loglog(result["sizes"], medians, "o-", color=color, label=label)
        ax.set_xticks(result["sizes"], result["sizes"])
        ax.minorticks_off()
        ax.set_title(f"{name}; ideal slope {result['slopes']['ideal']:.2f}")
        ax.legend(title="slope")
    figure.supylabel("seconds per step")
    figure.suptitle(f"Growth, {AXIS_NAMES[axis]}")


def plot(files: dict[str, dict], scaling: dict[str, dict]) -> None:
    """Steps under every axis, then their growth under every axis."""
    measured = [axis for axis in AXIS_NAMES if axis_files(files, axis)]
    grown = [axis for axis in AXIS_NAMES if axis in scaling]
    figure = plt.figure(figsize=(12, 4 * (len(measured) + len(grown))), layout="constrained")
    parts = iter(figure.subfigures(len(measured) + len(grown), 1, squeeze=False).flat)
    for axis in measured:
        plot_steps(next(parts).subplots(), files, axis)
    for axis in grown:
        plot_scaling(next(parts), scaling[axis], axis)
    figure.savefig(RESULTS / "steps.png", dpi=110)


def origin(file: dict) -> str:
    machine, versions = file["machine"], file["versions"]
    cores = (
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, {machine['memory_gib']} GiB; "
    )
    return (f"{machine['gpu']}; " if machine["gpu"] else "") + cores + ", ".join(map(" ".join, versions.items()))


def main() -> None:
    files = {name: load(name) for name in NAMES if (RESULTS / f"{name}.json").exists()}
    extra = {name: load(name) if (RESULTS / f"{name}.json").exists() else None for name in ("scaling", "methods")}
    scaling = extra["scaling"]["results"]["axes"] if extra["scaling"] else {}
    gpu = {path.stem: load(path.stem) for path in sorted(RESULTS.glob("gpu_*.json"))}
    gpu = {name: file for name, file in gpu.items() if file["results"]["model"] != "small"}
    plot(files, scaling)
    parts = [origin(next(iter(files.values())))]
    for axis, name in AXIS_NAMES.items():
        if axis_files(files, axis):
            parts += [f"### {name[0].upper()}{name[1:]}", step_table(files, axis, judged=axis == "defaults")]
        if axis in scaling:
            parts.append(scaling_table(scaling[axis]))
    if gpu:
        first = next(iter(gpu.values()))
        parts += [f"### On a GPU, {first['results']['model']}", origin(first), step_table(gpu, "defaults", False)]
    if extra["methods"]:
        parts += ["### Methods", method_table(extra["methods"])]
    fill(README, MARKS, "\n\n".join(parts))
    fill(FRONT_PAGE, FRONT_MARKS, front_table(files))


def fill(page: Path, marks: tuple[str, str], text: str) -> None:
    head, rest = page.read_text(encoding="utf-8").split(marks[0])
    tail = rest.split(marks[1])[1]
    page.write_text(f"{head}{marks[0]}\n\n{text}\n\n{marks[1]}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
