"""
How the time of a GRPO step grows with group size, prompt length, completion length and number of prompts.

    python benchmarks/scaling.py

For each axis the slope of log time over log size, of both trainers, against the slope of the work that cannot be
avoided: the positions of each prompt once and of each completion.
"""

import tempfile
from functools import partial

import harness
import numpy as np
import torch
from grpo_step import Workload, make_steppers, step_pair

BASE = {"G": 8, "P": 96, "C": 32, "prompts": 4}
AXES = {"G": (2, 4, 8, 16), "P": (48, 96, 192, 384), "C": (16, 32, 64, 128), "prompts": (1, 2, 4, 8)}
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


def measure(point: dict[str, int], count: int) -> list[dict]:
    work = workload(point)
    model, tokenizer = harness.random_model()
    texts = harness.prompts((count + 1) * work.groups, *work.prompt)
    with tempfile.TemporaryDirectory() as folder:
        steppers = make_steppers(work, model, tokenizer, texts, folder)
        return harness.run_pairs(partial(step_pair, work, steppers), count)


def main() -> None:
    parser = harness.arguments(__doc__, pairs=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {"base": BASE, "axes": {}}
    measured: dict[tuple, list[dict]] = {}
    for axis, sizes in AXES.items():
        points = [BASE | {axis: size} for size in sizes]
        for point in points:
            key = tuple(point.values())
            if key not in measured:
                measured[key] = measure(point, args.pairs)
        pairs = [measured[tuple(point.values())] for point in points]
        seconds = {
            side: [harness.spread([pair[side]["step"] for pair in at]) for at in pairs] for side in harness.SIDES
        }
        slopes = {side: slope(sizes, [at["median"] for at in seconds[side]]) for side in harness.SIDES}
        slopes["ideal"] = slope(sizes, [needed_positions(point) for point in points])
        results["axes"][axis] = {"sizes": sizes, "seconds": seconds, "slopes": slopes, "pairs": pairs}
        medians = {side: [round(at["median"], 2) for at in seconds[side]] for side in harness.SIDES}
        print(f"{axis:<8} {sizes}  trl {medians['trl']} s  ours {medians['ours']} s")
        print("         slopes: " + ", ".join(f"{name} {value:.2f}" for name, value in slopes.items()), flush=True)
    harness.write(args.output, "scaling", results)


if __name__ == "__main__":
    main()
