"""`papertrl overoptimization`: true reward and proxy of every preference method, against divergence from the start."""

import argparse
import json
import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from peft import LoraConfig

from ..core.catalogue import METHODS, load_trainer
from ..core.errors import UsageError
from ..core.family import PREFERENCE
from ..core.parsing import CommandParser
from ..hub.scrubbing import scrub_command
from .claim import Arm, Claim, Comparison, Metric, Start
from .command import add_run_flags
from .plot import save
from .probe import Probe, kl_to_start
from .result import result, rounded, write_result
from .study import Study
from .verdict import Interval, interval

NAME = "overoptimization"
FAMILY = PREFERENCE
USAGE = """\
usage: papertrl overoptimization [METHOD ...] [flags]

Train every preference method on a proxy of a known true reward, and draw both against the divergence from the start
model. Offline methods get pairs labeled by the proxy, online ones have their samples judged by it. Stop it at any
time: the same command goes on where it was.

  METHOD ...          methods beside DPO (default: all of the preference family)
  --seeds N           seeds (default: 3)
  --first_seed K      first of the seeds (default: 0)
  --jobs K            processes at a time (default: 2)
  --model NAME        start from this model (`smollm2`, Hub id, folder) instead of the tiny one
  --output_dir DIR    where result and plot go (default: claims/results)
  --work_dir DIR      where the runs themselves are kept, with their curves (default: runs/claims)
  --quick             three steps a run and one seed, to see that it still runs
"""

TRUE = Metric("true")
SHARED = {"per_device_train_batch_size": 32, "max_steps": 160, "learning_rate": 2e-4, "beta": 0.1}
ONLINE = {
    "online_iterations": 4,
    "online_num_prompts": 640,
    "online_num_samples": 4,
    "online_max_new_tokens": 11,
    "online_batch_size": 640,
}
# By method, what differs from the above, in the direction of its recipe; a method without an entry takes the above
SETTINGS: dict[str, dict[str, Any]] = {
    "ln_dpo": {"beta": 1.0},
    "rpo": {"rpo_aggregation": "sequence_mean"},
    "hypo": {"hypo_kl_coef": 0.05, "hypo_kl_num_samples": 2, "hypo_kl_max_new_tokens": 11},
    "drift": {"online_num_samples": 1, "drift_text_template": "{prompt}{rejected} {feedback}:"},
    "xpo": {"online_num_samples": 1, "xpo_alpha": [0.005, 0.002, 0.0]},
    "rso": {"online_iterations": 1, "online_num_samples": 16, "rso_num_samples": 4, "rso_dedup": False, "beta": 0.5},
    "sem_dpo": {"sem_encoder": "characters"},
    "irpo": {"irpo_layout": "separate", "learning_rate": 1e-4},
    "srpo": {"srpo_revision_template": "{prompt}{answer}="},
    "upo": {"upo_estimator_learning_rate": 1e-3, "learning_rate": 5e-5},
    "ofs_dpo": {"ofs_chasing_interval": 10, "learning_rate": 3e-4},
}


def with_adapter(trainer_class: type) -> type:
    """The trainer on a LoRA of rank 8."""

    class WithAdapter(trainer_class):
        def __init__(self, *args, **kwargs):
            adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
            super().__init__(*args, peft_config=adapter, **kwargs)

    return WithAdapter


CONTROLS = {"ofs_dpo": with_adapter}
# Without a method: as a control, and with a stronger pull to the reference, which is the cheapest remedy
PLAIN = {"DPO": Arm(), "DPO, β = 0.5": Arm(settings={"beta": 0.5}), "DPO, online": Arm(settings=ONLINE)}
MARKERS = "osD^v<>Pphd*X8"


class OverOptimization(Claim):
    """The experiment: arms like a claim's, without a verdict."""

    family = FAMILY


class OverOptimizationStudy(Study):
    """The experiment's runs."""

    def __reduce__(self):
        # The experiment holds functions; a worker makes it anew
        fields = (self.work_dir, self.model, self.short, self.jobs, self.quiet)
        return _study_of, (tuple(label for label in self.claim.arms if label not in PLAIN), *fields)


