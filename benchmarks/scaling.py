"""
How the time of a GRPO step grows with group size, prompt length, completion length and number of prompts.

    python benchmarks/scaling.py

For each of them the slope of log time over log size, of both trainers, against the slope of the work that cannot be
avoided: the positions of each prompt once and of each completion.
"""

import harness
import numpy as np
import torch
from grpo_step import Workload, measure

BASE = {"G": 8, "P": 96, "C": 32, "prompts": 4}
SIZES = {"G": (2, 4, 8, 16), "P": (48, 96, 192, 384), "C": (16, 32, 64, 128), "prompts": (1, 2, 4, 8)}
PAIRS = {"defaults": 2, "off": 1}
# A median that no completion reaches: all have the longest length
NEVER = 1e9


def workload(point: dict[str, int]) -> Workload:
    rows = point["prompts"] * point["G"]
    return Workload(
        str(point),
        (point["P"], point["P"]),
        (NEVER, 0.5, point["C"]),
        groups=point["prompts"],
        group_size=point["G"],
        batch=min(8, rows),
    )


def needed_positions(point: dict[str, int]) -> int:
    return point["prompts"] * (point["P"] + point["G"] * point["C"])


def slope(sizes, values) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def slopes(axis: str, count: int) -> dict[str, dict]:
    """Seconds and slopes by what grows, under one axis of settings."""
    measured: dict[tuple, list[dict]] = {}
    results = {}
    for name, sizes in SIZES.items():
        points = [BASE | {name: size} for size in sizes]
        for point in points:
            key = tuple(point.values())
            if key not in measured:
                model, tokenizer = harness.random_model(harness.MODELS["llama"])
                measured[key] = measure(workload(point), model, tokenizer, harness.settings(axis), count)
        pairs = [measured[tuple(point.values())] for point in points]
        seconds = {
            side: [harness.spread([pair[side]["step"] for pair in at]) for at in pairs] for side in harness.SIDES
        }
        found = {side: slope(sizes, [at["median"] for at in seconds[side]]) for side in harness.SIDES}
        found["ideal"] = slope(sizes, [needed_positions(point) for point in points])
        results[name] = {"sizes": sizes, "seconds": seconds, "slopes": found, "pairs": pairs}
        medians = {side: [round(at["median"], 2) for at in seconds[side]] for side in harness.SIDES}
        print(f"{name:<8} {sizes}  trl {medians['trl']} s  ours {medians['ours']} s")
        print("         slopes: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
    return results


def main() -> None:
    parser = harness.arguments(__doc__)
    parser.add_argument("--axes", nargs="+", choices=harness.AXES, default=list(harness.AXES))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    axes = {}
    for axis in args.axes:
        print(f"\n{harness.AXIS_NAMES[axis]}", flush=True)
        axes[axis] = slopes(axis, args.pairs or PAIRS[axis])
        harness.write(args.output, "scaling", {"base": BASE, "axes": axes})


if __name__ == "__main__":
    main()
