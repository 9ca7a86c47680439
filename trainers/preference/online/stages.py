"""The stages of an online round, and what they may call."""

import random
from itertools import combinations
from statistics import fmean
from typing import Any

from datasets import Dataset

from ....data.messages import as_completion
from ....models.tokenization import template_options, tokenize_completions, tokenize_prompt, with_end
from ....samplers.decoding.stopping import StopStrings
from .candidates import Candidate, Group, Pair, best_against_worst
from .draw import draw_completions, keyed_seed
from .judging import Judge, RewardScorer, compare
from .loop import OnlineLoop


class OnlineStages:
    """
    Mixin of [`~papertrl.PreferenceTrainer`]: how the online loop makes pairs of the policy's own completions.

    With `online_iterations` > 0, the training dataset holds prompts. The optimizer steps are divided evenly among the
    iterations. Before the first step of each, its *round* runs, on all ranks:

    | stage | method to override | input → output |
    |---|---|---|
    | choose prompts | `choose_prompts` | number, iteration → rows of the dataset |
    | propose | `propose` | groups → candidates of each, drawn from policy or reference |
    | judge | `judge` | candidates → their scores |
    | pair | `pair` | groups of all ranks → pairs |
    | select pairs | `select_pairs` | pairs → those to train on, annotated |

    *propose* and *judge* run on each rank's share of the groups, the others on all groups on every rank. The pairs
    then go through *prepare* like any dataset. They are kept in `rounds/round_<iteration>` of the output directory,
    with all candidates and how they came about; a resumed run reads them from there.

    `iteration` is the number of the iteration at hand, from 0 on, `online` the
    [`~papertrl.trainers.preference.online.loop.OnlineLoop`] that runs the rounds, or `None` without; `scorer` and
    `judge_func` are who gives the scores, if anybody.
    """

    iteration = 0
    online: OnlineLoop | None = None
    scorer: RewardScorer | None = None
    judge_func: Judge | None = None

    # --- Stages -------------------------------------------------------------------------------------------------

    def choose_prompts(self, count: int, round: int) -> list[int] | None:
        """
        Stage *choose prompts*: rows of the training dataset for an iteration. All ranks must answer alike.

        Args:
            count (`int`):
                Number of prompts, over all ranks.
            round (`int`):
                The iteration, counted from 0.

        Returns:
            `list[int]`, or `None` for the loop's own order: other rows in each iteration as long as there are, or
            the same with `online_reuse_prompts`.
        """
        chooser = self.slots.prompts()
        return None if chooser is None else chooser.choose(count, round, self.keyed_generator(round))

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

    def draw(
        self,
        groups: list[Group],
        count: int,
        source: str = "policy",
        prompts: list | None = None,
    ) -> None:
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
        if prompts is None:
            prompt_ids = [group.prompt_ids for group in groups]
        else:
            prompt_ids = [
                tokenize_prompt(self.tokenizer, prompt, template_options(group.row))
                for prompt, group in zip(prompts, groups, strict=True)
            ]
        rows = [(i, len(group.candidates) + n) for i, group in enumerate(groups) for n in range(count)]
        with self.generation_model(source) as model:
            eos_token_ids = self.eos_token_ids(model)
            strings = model.generation_config.stop_strings
            drawn = draw_completions(
                model,
                [prompt_ids[i] for i, _ in rows],
                [keyed_seed(self.args.seed, self.iteration, groups[i].index, n, source) for i, n in rows],
                self.args,
                self.tokenizer.pad_token_id,
                eos_token_ids,
                self.accelerator.device,
            )
        stopped = [False] * len(drawn)
        if strings:
            stops, starts = StopStrings(strings, self.tokenizer), [prompt_ids[i] for i, _ in rows]
            drawn = stops.cut(starts, drawn)
            stopped = stops.ending(starts, drawn)
        for (i, _), tokens, stop in zip(rows, drawn, stopped, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            completion, finished = as_completion(groups[i].row["prompt"], text), stop or tokens[-1] in eos_token_ids
            groups[i].candidates.append(Candidate(completion, tokens, finished, source))

    def compare(self, groups: list[Group], firsts: list[Candidate], seconds: list[Candidate]) -> list[float]:
        """P(first ≻ second) by the pairwise judge, for each of the pairs, averaged over both orders."""
        prompts = [group.row["prompt"] for group in groups]
        sides = ([candidate.completion for candidate in side] for side in (firsts, seconds))
        return compare(self.judge_func, prompts, *sides)

    def dataset_candidate(self, group: Group, side: str) -> Candidate:
        """The completion of the row itself, of its column `side`, as a candidate; tokenized as TRL does."""
        completion, options = group.row[side], template_options(group.row)
        ended = with_end(self.tokenizer, completion)
        shared, (tokens,) = tokenize_completions(self.tokenizer, group.row["prompt"], [ended], options)
        if isinstance(completion, str):
            completion = completion.removesuffix(self.tokenizer.eos_token)
            if len(shared) < len(group.prompt_ids):
                # A token would span the end of the prompt, after which all candidates begin
                tokens = self.tokenizer(text=ended, add_special_tokens=False)["input_ids"]
        return Candidate(completion, tokens, finished=True, source="dataset")

    def round_random(self, *key: Any) -> random.Random:
        """Random numbers for this iteration and `key`: the same on every rank and after a resume."""
        return random.Random(f"{self.args.seed} {self.iteration} {key}")

    def log_round(self, values: dict[str, float]) -> None:
        """Log numbers of this round, as `online/{name}`, with the next log; they are kept with it."""
        self.online.metrics |= {name: float(value) for name, value in values.items()}

    def prompts_per_iteration(self) -> int:
        """How many prompts an iteration has; with `max_steps` unset, this decides on the number of steps."""
        shares = 1 if self.args.online_reuse_prompts else self.args.online_iterations
        return self.args.online_num_prompts or max(1, len(self.train_dataset) // shares)

    # --- What the loop needs ------------------------------------------------------------------------------------

    def check_online(self, dataset: Any, reward_funcs: Any, judge: Judge | None) -> None:
        """
        Check what the online loop needs, before anything is loaded. Extend through `super()`.

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