def _study_of(methods: tuple[str, ...], *rest: Any) -> OverOptimizationStudy:
    return OverOptimizationStudy(experiment(methods), *rest)


def experiment(methods: tuple[str, ...]) -> OverOptimization:
    """The experiment with these methods beside plain DPO."""
    arms = {**PLAIN, **{name: Arm((name,), _settings(name), control=CONTROLS.get(name)) for name in methods}}
    return OverOptimization(
        method=NAME,
        statement="A policy that is trained on a proxy of what is wanted may gain at first, then lose while the proxy "
        "rises on.",
        figures="",
        check="Words that must contain a marker, whose letters beyond four cost more than they are worth; the proxy "
        "pays for every letter.",
        task="marker",
        task_kwargs={
            "train_on": "proxy",
            "letters": 6,
            "max_length": 10,
            "cost": 0.08,
            "proxy_bias": 0.13,
            "feedback_share": 0.2,
        },
        settings=SHARED,
        arms=arms,
        comparisons=tuple(Comparison(label, "DPO", TRUE, 0.0) for label in arms if label != "DPO"),
        tune_on=TRUE,
        measures=(rewards, kl_to_start),
        start=Start(error_share=0.2),
        held_out=128,
        evaluations=8,
    )


def _settings(method: str) -> dict[str, Any]:
    trainer = load_trainer(method)
    stages = list(trainer.stages)
    rounds = stages[stages.index("choose_prompts") : stages.index("prepare")]
    online = ONLINE if {*trainer.extends, *trainer.replaces} & set(rounds) else {}
    return {**online, **SETTINGS.get(method, {})}


def rewards(probe: Probe) -> dict[str, float]:
    """`true` and `proxy`: mean rewards of four completions a prompt, at temperature 1."""
    by_name = {"true": probe.task.true_reward, "proxy": probe.task.proxy_reward}
    return {name: fmean(probe.scores(samples=4, reward=reward)) for name, reward in by_name.items()}


