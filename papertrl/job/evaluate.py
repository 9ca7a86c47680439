"""The command `papertrl evaluate`."""

import argparse
import difflib
import hashlib
import json
import math
import shlex
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..core.errors import JobError, UsageError
from ..core.lock import refuse_if_owned
from ..core.parsing import CommandParser
from ..data import as_messages
from ..data.messages import as_completion
from ..evaluation.measure import Answered, measures, table
from ..evaluation.models import Loaded, base_of, load_model, short_names
from ..evaluation.report import draw, markdown
from ..evaluation.sampling import complete, completion_logps
from ..hub.files import EVALUATION_COMPLETIONS, EVALUATION_FILE, EVALUATION_PLOT, EVALUATION_REPORT
from ..hub.scrubbing import scrub
from ..metrics import METRICS
from ..models.tokenization import template_options, tokenize_prompt
from ..rewards import call_rewards
from .evaluated import Evaluated, make_evaluated, run_of

NEEDS_REFERENCES = ("exact_match", "bleu")
NEEDS_SAMPLES = ("pass_at_k", "mean_at_k")


def make_parser() -> argparse.ArgumentParser:
    """Parser of `papertrl evaluate`."""
    parser = CommandParser(
        prog="papertrl evaluate",
        description="Let models answer held-out prompts, score the answers, and compare the models with 95 % "
        "bootstrap intervals over prompts. Completions of a finished model are kept and used again.",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folder, model, adapter, Hub id or `smollm2`")
    data = parser.add_argument_group("data")
    data.add_argument("--task", help="procedural task (default: that of the run; of a model, `addition`)")
    data.add_argument("--task_kwargs", type=_json, help="settings of the task as JSON")
    data.add_argument(
        "--dataset_name", help="dataset instead of a task: Hub id, folder or file (default: that of the run)"
    )
    data.add_argument("--dataset_config", help="configuration of the Hub dataset")
    data.add_argument(
        "--dataset_split", help="split of the dataset (default: that which the run held out, else `test`)"
    )
    data.add_argument(
        "--num_prompts", type=int, help="prompts, the first ones of a dataset (default: those of the run, else 256)"
    )
    data.add_argument("--data_seed", type=int, help="seed of a task's problems (default: those of the run, else 0)")
    data.add_argument(
        "--reward_funcs",
        nargs="+",
        help="rewards by name or dotted path (default: the task's verifier, or the rewards of the run)",
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--num_samples", type=int, default=1, help="completions per prompt and seed")
    decoding.add_argument("--temperature", type=float, help="0 for greedy, the default for one sample; else 1")
    decoding.add_argument("--top_p", type=float, default=1.0)
    decoding.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the sampling")
    decoding.add_argument(
        "--max_new_tokens", type=int, help="longest completion (default: the run's or the task's, else 256)"
    )
    decoding.add_argument("--batch_size", type=int, help="completions at a time (default: as many as memory allows)")
    measured = parser.add_argument_group("metrics")
    measured.add_argument("--metrics", nargs="+", help=f"of {', '.join(METRICS)} (default: all that apply)")
    measured.add_argument("--k", type=int, nargs="+", help="k of pass@k and mean@k (default: 1 and all samples)")
    measured.add_argument("--base_model", help="base for the KL divergence (default: what a run was trained from)")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run code of the models' repositories, where they need it"
    )
    parser.add_argument("--output_dir", type=Path, help="default: the model's folder if one is given, else runs/...")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {text}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def main(argv: list[str]) -> int:
    """
    Evaluate models and write `evaluation.json`, `evaluation.md` and `evaluation.png`.

    Args:
        argv (`list[str]`):
            Arguments after `papertrl evaluate`.

    Raises:
        [`~papertrl.core.errors.JobError`]: for input that cannot be evaluated.
    """
    args = make_parser().parse_args(argv)
    for name in args.models:
        refuse_if_owned(Path(name), "Evaluate when it has ended, or a folder `checkpoint-*` in it.")
    settle(args)
    evaluated = make_evaluated(args)
    problems = evaluated.problems
    chosen = choose_metrics(args, problems)
    output = output_dir(args)
    names = short_names(args.models)
    bases = {name: (args.base_model or base_of(name)) if "kl_to_base" in chosen else None for name in args.models}
    answers = {name: answer(args, name, bases[name], evaluated, output) for name in args.models}
    references = list(map(str, problems["answer"])) if "answer" in problems.column_names else None
    first = answers[args.models[0]]
    statistics = {
        names[name]: measures(each, chosen, args.k, references, None if each is first else first)
        for name, each in answers.items()
    }
    result = {
        "format": 1,
        **table(statistics, len(problems), seed=0),
        "dataset": evaluated.source | {"prompts": len(problems)},
        "settings": settings(args),
        "bases": {names[name]: scrub(base) for name, base in bases.items() if base is not None},
        "command": shlex.join(["papertrl", "evaluate", *map(scrub, argv)]),
    }
    write(result, output)
    print(markdown(result))
    if evaluated.own and args.temperature == 0:
        tell_of_run(run_of(args.models))
    print(f"Written: {output / EVALUATION_FILE}, {EVALUATION_REPORT}, {EVALUATION_PLOT}, {EVALUATION_COMPLETIONS}/")
    return 0


def tell_of_run(run: dict[str, Any]) -> None:
    """Print what a run itself measured of its model on the prompts at hand, and why it may differ."""
    scores = run.get("scores")
    if scores:
        print(
            f"The run measured {scores['measure']} {scores['after']:.3f} on these prompts ({scores['how']}). It "
            "generated in training's precision and batches, and here the saved weights do so in their own: rounding "
            "can decide between two tokens that are almost equally likely.\n"
        )


def settle(args: argparse.Namespace) -> None:
    """
    Check the numbers and settle the defaults that depend on others.

    Raises:
        [`~papertrl.core.errors.UsageError`]: naming flag, value and what is accepted.
    """
    for flag in ("num_prompts", "num_samples", "max_new_tokens", "batch_size"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise UsageError(f"`--{flag}` must be at least 1, got {value}.")
    args.models = list(dict.fromkeys(args.models))
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"`--seeds` must differ, got {args.seeds}: the same seed draws the same samples.")
    total = args.num_samples * len(args.seeds)
    if args.temperature is None:
        args.temperature = 0.0 if total == 1 else 1.0
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        raise UsageError(
            "`--temperature` must be a number of at least 0 and `--top_p` in (0, 1], got "
            f"{args.temperature} and {args.top_p}."
        )
    if args.temperature == 0 and total > 1:
        raise UsageError(
            f"`--temperature 0` decodes greedily, so that the {total} samples of a prompt would be the same. Set a "
            "positive temperature, or `--num_samples 1` and one seed."
        )
    for metric in args.metrics or []:
        if metric not in METRICS:
            near = difflib.get_close_matches(metric, METRICS, n=1)
            hint = f"Did you mean '{near[0]}'? " if near else ""
            raise UsageError(f"`--metrics`: unknown metric '{metric}'. {hint}Metrics are: {', '.join(METRICS)}.")
    args.k = args.k or sorted({1, total})
    if not all(1 <= k <= total for k in args.k):
        raise UsageError(
            f"`--k` must be in [1, {total}], the samples of a prompt (`--num_samples` times seeds), got {args.k}."
        )


def choose_metrics(args: argparse.Namespace, problems: Dataset) -> list[str]:
    """Metrics that were asked for, checked; or else all that apply."""
    references = "answer" in problems.column_names
    several = args.num_samples * len(args.seeds) > 1
    if args.metrics is None:
        chosen = ["response_length", "distinct_n", "kl_to_base"]
        return chosen + (["win_rate"] if len(args.models) > 1 else []) + (list(NEEDS_SAMPLES) if several else [])
    for metric in args.metrics:
        if metric in NEEDS_REFERENCES and not references:
            raise JobError(f"`--metrics {metric}` compares with the column `answer`, which the data lacks.")
        if metric == "pass_at_k" and args.temperature == 0:
            raise UsageError(
                "`--metrics pass_at_k` needs samples: set `--num_samples` and a positive `--temperature`."
            )
        if metric == "win_rate" and len(args.models) < 2:
            raise UsageError("`--metrics win_rate` compares models with the first one: name two models.")
    return args.metrics


def output_dir(args: argparse.Namespace) -> Path:
    """Where the result goes: as given, beside the one local run, or a new folder below `runs/`."""
    path = args.output_dir
    if path is None and len(args.models) == 1 and Path(args.models[0]).is_dir():
        path = Path(args.models[0])
    if path is None:
        number = 1
        while Path("runs", f"evaluation-{number}").exists():
            number += 1
        path = Path("runs", f"evaluation-{number}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(f"`--output_dir`: '{path}' cannot be made ({error.strerror}).") from error
    return path


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What determines a model's completions."""
    names = ("num_samples", "temperature", "top_p", "seeds", "max_new_tokens", "batch_size")
    return {name: getattr(args, name) for name in names}


def answer(
    args: argparse.Namespace,
    name: str,
    base: str | None,
    evaluated: Evaluated,
    output: Path,
) -> Answered:
    """A model's answers: read if they were kept, else generated and kept. Scores are always computed."""
    problems = evaluated.problems
    file = output / EVALUATION_COMPLETIONS / f"{Path(name).name}-{_key(args, name, evaluated)}.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not kept or base not in (None, kept["base"]):
        loaded = load_model(name, args.trust_remote_code)
        kept = kept or _generate(args, name, loaded, evaluated)
        if base is not None:
            kept["base"] = base
            kept["logps"], kept["base_logps"] = (
                _logps(args, model, kept) for model in (loaded, load_model(base, args.trust_remote_code))
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
        partial.replace(file)
    samples = len(kept["texts"][0])
    # As the model was asked: text, or messages
    prompts = [prompt for prompt in kept["prompts"] for _ in range(samples)]
    texts = [text for each in kept["texts"] for text in each]
    columns = {name: [value for value in problems[name] for _ in range(samples)] for name in problems.column_names}
    completions = list(map(as_completion, prompts, texts))
    ids = [row for each in kept["ids"] for row in each]
    flat = call_rewards(list(evaluated.judges.values()), prompts, completions, ids, columns, evaluated.state)
    scores = {}
    for measure, given in zip(evaluated.judges, flat, strict=True):
        if all(score is None for score in given):
            raise JobError(f"Reward '{measure}' applies to none of the prompts: it returned `None` for all of them.")
        scores[measure] = [given[i : i + samples] for i in range(0, len(given), samples)]
    lengths = [[len(row) for row in each] for each in kept["ids"]]
    logps = (kept["logps"], kept["base_logps"]) if base is not None else (None, None)
    return Answered(kept["texts"], scores, lengths, *logps)


def _key(args: argparse.Namespace, name: str, evaluated: Evaluated) -> str:
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(Path(name).glob("*.safetensors"))]
    asked = [list(evaluated.problems["prompt"]), evaluated.options, evaluated.template]
    parts = [settings(args), name, weights, asked]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _generate(args: argparse.Namespace, name: str, loaded: Loaded, evaluated: Evaluated) -> dict[str, Any]:
    rows = evaluated.problems
    if "name" in evaluated.source and loaded.tokenizer.chat_template is not None:
        rows = as_messages(rows)
    prompt_ids = [
        tokenize_prompt(loaded.tokenizer, row["prompt"], template_options(row) | evaluated.template) for row in rows
    ]
    ids: list[list[list[int]]] = [[] for _ in prompt_ids]
    total = len(prompt_ids) * args.num_samples * len(args.seeds)
    with tqdm(total=total, desc=f"{Path(name).name}", unit="completion", disable=None) as bar:
        for seed in args.seeds:
            sampled = complete(
                loaded, prompt_ids, args.num_samples, args.max_new_tokens, args.temperature, args.top_p, seed,
                args.batch_size, bar, evaluated.options,
            )  # fmt: skip
            for all_samples, new in zip(ids, sampled, strict=True):
                all_samples += new
    texts = [loaded.tokenizer.batch_decode(each, skip_special_tokens=True) for each in ids]
    prompts = list(rows["prompt"])
    return {
        "prompts": prompts,
        "prompt_ids": prompt_ids,
        "texts": texts,
        "ids": ids,
        "base": None,
        "logps": None,
        "base_logps": None,
    }


def _logps(args: argparse.Namespace, scoring: Loaded, kept: dict[str, Any]) -> list[list[list[float]]]:
    rows = zip(kept["prompt_ids"], kept["ids"], strict=True)
    pairs = [(prompt, completion) for prompt, each in rows for completion in each]
    flat = completion_logps(scoring.model, *map(list, zip(*pairs, strict=True)), batch_size=args.batch_size)
    samples = len(kept["ids"][0])
    return [flat[i : i + samples] for i in range(0, len(flat), samples)]


def write(result: dict[str, Any], output: Path) -> None:
    """Write result, report and plot; each replaces an earlier one as a whole."""
    for name, text in (
        (EVALUATION_FILE, json.dumps(result, indent=1) + "\n"),
        (EVALUATION_REPORT, markdown(result) + "\n"),
    ):
        partial = output / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(output / name)
    draw(result, output / EVALUATION_PLOT)
