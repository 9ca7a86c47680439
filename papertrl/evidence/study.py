"""A claim's runs, all of them: tuning on development seeds, then the comparison on fresh ones."""

import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from ..core.errors import JobError
from .claim import Claim, load_claim
from .comparison import value

# Grids are searched on the first range, verdicts come from the second, and nothing else decides which
DEVELOPMENT_SEEDS = range(1000, 1002)
FRESH_SEEDS = range(0, 1000)
PACKAGES = ("papertrl", "torch", "transformers", "trl", "accelerate", "datasets")


@dataclass(frozen=True)
class Plan:
    """One run to make: an arm, a point of its grid, a seed."""

    arm: str
    choice: dict[str, Any]
    seed: int


@dataclass(frozen=True)
class Study:
    """
    How a claim is run.

    Args:
        claim ([`Claim`]):
            What is tested.
        work_dir (`Path`):
            Where finished runs are kept, so that an interrupted study goes on where it was.
        model (`str`, *optional*):
            Model to start from instead of the tiny one.
        short (`bool`, *optional*, defaults to `False`):
            Whether runs are cut to three steps and the grid to its first point, to see that the claim still runs.
        jobs (`int`, *optional*, defaults to `1`):
            Processes at a time.
        quiet (`bool`, *optional*, defaults to `False`):
            Whether to show no progress bar.
    """

    claim: Claim
    work_dir: Path
    model: str | None = None
    short: bool = False
    jobs: int = 1
    quiet: bool = False

    def tune(self) -> dict[str, dict[str, Any]]:
        """
        Search every arm's grid on the development seeds.

        Returns:
            `dict`: by arm, the `scores` (mean of the claim's `tune_on` over the seeds) of each of its `choices`, the
                best one, `chosen`, and the `seconds` that this took.
        """
        arms = self.claim.arms
        if self.short or all(len(arm.choices()) == 1 for arm in arms.values()):
            return {
                label: {"choices": [], "scores": [], "chosen": arm.choices()[0], "seconds": 0.0}
                for label, arm in arms.items()
            }
        plans = [
            Plan(label, choice, seed)
            for seed in DEVELOPMENT_SEEDS
            for label, arm in arms.items()
            for choice in arm.choices()
        ]
        runs = self.run(plans, "tuning")
        metric, tuning = self.claim.tune_on, {}
        for label, arm in arms.items():
            choices = arm.choices()
            scores = [
                fmean(value(run, metric) for run in runs if run["arm"] == label and run["choice"] == choice)
                for choice in choices
            ]
            best = max(range(len(choices)), key=lambda i: metric.sign * scores[i])
            seconds = sum(run["total_seconds"] for run in runs if run["arm"] == label)
            tuning[label] = {"choices": choices, "scores": scores, "chosen": choices[best], "seconds": seconds}
        return tuning

    def compare(self, tuning: dict[str, dict[str, Any]], seeds: Iterable[int]) -> list[dict[str, Any]]:
        """Run every arm, as tuned, on each of the seeds."""
        return self.run(
            [Plan(label, tuning[label]["chosen"], seed) for seed in seeds for label in self.claim.arms], "comparison"
        )

    def run(self, plans: list[Plan], stage: str) -> list[dict[str, Any]]:
        """
        Make runs, or read those that are there.

        Raises:
            [`~papertrl.core.errors.JobError`]: if a run fails; the others' results are kept.
        """
        done = {
            i: json.loads(path.read_text(encoding="utf-8"))
            for i, plan in enumerate(plans)
            if (path := self._file(plan)).exists()
        }
        missing = [i for i in range(len(plans)) if i not in done]
        bar = tqdm(
            total=len(plans),
            initial=len(done),
            desc=f"{self.claim.method}: {stage}",
            unit="run",
            disable=self.quiet,
        )
        with bar:
            for i, outcome in self._execute(plans, missing):
                done[i] = outcome
                bar.update()
        return [done[i] for i in range(len(plans))]

    def _execute(self, plans: list[Plan], missing: list[int]):
        if self.jobs == 1 or len(missing) < 2:
            for i in missing:
                yield i, self._make(plans[i])
            return
        # A fresh process for every worker: torch's thread pools do not survive a fork
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.jobs, len(missing)), mp_context=context) as pool:
            futures = {pool.submit(self._make, plans[i]): i for i in missing}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _make(self, plan: Plan) -> dict[str, Any]:
        from .run import train

        started = time.perf_counter()
        try:
            measured = train(self.claim, plan.arm, plan.choice, plan.seed, self.model, self.short)
        except Exception as error:
            raise JobError(
                f"Claim '{self.claim.method}': arm '{plan.arm}' with {plan.choice} and seed {plan.seed} failed "
                f"({type(error).__name__}: {' '.join(str(error).split())[:300]}). Finished runs are kept in "
                f"'{self.work_dir}'; the same command goes on from there."
            ) from error
        outcome = {**dataclasses.asdict(plan), "total_seconds": time.perf_counter() - started, **measured}
        path = self._file(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(outcome), encoding="utf-8")
        partial.replace(path)
        return outcome

    def _file(self, plan: Plan) -> Path:
        """Where a run is kept: the name depends on all that determines it."""
        claim = self.claim
        arm = claim.arms[plan.arm]
        parts = [
            plan.choice, self.model, self.short, arm.methods, arm.settings, claim.settings, claim.task,
            claim.task_kwargs, dataclasses.astuple(claim.start), claim.train_problems, claim.held_out,
            claim.evaluations, claim.logs, [metric.name for metric in claim.metrics()],
            [_source(f) for f in (arm.control, claim.data, *claim.measures)], versions(),
            *([claim.trainer_kwargs] if claim.trainer_kwargs else []),
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(parts, default=str, sort_keys=True).encode()).hexdigest()[:16]
        return self.work_dir / claim.method / f"{plan.arm.replace(' ', '_').replace('/', '_')}-{plan.seed}-{key}.json"

    def __reduce__(self):
        # Claims hold functions of their module; a worker imports it instead
        if self.claim is not load_claim(self.claim.method):
            raise TypeError(f"Claim '{self.claim.method}' is not the one in `papertrl.claims`; run it with `jobs=1`.")
        return _study_of, (self.claim.method, *(getattr(self, f.name) for f in dataclasses.fields(self)[1:]))


def _study_of(method: str, *rest: Any) -> Study:
    return Study(load_claim(method), *rest)


def _source(function: Callable | None) -> str | None:
    return function and inspect.getsource(function)


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
