"""The online loop: propose, judge, pair, train, and again with the model that results."""

import random
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from ....models.tokenization import template_options, tokenize_prompt
from ...checkpoints import last_complete_checkpoint
from .candidates import Group, Pair, pairs_dataset
from .files import RoundFiles, provenance_of
from .reference import MovingReference

logger = get_logger(__name__)


class OnlineLoop:
    """
    Runs the rounds of a trainer, by its stages, and gives it the batches of their pairs.

    Args:
        trainer ([`~papertrl.PreferenceTrainer`]):
            With `online_iterations` > 0.

    Raises:
        `ValueError`: if `online_reference` is not supported with the trainer's model.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.files = RoundFiles(trainer.args.output_dir)
        self.reference = MovingReference(trainer)
        # Of the present round
        self.metrics: dict[str, float] = {}
        # What the present iteration trains on
        self.pairs: Dataset | None = None
        self._rounds: dict[int, Dataset | None] = {}
        self._entered: int | None = None
        trainer.add_callback(SaveBetweenIterations(self))

    def start(self, resume_from_checkpoint: str | bool | None) -> None:
        """
        Begin a run: with the rounds of the checkpoint, or with none.

        Raises:
            `ValueError`: if an earlier run has left its rounds.
        """
        trainer = self.trainer
        self._rounds, self._entered, self.reference.iteration = {}, None, 0
        if not resume_from_checkpoint:
            self.files.check_new()
        else:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(trainer.args.output_dir)
            if trainer.accelerator.is_main_process:
                self.files.take_over(resume_from_checkpoint)
        trainer.accelerator.wait_for_everyone()

    # --- Steps and iterations -----------------------------------------------------------------------------------

    def iteration_at(self, step: int) -> int:
        """Iteration that the optimizer step `step`, counted from 0, belongs to."""
        return step * self.trainer.args.online_iterations // self.trainer.state.max_steps

    def first_step(self, iteration: int) -> int:
        """Optimizer step with which an iteration begins."""
        return -(-iteration * self.trainer.state.max_steps // self.trainer.args.online_iterations)

    def dataloader(self) -> DataLoader:
        """Rows without content, as many as an epoch has: [`batches`] has the content."""
        args = self.trainer.args
        rows = self.trainer.prompts_per_iteration() * args.online_iterations
        accumulated = args.gradient_accumulation_steps
        batch = args.per_device_train_batch_size * self.trainer.accelerator.num_processes * accumulated
        return DataLoader(range(-(-rows // batch) * accumulated), collate_fn=_nothing)

    def batches(self, count: int) -> list[dict[str, Any]]:
        """
        This rank's `count` micro-batches of the present optimizer step.

        Called right before the step, so that a round sees the model that all steps before it made.

        Raises:
            `ValueError`: if there are fewer steps than iterations, or no pair to train on.
        """
        args, state = self.trainer.args, self.trainer.state
        if state.max_steps < args.online_iterations:
            raise ValueError(
                f"`online_iterations={args.online_iterations}` needs at least one optimizer step each, but the "
                f"run has {state.max_steps}. Raise `max_steps`, `num_train_epochs` or `online_num_prompts`."
            )
        iteration = self.iteration_at(state.global_step)
        if iteration != self._entered:
            self._enter(iteration)
        done = (state.global_step - self.first_step(iteration)) * args.gradient_accumulation_steps
        return [self._batch(done + i) for i in range(count)]

    def _batch(self, number: int) -> dict[str, Any]:
        """This rank's micro-batch of the iteration."""
        args, accelerator = self.trainer.args, self.trainer.accelerator
        size = args.per_device_train_batch_size
        start = (number * accelerator.num_processes + accelerator.process_index) * size
        rows = cycled(args.seed, len(self.pairs), start, size, "pairs", self._entered)
        return self.trainer.data_collator(self.pairs.__getitems__(rows))

    def _enter(self, iteration: int) -> None:
        self.reference.enter(iteration)
        self._entered = iteration
        used: list[Dataset] = []
        for i in range(iteration, -1, -1):
            pairs = self._pairs_of(i)
            used += [] if pairs is None else [pairs]
            if used and not self.trainer.args.online_accumulate:
                break
        self.trainer.iteration = iteration
        if not used:
            raise ValueError(
                f"`online_iterations`: iteration {iteration} made no pair to train on. Completions of a prompt must "
                "differ in their scores: raise `online_num_samples` or `online_temperature`, or use a finer reward."
            )
        if self._rounds[iteration] is None:
            logger.warning(
                f"Iteration {iteration} made no pair, for example because all completions of a prompt score alike; "
                "it trains on the pairs before."
            )
        self.pairs = concatenate_datasets(used[::-1])

    def _pairs_of(self, iteration: int) -> Dataset | None:
        if iteration not in self._rounds:
            trainer = self.trainer
            trainer.iteration = iteration
            # All ranks must take the same way, whenever each of them looks
            written = [self.files.written(iteration)]
            broadcast_object_list(written)
            begins = trainer.state.global_step == self.first_step(iteration)
            if written[0]:
                pairs, provenance = self.files.read(iteration)
            elif begins:
                pairs, provenance = self._run_round()
            else:
                raise ValueError(
                    f"`output_dir`: '{self.files.folder(iteration)}' is missing, whose pairs this run is training on. "
                    "Restore it, or resume from a checkpoint between two iterations."
                )
            if begins:
                trainer.count_sampled(provenance["tokens"])
                for name, value in provenance["metrics"].items():
                    trainer._metrics["train"][f"online/{name}"].append(value)
            self._rounds[iteration] = pairs and trainer.prepare(pairs, f"round_{iteration}")
        return self._rounds[iteration]

    # --- A round ------------------------------------------------------------------------------------------------

    def _run_round(self) -> tuple[Dataset | None, dict[str, Any]]:
        """Pairs of the present iteration, or `None` if there is none, and their provenance; both are written."""
        trainer = self.trainer
        self.metrics = {}
        with torch.random.fork_rng():
            groups = self._judged_groups()
            pairs = trainer.select_pairs(trainer.pair(groups))
        trainer.log_round({"iteration": trainer.iteration, **summary(groups, pairs)})
        dataset = pairs_dataset(pairs, trainer.iteration) if pairs else None
        provenance = provenance_of(trainer, groups, dataset, self.metrics)
        if trainer.accelerator.is_main_process:
            self.files.write(trainer.iteration, groups, dataset, provenance)
        trainer.accelerator.wait_for_everyone()
        return dataset, provenance

    def _judged_groups(self) -> list[Group]:
        """Groups of all ranks, with candidates and their scores."""
        trainer = self.trainer
        kept = self._groups()
        # Ranks take equally many: repeated groups fill up, and are dropped
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        share = -(-len(kept) // world)
        chosen = [kept[min(i, len(kept) - 1)] for i in range(rank * share, (rank + 1) * share)]
        local = [Group(group.row, group.index, group.prompt_ids) for group in chosen]
        trainer.propose(local)
        trainer.judge(local)
        if trainer.scorer is not None:
            trainer.log_round(trainer.scorer.pop_logged())
        return gather_object(local)[: len(kept)]

    def _groups(self) -> list[Group]:
        """The chosen prompts, but for those that leave no room to answer."""
        trainer = self.trainer
        count = trainer.prompts_per_iteration()
        rows = trainer.choose_prompts(count, round=trainer.iteration)
        if rows is None:
            start = 0 if trainer.args.online_reuse_prompts else trainer.iteration * count
            rows = cycled(trainer.args.seed, len(trainer.train_dataset), start, count, "prompts")
        groups = []
        for index in rows:
            row = trainer.train_dataset[index]
            prompt_ids = tokenize_prompt(trainer.tokenizer, row["prompt"], template_options(row))
            groups.append(Group(row, index, prompt_ids))
        longest = trainer.args.max_length
        kept = [g for g in groups if g.prompt_ids and (longest is None or len(g.prompt_ids) < longest)]
        trainer.log_round({"dropped_prompts": len(groups) - len(kept)})
        if not kept:
            raise ValueError(
                f"`max_length={longest}`: no prompt of iteration {trainer.iteration} leaves room to answer."
            )
        return kept


class SaveBetweenIterations(TrainerCallback):
    """Saves a checkpoint where an iteration ends, so that a run killed in the next one need not repeat it."""

    def __init__(self, loop: OnlineLoop):
        self.loop = loop

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        if (
            args.save_strategy != "no"
            and step < state.max_steps
            and step == self.loop.first_step(self.loop.iteration_at(step))
        ):
            control.should_save = True


def summary(groups: list[Group], pairs: list[Pair]) -> dict[str, float]:
    """Numbers of a round that are logged whatever the methods."""
    candidates = [candidate for group in groups for candidate in group.candidates]
    scores = [[candidate.score for candidate in group.scored()] for group in groups]
    values = {
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
    return values


def cycled(seed: int, size: int, start: int, count: int, *key: Any) -> list[int]:
    """`count` numbers below `size`, from place `start` on of a new shuffle after every `size` of them."""
    numbers = []
    for epoch in range(start // size, (start + count - 1) // size + 1):
        first = epoch * size
        order = _shuffled(size, f"{seed} {epoch} {key}")
        numbers += order[max(0, start - first) : start + count - first]
    return numbers


@lru_cache(maxsize=4)
def _shuffled(size: int, seed: str) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return tuple(order)


def _nothing(rows: list[int]) -> dict[str, Any]:
    return {}
