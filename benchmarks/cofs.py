"""
What one adapter, combined from those of two domains, keeps of both (COFS-DPO).

    python benchmarks/cofs.py [--seeds N] [--first_seed K]

A start model half knows two tasks. OFS-DPO trains an adapter on pairs of each; `combine_domains` makes one of both and
weighs them on its default memory of 64 pairs of either. Beside it, adapters that went from the first task on to the
second, as domains arrive in a stream. Greedy accuracy on held-out problems of both tasks.
"""

import argparse
import tempfile
from pathlib import Path
from statistics import fmean, stdev

import harness
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from papertrl import OfsDPOConfig, OfsDPOTrainer
from papertrl.adapters import combine_domains
from papertrl.evidence.probe import Probe, greedy_accuracy
from papertrl.models.start import cached_start_model
from papertrl.tasks import load_task

DOMAINS = ("sorting", "automaton")
START = {"error_share": 0.6, "steps": 1600}
PAIRS, HELD_OUT = 2000, 256
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
SETTINGS = {
    **harness.settings("off"),
    "per_device_train_batch_size": 64,
    "max_steps": 60,
    "learning_rate": 1e-3,
    "beta": 0.5,
    "ofs_chasing_interval": 10,
}


def mixture(domain: str | None = None):
    return load_task("mixture", weights=dict.fromkeys([domain] if domain else DOMAINS, 1.0), easy_share=0.0)


def train(model, pairs, tokenizer, folder: Path, seed: int, alpha: float | None) -> Path:
    """The folder of the adapter after training on `pairs`; `alpha=None` is DPO."""
    args = OfsDPOConfig(str(folder), **{**SETTINGS, "seed": seed, "ofs_alpha": alpha})
    trainer = OfsDPOTrainer(
        model,
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else LORA,
    )
    trainer.train()
    trainer.save_model(str(folder))
    return folder


def accuracies(model, start, tokenizer, problems) -> dict[str, float]:
    """By domain, and on average."""
    found = {}
    for domain in DOMAINS:
        task = mixture(domain)
        found[domain] = greedy_accuracy(
            Probe(model.eval(), start, tokenizer, task, problems[domain], task.max_new_tokens)
        )["accuracy"]
    return found | {"mean": fmean(found.values())}


def run(seed: int) -> dict[str, dict[str, float]]:
    path = cached_start_model(mixture(), seed=seed, disable_tqdm=True, hidden_size=64, num_layers=2, **START)
    tokenizer = AutoTokenizer.from_pretrained(path)
    pairs, problems = {}, {}
    for domain in DOMAINS:
        task = mixture(domain)
        generated, problems[domain] = task.splits(PAIRS, HELD_OUT, seed)
        pairs[domain] = task.preference(generated)

    def base():
        return AutoModelForCausalLM.from_pretrained(path)

    def measured(folder: Path) -> dict[str, float]:
        return accuracies(PeftModel.from_pretrained(base(), folder), base(), tokenizer, problems)

    results = {"start": accuracies(base(), base(), tokenizer, problems)}
    with tempfile.TemporaryDirectory() as work:

        def trained(model, domain: str, name: str, alpha: float | None) -> Path:
            folder = train(model, pairs[domain], tokenizer, Path(work, f"{name}, {domain}"), seed, alpha)
            results[f"{name}, {domain}"] = measured(folder)
            return folder

        alone = [trained(base(), domain, "OFS-DPO alone", 0.1) for domain in DOMAINS]
        first = {0.1: alone[0], None: trained(base(), DOMAINS[0], "DPO alone", None)}
        for name, alpha in (("OFS-DPO, then", 0.1), ("DPO, then", None)):
            trained(PeftModel.from_pretrained(base(), first[alpha], is_trainable=True), DOMAINS[1], name, alpha)
        memories, beta = [pairs[domain] for domain in DOMAINS], SETTINGS["beta"]
        found = combine_domains(str(path), alone, memories, tokenizer, Path(work, "combined"), beta=beta, seed=seed)
        results["COFS-DPO"] = measured(Path(work, "combined")) | {
            f"weight of {domain}": weight for domain, weight in zip(DOMAINS, found.weights, strict=True)
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first_seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [run(options.first_seed + i) for i in range(options.seeds)]
    for name in runs[0]:
        values = {key: [r[name][key] for r in runs] for key in runs[0][name]}
        shown = {k: f"{fmean(v):.3f} ± {stdev(v) if len(v) > 1 else 0.0:.3f}" for k, v in values.items()}
        print(name, shown, flush=True)
    harness.write(harness.RESULTS, "cofs", {"first_seed": options.first_seed, "runs": runs})


if __name__ == "__main__":
    main()
