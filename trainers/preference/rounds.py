"""The online loop of the preference family: propose, judge, pair, train, and again with the model that results."""

import datetime
import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import pyarrow.parquet as pq
import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset, concatenate_datasets
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from trl.distributed import DistributedBackend
from trl.models.utils import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id

from ...hub.files import PROVENANCE, ROUNDS
from ...models.tokenization import template_options, tokenize_completions, tokenize_prompt, with_end
from ..checkpoints import last_complete_checkpoint
from ..reference import REFERENCE_ADAPTER, keep_adapter
from .candidates import Candidate, Group, Pair, best_against_worst, candidates_table, pairs_dataset
from .judging import Judge, RewardScorer, compare
from .sampling import distribution, left_pad, sample_completions

logger = get_logger(__name__)

Source = Literal["policy", "reference"]


class SaveBetweenIterations(TrainerCallback):
    """Saves a checkpoint where an iteration ends, so that a run killed in the next one need not repeat it."""

    def __init__(self, trainer: "PreferenceRounds"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if (
            args.save_strategy != "no"
            and step < state.max_steps
            and step == self.trainer.first_step(self.trainer.iteration_at(step))
        ):
            control.should_save = True


class PreferenceRounds:
    """
    Mixin of [`~papertrl.PreferenceTrainer`]: trains on pairs of the policy's own completions.

    With `online_iterations` > 0, the training dataset holds prompts. The optimizer steps are divided evenly among the
    iterations. Before the first step of each, its *round* runs, on all ranks:

    | stage | method to override | input → output |
    |---|---|---|
    | choose prompts | `choose_prompts` | iteration → rows of the dataset |
    | propose | `propose` | groups → candidates of each, drawn from policy or reference |
    | judge | `judge` | candidates → their scores |
    | pair | `pair` | groups of all ranks → pairs |
    | select pairs | `select_pairs` | pairs → those to train on, annotated |

    *propose* and *judge* run on each rank's share of the groups, the others on all groups on every rank. The pairs
    then go through *prepare* like any dataset. They are kept in `rounds/round_<iteration>` of the output directory,
    with all candidates and how they came about; a resumed run reads them from there.
    """

    iteration = 0

    # --- Set-up -------------------------------------------------------------------------------------------------

    def check_online(self, dataset: Any, reward_funcs: Any, judge: Judge | None) -> None:
        """
        Check what the online loop needs, before anything is loaded.

        Raises:
            `ValueError`: naming the argument.
        """
        args = self.args
        if args.online_iterations == 0:
            given = [name for name, value in (("reward_funcs", reward_funcs), ("judge", judge)) if value is not None]
            if given:
                raise ValueError(
                    f"`{given[0]}` judges completions that are sampled in training, but `online_iterations` is 0. Set "
                    "it to 1 or more, or leave the argument out."
                )
            return
        if reward_funcs is not None and judge is not None:
            raise ValueError("`reward_funcs` and `judge` are both given, and either gives the scores; pass one.")
        if self.needs_scores(args) and reward_funcs is None and judge is None:
            raise ValueError(
                f"`online_iterations={args.online_iterations}` needs `reward_funcs` (functions, or reward models) or "
                "`judge` (a pairwise preference model) to score sampled completions; both are None."
            )
        if not isinstance(dataset, Dataset):
            raise ValueError(
                "`train_dataset` must be a map-style `Dataset` of prompts with `online_iterations` > 0, got "
                f"`{type(dataset).__name__}`."
            )
        if "prompt" not in dataset.column_names:
            raise ValueError(
                f"`train_dataset` needs the column `prompt` with `online_iterations` > 0; its columns are "
                f"{sorted(dataset.column_names)}."
            )

    def set_up_online(self, reward_funcs: Any, judge: Judge | None, processing_classes: Any) -> None:
        """Make what the loop uses; with `online_iterations` > 0."""
        args = self.args
        if self._is_vision_dataset:
            raise ValueError("`online_iterations` > 0 does not support datasets with images. Set it to 0.")
        self.scorer = None
        if reward_funcs is not None:
            self.scorer = RewardScorer(
                reward_funcs, args.online_reward_weights, processing_classes, self.accelerator, args.online_batch_size
            )
        self.judge_func = judge
        self._round_pairs: dict[int, Dataset | None] = {}
        self._round_metrics: dict[str, float] = {}
        self._entered: int | None = None
        # Of the iteration for which the reference is right
        self._reference_iteration = 0
        if args.online_reference != "initial":
            self._check_moving_reference()
        self.add_callback(SaveBetweenIterations(self))

    def _check_moving_reference(self) -> None:
        args = self.args
        adapter = is_peft_model(self.model)
        refused = {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "an adapter (its average is not that of the models)": adapter and args.online_reference == "ema",
            "an adapter and a `ref_model`": adapter and self.ref_model is not None,
        }
        for what, present in refused.items():
            if present:
                raise ValueError(
                    f"`online_reference='{args.online_reference}'` changes the reference between iterations, which is "
                    f"not supported with {what}. Set `online_reference='initial'`."
                )
        if adapter:
            keep_adapter(self.model)

    # --- Stages -------------------------------------------------------------------------------------------------

    def prompts_per_iteration(self) -> int:
        """How many prompts an iteration has; with `max_steps` unset, this decides on the number of steps."""
        return self.args.online_num_prompts or max(1, len(self.train_dataset) // self.args.online_iterations)

    def choose_prompts(self, iteration: int) -> list[int]:
        """
        Stage *choose prompts*: rows of the training dataset, other ones in each iteration as long as there are.

        Args:
            iteration (`int`):
                Counted from 0.
        """
        count = self.prompts_per_iteration()
        return self._cycled(len(self.train_dataset), iteration * count, count, "prompts")

    def propose(self, groups: list[Group]) -> None:
        """
        Stage *propose*: append candidates to each group's, by [`draw`].

        Args:
            groups (`list[Group]`):
                This rank's share, without candidates.
        """
        self.draw(groups, self.args.online_num_samples)

    def judge(self, groups: list[Group]) -> None:
        """
        Stage *judge*: set the `score` of every candidate.

        With reward functions, their weighted sum; with a pairwise judge, the mean probability to be better than the
        group's other candidates.

        Args:
            groups (`list[Group]`):
                This rank's share.
        """
        if self.scorer is not None:
            self.scorer(groups, self.state)
        elif self.judge_func is not None:
            matches = [(group, *match) for group in groups for match in combinations(group.candidates, 2)]
            won = {id(candidate): [] for group in groups for candidate in group.candidates}
            if matches:
                for (_, first, second), p in zip(matches, self.compare(*zip(*matches, strict=True)), strict=True):
                    won[id(first)].append(p)
                    won[id(second)].append(1 - p)
            for group in groups:
                for candidate in group.candidates:
                    if won[id(candidate)]:
                        candidate.score = fmean(won[id(candidate)])

    def pair(self, groups: list[Group]) -> list[Pair]:
        """
        Stage *pair*: best against worst of each group; none where all are equal.

        Args:
            groups (`list[Group]`):
                Those of all ranks; the answer must be the same on every rank.
        """
        return best_against_worst(groups)

    def select_pairs(self, pairs: list[Pair]) -> list[Pair]:
        """
        Stage *select pairs*: those to train on, in any order, with columns in `extras`. Extend through `super()`.

        Args:
            pairs (`list[Pair]`):
                From [`pair`], on every rank.
        """
        return pairs

    # --- Services for stages ------------------------------------------------------------------------------------

    def draw(self, groups: list[Group], count: int, source: Source = "policy", prompts: list | None = None) -> None:
        """
        Append `count` sampled candidates to each group.

        They depend on the run's seed, the iteration, the dataset row and their number in the group alone, and follow
        `online_temperature`, `online_top_p` and `online_top_k`. To be called on every rank, with equally many groups.

        Args:
            groups (`list[Group]`):
                This rank's share.
            count (`int`):
                Candidates to add.
            source (`str`, *optional*, defaults to `"policy"`):
                Model that they are drawn from: `"policy"` or `"reference"`.
            prompts (`list`, *optional*):
                Text or messages to draw from instead of the group's own prompt.
        """
        args = self.args
        if prompts is None:
            prompt_ids = [group.prompt_ids for group in groups]
        else:
            prompt_ids = [
                tokenize_prompt(self._tokenizer, prompt, template_options(group.row))
                for prompt, group in zip(prompts, groups, strict=True)
            ]
        rows = [(i, len(group.candidates) + n) for i, group in enumerate(groups) for n in range(count)]
        # Similar lengths next to each other, so that little is padded
        rows.sort(key=lambda row: len(prompt_ids[row[0]]))
        drawn: dict[tuple[int, int], list[int]] = {}
        pad_token_id = self._tokenizer.pad_token_id
        with self.generation_model(source) as model:
            eos_token_ids = self.eos_token_ids(model)
            processors = distribution(args.online_temperature, args.online_top_k, args.online_top_p)
            for start in range(0, len(rows), args.online_batch_size):
                part = rows[start : start + args.online_batch_size]
                ids, mask = left_pad([prompt_ids[i] for i, _ in part], pad_token_id, self.accelerator.device)
                seeds = [self._seed(groups[i].index, n, source) for i, n in part]
                input_ids, _, completion_mask = sample_completions(
                    model, ids, mask, seeds, args.online_max_new_tokens, pad_token_id, eos_token_ids, processors
                )
                for place, tokens, kept in zip(part, input_ids.tolist(), completion_mask.tolist(), strict=True):
                    drawn[place] = [token for token, keep in zip(tokens, kept, strict=True) if keep]
        for i, n in sorted(drawn):
            tokens = drawn[i, n]
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            chat = isinstance(groups[i].row["prompt"], list)
            completion = [{"role": "assistant", "content": text}] if chat else text
            groups[i].candidates.append(Candidate(completion, tokens, tokens[-1] in eos_token_ids, source))

    def compare(self, groups: list[Group], firsts: list[Candidate], seconds: list[Candidate]) -> list[float]:
        """P(first ≻ second) by the pairwise judge, for each of the pairs, averaged over both orders."""
        prompts = [group.row["prompt"] for group in groups]
        sides = ([candidate.completion for candidate in side] for side in (firsts, seconds))
        return compare(self.judge_func, prompts, *sides)

    def dataset_candidate(self, group: Group, side: str) -> Candidate:
        """The completion of the row itself, of its column `side`, as a candidate; tokenized as TRL does."""
        completion, options = group.row[side], template_options(group.row)
        ended = with_end(self._tokenizer, completion)
        shared, (tokens,) = tokenize_completions(self._tokenizer, group.row["prompt"], [ended], options)
        if isinstance(completion, str):
            completion = completion.removesuffix(self._tokenizer.eos_token)
            if len(shared) < len(group.prompt_ids):
                # A token would span the end of the prompt, after which all candidates begin
                tokens = self._tokenizer(text=ended, add_special_tokens=False)["input_ids"]
        return Candidate(completion, tokens, finished=True, source="dataset")

    def round_random(self, *key: Any) -> random.Random:
        """Random numbers for this iteration and `key`: the same on every rank and after a resume."""
        return random.Random(f"{self.args.seed} {self.iteration} {key}")

    def log_round(self, values: dict[str, float]) -> None:
        """Log numbers of this round, as `online/{name}`, with the next log; they are kept with it."""
        self._round_metrics |= {name: float(value) for name, value in values.items()}

    @contextmanager
    def generation_model(self, source: Source = "policy") -> Iterator[torch.nn.Module]:
        """Yield the unwrapped policy, or reference, ready to generate."""
        if source == "reference" and self.ref_model is not None:
            with self.reference_model() as reference:
                yield self.accelerator.unwrap_model(reference)
            return
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            self.reference_model() if source == "reference" else nullcontext(),
            torch.no_grad(),
            DistributedBackend(self.accelerator).summon_full_params(self.model_wrapped, recurse=False),
        ):
            yield model

    def eos_token_ids(self, model: torch.nn.Module) -> list[int]:
        """Tokens that end a completion."""
        ids = model.generation_config.eos_token_id
        ids = ids if isinstance(ids, list) else [ids]
        return [i for i in dict.fromkeys([self._tokenizer.eos_token_id, *ids]) if i is not None]

    def _seed(self, *key: Any) -> int:
        digest = hashlib.sha256(f"{self.args.seed} {self.iteration} {key}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

    def _cycled(self, size: int, start: int, count: int, *key: Any) -> list[int]:
        """Numbers below `size`, from place `start` on of a new shuffle after every `size` of them."""
        numbers = []
        for epoch in range(start // size, (start + count - 1) // size + 1):
            first = epoch * size
            order = _shuffled(size, f"{self.args.seed} {epoch} {key}")
            numbers += order[max(0, start - first) : start + count - first]
        return numbers

    # --- A round ------------------------------------------------------------------------------------------------

    def _run_round(self) -> Dataset | None:
        """Pairs of this iteration, written to the output directory; `None` if there is none."""
        self._round_metrics = {}
        with torch.random.fork_rng():
            groups = self._judged_groups()
            pairs = self.select_pairs(self.pair(groups))
        self._log_pairs(groups, pairs)
        dataset = pairs_dataset(pairs, self.iteration) if pairs else None
        if self.accelerator.is_main_process:
            self._write(groups, dataset)
        self.accelerator.wait_for_everyone()
        return dataset

    def _judged_groups(self) -> list[Group]:
        groups = []
        for index in self.choose_prompts(self.iteration):
            row = self.train_dataset[index]
            prompt_ids = tokenize_prompt(self._tokenizer, row["prompt"], template_options(row))
            groups.append(Group(row, index, prompt_ids))
        longest = self.args.max_length
        kept = [g for g in groups if g.prompt_ids and (longest is None or len(g.prompt_ids) < longest)]
        self.log_round({"dropped_prompts": len(groups) - len(kept)})
        if not kept:
            raise ValueError(f"`max_length={longest}`: no prompt of iteration {self.iteration} leaves room to answer.")
        # Ranks take equally many: repeated groups fill up, and are dropped
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        share = -(-len(kept) // world)
        chosen = [kept[min(i, len(kept) - 1)] for i in range(rank * share, (rank + 1) * share)]
        local = [Group(group.row, group.index, group.prompt_ids) for group in chosen]
        self.propose(local)
        self.judge(local)
        return gather_object(local)[: len(kept)]

    def _log_pairs(self, groups: list[Group], pairs: list[Pair]) -> None:
        candidates = [candidate for group in groups for candidate in group.candidates]
        scores = [[candidate.score for candidate in group.scored()] for group in groups]
        values = {
            "iteration": self.iteration,
            "candidates": len(candidates),
            "pairs": len(pairs),
            "finished_share": fmean(candidate.finished for candidate in candidates),
            "length": fmean(len(candidate.completion_ids) for candidate in candidates),
        }
        if any(scores):
            values["score"] = fmean(score for group in scores for score in group)
            values["best_score"] = fmean(max(group) for group in scores if group)
            values["worst_score"] = fmean(min(group) for group in scores if group)
        if pairs:
            values["chosen_length"] = fmean(len(pair.chosen.completion_ids) for pair in pairs)
            values["rejected_length"] = fmean(len(pair.rejected.completion_ids) for pair in pairs)
        self.log_round(values)

    def _folder(self, iteration: int) -> Path:
        return Path(self.args.output_dir) / ROUNDS / f"round_{iteration}"

    def _write(self, groups: list[Group], dataset: Dataset | None) -> None:
        folder = self._folder(self.iteration)
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        pq.write_table(candidates_table(groups, self.iteration), partial / "candidates.parquet")
        if dataset is not None:
            pq.write_table(dataset.data.table, partial / "pairs.parquet")
        (partial / PROVENANCE).write_text(json.dumps(self._provenance(groups, dataset), indent=1) + "\n")
        # Complete or not there at all, whenever the run is killed
        partial.rename(folder)

    def _provenance(self, groups: list[Group], dataset: Dataset | None) -> dict[str, Any]:
        args = self.args
        return {
            "iteration": self.iteration,
            "step": self.state.global_step,
            "model": get_config_model_id(self.accelerator.unwrap_model(self.model).config),
            "methods": [m.name for m in self.methods],
            "reference": args.online_reference,
            "seed": args.seed,
            "sampling": {
                name: getattr(args, f"online_{name}")
                for name in ("num_samples", "max_new_tokens", "temperature", "top_p", "top_k")
            },
            "rewards": None if self.scorer is None else dict(zip(self.scorer.names, self.scorer.weights, strict=True)),
            "judge": None
            if self.judge_func is None
            else getattr(self.judge_func, "__name__", type(self.judge_func).__name__),
            "prompts": len(groups),
            "candidates": sum(len(group.candidates) for group in groups),
            "pairs": 0 if dataset is None else len(dataset),
            "metrics": self._round_metrics,
            "papertrl": version("papertrl"),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    # --- Training on rounds -------------------------------------------------------------------------------------

    def iteration_at(self, step: int) -> int:
        """Iteration that the optimizer step `step`, counted from 0, belongs to."""
        return step * self.args.online_iterations // self.state.max_steps

    def first_step(self, iteration: int) -> int:
        """Optimizer step with which an iteration begins."""
        return -(-iteration * self.state.max_steps // self.args.online_iterations)

    def get_train_dataloader(self) -> DataLoader:
        if self.args.online_iterations == 0:
            return super().get_train_dataloader()
        # Its length alone counts: `get_batch_samples` has the rows
        rows = self.prompts_per_iteration() * self.args.online_iterations
        accumulated = self.args.gradient_accumulation_steps
        batch = self.args.per_device_train_batch_size * self.accelerator.num_processes * accumulated
        return DataLoader(range(-(-rows // batch) * accumulated), collate_fn=_nothing)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.online_iterations == 0:
            return batches, num_items
        # Decided right before the step, so that a round sees the model that all steps before it made
        step = self.state.global_step
        if self.state.max_steps < self.args.online_iterations:
            raise ValueError(
                f"`online_iterations={self.args.online_iterations}` needs at least one optimizer step each, but the "
                f"run has {self.state.max_steps}. Raise `max_steps`, `num_train_epochs` or `online_num_prompts`."
            )
        iteration = self.iteration_at(step)
        if iteration != self._entered:
            self._enter(iteration)
        done = (step - self.first_step(iteration)) * self.args.gradient_accumulation_steps
        return [self._batch(done + i) for i in range(len(batches))], None

    def _batch(self, number: int) -> dict[str, Any]:
        """This rank's micro-batch of the iteration."""
        size, rank = self.args.per_device_train_batch_size, self.accelerator.process_index
        start = (number * self.accelerator.num_processes + rank) * size
        rows = self._cycled(len(self._training_pairs), start, size, "pairs", self._entered)
        return self.data_collator(self._training_pairs.__getitems__(rows))

    def _enter(self, iteration: int) -> None:
        if iteration > self._reference_iteration:
            self._move_reference()
            self._reference_iteration = iteration
        self._entered = iteration
        used: list[Dataset] = []
        for i in range(iteration, -1, -1):
            pairs = self._pairs_of(i)
            used += [] if pairs is None else [pairs]
            if used and not self.args.online_accumulate:
                break
        self.iteration = iteration
        if not used:
            raise ValueError(
                f"`online_iterations`: iteration {iteration} made no pair to train on. Completions of a prompt must "
                "differ in their scores: raise `online_num_samples` or `online_temperature`, or use a finer reward."
            )
        if self._round_pairs[iteration] is None:
            logger.warning(
                f"Iteration {iteration} made no pair, for example because all completions of a prompt score alike; "
                "it trains on the pairs before."
            )
        self._training_pairs = concatenate_datasets(used[::-1])

    def _pairs_of(self, iteration: int) -> Dataset | None:
        if iteration not in self._round_pairs:
            self.iteration = iteration
            folder = self._folder(iteration)
            # All ranks must take the same way, whenever each of them looks
            written = [(folder / PROVENANCE).is_file()]
            broadcast_object_list(written)
            begins = self.state.global_step == self.first_step(iteration)
            if written[0]:
                file = folder / "pairs.parquet"
                pairs = Dataset(pq.read_table(file)) if file.exists() else None
                self._round_metrics = json.loads((folder / PROVENANCE).read_text())["metrics"]
            elif begins:
                pairs = self._run_round()
            else:
                raise ValueError(
                    f"`output_dir`: '{folder}' is missing, whose pairs this run is training on. Restore it, or resume "
                    "from a checkpoint between two iterations."
                )
            for name, value in self._round_metrics.items() if begins else ():
                self._metrics["train"][f"online/{name}"].append(value)
            self._round_pairs[iteration] = pairs and self.prepare(pairs, f"round_{iteration}")
        return self._round_pairs[iteration]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if self.args.online_iterations > 0:
            self._round_pairs, self._entered, self._reference_iteration = {}, None, 0
            root = Path(self.args.output_dir) / ROUNDS
            if resume_from_checkpoint:
                if resume_from_checkpoint is True:
                    resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
                theirs = Path(resume_from_checkpoint).parent / ROUNDS
                if self.accelerator.is_main_process and theirs.is_dir() and not root.exists():
                    shutil.copytree(theirs, root)
            elif root.exists():
                raise ValueError(
                    f"`output_dir`: '{root}' holds what an earlier run sampled. Go on with that run by "
                    "`resume_from_checkpoint`, remove the folder, or choose another `output_dir`."
                )
            self.accelerator.wait_for_everyone()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # --- The reference ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _move_reference(self) -> None:
        kind = self.args.online_reference
        if kind == "initial":
            return
        policy = self.accelerator.unwrap_model(self.model_wrapped)
        if self.ref_model is None:
            weights = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter)
            self._set_reference({name: value.clone() for name, value in weights.items()})
            return
        weight = 1.0 if kind == "previous" else 1.0 - self.args.online_reference_decay
        theirs = self.accelerator.unwrap_model(self.ref_model)
        for target, source in zip(theirs.parameters(), policy.parameters(), strict=True):
            target.lerp_(source.to(target), weight)

    def _reference_weights(self) -> dict[str, torch.Tensor]:
        if self.ref_model is None:
            return dict(
                get_peft_model_state_dict(self.accelerator.unwrap_model(self.model), adapter_name=REFERENCE_ADAPTER)
            )
        return dict(self.accelerator.unwrap_model(self.ref_model).named_parameters())

    @torch.no_grad()
    def _set_reference(self, weights: dict[str, torch.Tensor]) -> None:
        if self.ref_model is None:
            set_peft_model_state_dict(
                self.accelerator.unwrap_model(self.model), weights, adapter_name=REFERENCE_ADAPTER
            )
            return
        for name, parameter in self.accelerator.unwrap_model(self.ref_model).named_parameters():
            parameter.copy_(weights[name])

    def method_state(self) -> dict[str, Any]:
        state = super().method_state()
        if self.args.online_iterations > 0 and self.args.online_reference != "initial":
            weights = {name: value.detach().cpu() for name, value in self._reference_weights().items()}
            state["online_reference"] = {"iteration": self._reference_iteration, "weights": weights}
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        if "online_reference" in state:
            self._reference_iteration = state["online_reference"]["iteration"]
            self._set_reference(state["online_reference"]["weights"])


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: str) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _nothing(rows: list[int]) -> dict[str, Any]:
    return {}
