"""The command `papertrl claims`."""

import argparse
import json
import shlex
from collections.abc import Callable
from pathlib import Path

from ..core.errors import UsageError
from ..core.parsing import CommandParser
from ..hub.scrubbing import scrub_command
from .claim import claimed, load_claim
from .result import panels, result, write_result
from .study import FRESH_SEEDS, Study

RESULTS = Path("claims/results")
USAGE = """\
usage: papertrl claims [METHOD ...] [flags]

Test whether papers' claims hold on small tasks. Every arm's grid is searched on development seeds; the verdict comes
from fresh ones, by the 95 % interval of the paired differences. A claim takes up to ten minutes on two CPU cores.
Stop it at any time: the same command goes on where it was.

  METHOD ...          methods whose claims are run (default: all that have one)
  --seeds N           fresh seeds (default: 5)
  --first_seed K      first of the fresh seeds (default: 0)
  --jobs K            processes at a time (default: 2)
  --model NAME        start from this model (`smollm2`, Hub id, folder) instead of the tiny one
  --output_dir DIR    where results and plots go (default: claims/results)
  --work_dir DIR      where the runs themselves are kept, with their curves (default: runs/claims)
  --quick             three steps a run and one seed, to see that the claims still run; no verdict
  --list              list claims and their verdicts
"""


def main(argv: list[str]) -> int:
    """
    Run claims and write their results.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl claims`.

    Raises:
        [`~papertrl.core.errors.UsageError`]: for a wrong argument.
        [`~papertrl.core.errors.JobError`]: if a run fails.
    """
    parser = CommandParser(prog="papertrl claims", add_help=False)
    seeds_of = add_run_flags(parser, seeds=5)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args(argv)
    if args.help:
        print(USAGE, end="")
        return 0
    claims = [load_claim(name) for name in args.methods or claimed()]
    if args.list:
        for claim in claims:
            print(f"{claim.method:<12} {verdict_of(args.output_dir, claim.method):<10} {claim.statement}")
        return 0
    seeds = seeds_of(args)
    for claim in claims:
        study = Study(claim, args.work_dir, args.model, args.quick, args.jobs)
        outcome = run(study, seeds, ["papertrl", "claims", *map(shlex.quote, scrub_command(argv, ()))])
        save(outcome, args.output_dir)
        print(report(outcome, args.output_dir))
    return 0


def add_run_flags(parser: argparse.ArgumentParser, seeds: int) -> Callable[[argparse.Namespace], range]:
    """
    Add the flags of commands that make runs.

    Args:
        parser (`argparse.ArgumentParser`):
            Parser of the command.
        seeds (`int`):
            Default number of seeds.

    Returns:
        Parsed arguments → seeds. It also makes the output directory, another one with `--quick` unless one is given.
    """
    parser.add_argument("methods", nargs="*")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--first_seed", "--first-seed", type=int, default=FRESH_SEEDS[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--output_dir", "--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--work_dir", "--work-dir", type=Path, default=Path("runs/claims"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    return _seeds


def _seeds(args: argparse.Namespace) -> range:
    if args.seeds < 1:
        raise UsageError(f"`--seeds` must be at least 1, got {args.seeds}.")
    if args.jobs < 1:
        raise UsageError(f"`--jobs` must be at least 1, got {args.jobs}.")
    seeds = range(args.first_seed, args.first_seed + (1 if args.quick else args.seeds))
    if seeds[0] not in FRESH_SEEDS or seeds[-1] not in FRESH_SEEDS:
        raise UsageError(
            f"`--first_seed` and `--seeds` must stay in [{FRESH_SEEDS[0]}, {FRESH_SEEDS[-1]}], got {seeds[0]} to "
            f"{seeds[-1]}: later seeds are for development."
        )
    if args.quick and args.output_dir == RESULTS:
        args.output_dir = Path("runs/claims/quick")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    return seeds


def run(study: Study, seeds: range, command: list[str]) -> dict:
    """Tune, compare and judge; what is written to the result file."""
    tuning = study.tune()
    runs = study.compare(tuning, seeds)
    return result(study, tuning, runs, command) | {"plot": panels(study.claim, runs)}


def save(outcome: dict, output_dir: Path) -> None:
    """Write result and plot."""
    from .plot import draw

    write_result(output_dir / f"{outcome['method']}.json", outcome)
    draw(outcome, output_dir / f"{outcome['method']}.png")


def verdict_of(output_dir: Path, method: str) -> str:
    """Verdict in a method's result file."""
    path = output_dir / f"{method}.json"
    return json.loads(path.read_text(encoding="utf-8"))["verdict"] if path.exists() else "not run"


def report(outcome: dict, output_dir: Path) -> str:
    """What the command prints of a result."""
    lines = [f"{outcome['method']}: {'ran' if outcome['quick'] else outcome['verdict'].upper()}"]
    for c in outcome["comparisons"]:
        guards = "".join(
            f"; {name} {'kept' if guard['holds'] else 'NOT kept'}: {guard['mean']:+.3g} (margin {guard['margin']:g})"
            for name, guard in c["guards"].items()
        )
        lines.append(
            f"  {c['arm']} against {c['against']}, {c['metric']}: {c['mean']:+.4g} [{c['low']:+.4g}, {c['high']:+.4g}]"
            f", smallest effect {c['smallest_effect']:g}, {c['direction']} is better: {c['verdict']}{guards}"
        )
    lines.append(f"  {outcome['minutes']} minutes; {output_dir / outcome['method']}.json and .png")
    return "\n".join(lines)