# --- Command line ---------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """
    Run the experiment and write its result.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl overoptimization`.

    Raises:
        [`~papertrl.core.errors.UsageError`]: for a wrong argument.
        [`~papertrl.core.errors.JobError`]: if a run fails.
    """
    parser = CommandParser(prog="papertrl overoptimization", add_help=False)
    seeds_of = add_run_flags(parser, seeds=3)
    args = parser.parse_args(argv)
    if args.help:
        print(USAGE, end="")
        return 0
    methods = chosen_methods(args)
    seeds = seeds_of(args)
    study = OverOptimizationStudy(experiment(methods), args.work_dir, args.model, args.quick, args.jobs)
    tuning = study.tune()
    runs = study.compare(tuning, seeds)
    outcome = result(study, tuning, runs, ["papertrl", NAME, *map(shlex.quote, scrub_command(argv, ()))])
    for without in ("verdict", "tuning", "tuned_on", "development_seeds", "figures"):
        del outcome[without]
    outcome["curves"] = curves(runs)
    write_result(args.output_dir / f"{NAME}.json", outcome)
    draw(outcome, args.output_dir / f"{NAME}.png")
    print(f"{table(outcome)}\n{outcome['minutes']} minutes; {args.output_dir / NAME}.json and .png")
    return 0


def chosen_methods(args: argparse.Namespace) -> tuple[str, ...]:
    """
    Methods to run, in the catalogue's order.

    Raises:
        [`~papertrl.core.errors.UsageError`]: if one is not of the preference family.
    """
    family = [name for name, family in METHODS.items() if family == FAMILY.name]
    asked = [name.lower().replace("-", "_") for name in args.methods]
    unknown = [name for name in asked if name not in family]
    if unknown:
        raise UsageError(
            f"`METHOD` must be one of the {FAMILY.name} family ({', '.join(family)}), got '{unknown[0]}'."
        )
    return tuple(name for name in family if not asked or name in asked)


# --- Result ---------------------------------------------------------------------------------------------------------


def curves(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[list[float]]]]:
    """By arm, what was measured of `kl`, `true` and `proxy`: one curve per seed each."""
    by_arm: dict[str, dict[str, list[list[float]]]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        for name, of_seeds in by_arm.setdefault(run["arm"], {"kl": [], "true": [], "proxy": []}).items():
            of_seeds.append([point[name] for point in run["points"]])
    return rounded(by_arm)


def lost(outcome: dict[str, Any], arm: str) -> Interval:
    """What the true reward has lost at the end against its best, over the seeds; the best is the luckiest of nine."""
    true = np.array(outcome["curves"][arm]["true"])
    return interval([float(d) for d in true.max(1) - true[:, -1]])


def table(outcome: dict[str, Any]) -> str:
    """One row per arm: where it ends, and what the true reward was worth on the way; means over the seeds."""
    rows = [
        "| method | pairs | KL at the end | proxy | true | best true | at KL | lost since | true against DPO |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    against = {c["arm"]: c for c in outcome["comparisons"]}
    for arm, settings in outcome["settings"]["arms"].items():
        kl, true, proxy = (np.array(outcome["curves"][arm][name]) for name in ("kl", "true", "proxy"))
        best = true.argmax(1)
        difference = Interval(*(against[arm][key] for key in ("mean", "low", "high"))) if arm in against else ""
        rows.append(
            f"| {arm} | {'online' if settings.get('online_iterations') else 'offline'} | {kl[:, -1].mean():.2f} "
            f"| {proxy[:, -1].mean():.3f} | {true[:, -1].mean():.3f} | {true.max(1).mean():.3f} "
            f"| {kl[np.arange(len(kl)), best].mean():.2f} | {lost(outcome, arm).mean:.3f} | {difference} |"
        )
    return "\n".join(rows)


def section(outcome: dict[str, Any]) -> str:
    """The experiment as a section of the page of evidence."""
    arms = outcome["curves"].values()
    start = {name: fmean(curve[0] for arm in arms for curve in arm[name]) for name in ("true", "proxy")}
    return "\n\n".join(
        [
            f"{outcome['statement']} {outcome['check']} All methods start from the same model (true reward "
            f"{start['true']:.3f}, proxy {start['proxy']:.3f}). Offline methods learn from pairs labeled by the "
            "proxy, online ones from their own samples, judged by it. One setting per method, near its recipe, not "
            "tuned for reward: the plot shows paths, not which method is best. Where a first one let a method break "
            "down, losing the proxy as well (`irpo`, `ofs_dpo`, `upo`, `rso`), its rate was lowered on a development "
            "seed, or its β raised to the recipe's.",
            table(outcome),
            f"Means over {len(outcome['seeds'])} seeds; the last column with Student's 95 % interval of the paired "
            f"differences at the end. KL is that of whole answers to the start model, in nats. The best of the nine "
            f"measurements is the luckiest as well, so that a loss of a few hundredths is noise. "
            f"`{outcome['command']}`, {outcome['minutes']:g} minutes.",
            f"![{NAME}](../claims/results/{NAME}.png)",
        ]
    )


def draw(outcome: dict[str, Any], path: Path) -> None:
    """Draw true reward and proxy against KL, one line per arm: the mean over seeds of every measurement."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for i, (arm, settings) in enumerate(outcome["settings"]["arms"].items()):
        means = {name: np.mean(values, 0) for name, values in outcome["curves"][arm].items()}
        online = bool(settings.get("online_iterations"))
        style = {"ls": "--" if online else "-", "marker": MARKERS[i % len(MARKERS)], "ms": 4, "lw": 1.3}
        # Plain DPO is what the others are held against
        style |= {"color": "black", "lw": 2.2} if arm == "DPO" else {"color": f"C{i}" if i < 10 else f"C{i - 10}"}
        for axis, name in zip(axes, ("true", "proxy"), strict=True):
            axis.plot(np.maximum(means["kl"], 0), means[name], label=arm, **style)
    for axis, title in zip(axes, ("True reward", "Proxy, which is trained on"), strict=True):
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlim(left=0)
        axis.set_xlabel("KL to the start model, nats per answer (square-root scale)")
        axis.set_title(title, fontsize=11)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=9, title="dashed: online")
    figure.suptitle(f"Over-optimization, mean of {len(outcome['seeds'])} seeds", fontsize=12)
    save(figure, path)


def read(folder: Path) -> dict[str, Any] | None:
    """The result in a folder, or `None` if it has not been measured."""
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
