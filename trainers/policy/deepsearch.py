"""DeepSearch on GRPO."""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch.nn.utils.rnn import pad_sequence

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.deepsearch import node_advantages, overlong_penalty, spread_nodes
from ...samplers.trees.dump import tree_as_dict
from ...samplers.trees.search import grow
from ...samplers.trees.tree import Rules, Tree, completion, entropy, path
from .base import PolicyConfig, PolicyTrainer
from .objective import column
from .passes import pad_rows
from .record import Generation, RolloutRecord, ScoredBatch, Source

logger = get_logger(__name__)

# Column of the dataset rows that says which nodes a completion consists of
NODES = "deepsearch_nodes"
_SATURATED = 0.99


@method_config
class DeepsearchGRPOConfig(PolicyConfig):
    """
    Configuration of [`DeepsearchGRPOTrainer`].

    TRL fields with the paper's values as defaults: `epsilon_high` 0.28 and `delta` 10 (dual clip). The paper trains on
    prompts that the model rarely solves: those with Pass1@4 below 25 %, chosen anew after every 100 steps. Choosing
    them is preparation of the dataset; `papertrl evaluate` measures how often a prompt is solved.
    """

    tree_width: int | None = method_field(
        8,
        "Children of an expansion. `None` samples as GRPO does and gives the tokens of a completion one advantage.",
        ge=2,
        optional=True,
    )
    tree_max_depth: int = method_field(
        64,
        "Steps of the longest completion: one has `max_completion_length / tree_max_depth` tokens, rounded up. The "
        "released code has 32.",
        ge=1,
    )
    tree_selection: str = method_field(
        "frontier",
        "Where the search goes on after a complete trajectory: at the best node of the whole frontier, or from the "
        "root along the largest UCT, as in plain Monte Carlo tree search.",
        choices=("frontier", "uct"),
    )
    tree_lambda_uct: float = method_field(2.0, "λ, weight of exploration in UCT.", ge=0)
    tree_lambda_quality: float = method_field(
        0.4, "λ1, weight of the parent's value in a frontier node's priority.", gt=-math.inf
    )
    tree_lambda_uncertainty: float = method_field(
        0.4, "λ2, weight of the node's entropy in the priority; the released code has it off, 0.", gt=-math.inf
    )
    tree_lambda_depth: float = method_field(0.01, "λ3, weight of the depth bonus in the priority.", gt=-math.inf)
    tree_lambda_self: float = method_field(
        0.0, "λ4, weight of the node's own value in the priority; the released code's addition.", gt=-math.inf
    )
    tree_depth_bonus: str = method_field(
        "sqrt",
        "Depth bonus at depth d: √(d / deepest), ln(d + 1), or d (`constant` in the released code).",
        choices=("sqrt", "log", "linear"),
    )
    tree_gamma_min: float = method_field(0.1, "γ, smallest weight with which a reward is backed up.", ge=0, le=1)
    tree_incomplete_score: float = method_field(
        -1.0, "Reward of a completion that is neither right nor ended by an end token.", ge=-1, le=1
    )
    tree_correctness_reward: str | None = method_field(
        None,
        "Name of the reward function that decides which completions are right: those that it gives more than "
        "`success_threshold`, whatever the others say. `None` takes the first one.",
    )
    tree_overlong_share: float = method_field(
        0.25,
        "Last part of `max_completion_length` in which a completion loses value, from 0 where it begins to 1 at its "
        "end. The paper has 4096 of 16384 tokens. 0 takes nothing away.",
        ge=0,
        le=1,
    )
    tree_q_temperature: float = method_field(1.0, "ε, temperature of the soft clip of values.", gt=0)
    tree_q_max: float = method_field(1.0, "q_max, bound of the soft clip of values.", gt=0)
    tree_adv_norm: str = method_field(
        "sibling_mean",
        "Advantages of nodes: values minus the mean reward of the tree's trajectories, also divided by its standard "
        "deviation, or values as they are.",
        choices=("sibling_mean", "sibling_mean_std", "none"),
    )
    tree_replay_accuracy_max: float | None = method_field(
        0.25,
        "Prompts of which some trajectories were right, but no larger a share than this, are not searched again: "
        "their right completions are kept and replayed next to new ones, until more of the new ones are right. `None` "
        "keeps none.",
        gt=0,
        le=1,
        optional=True,
        was="replay_accuracy_max",
    )
    tree_dump_dir: str | None = method_field(None, "Folder for the search trees as JSON. `None` writes none.")
    tree_dump_steps: int = method_field(10, "Optimizer steps from one dump of trees to the next.", ge=1)
    epsilon_high: float | None = method_field(0.28, "Upper clip range of the ratio.", ge=0, optional=True)
    delta: float | None = method_field(
        10.0, "Bound of the ratio where the advantage is negative (dual clip).", gt=1, optional=True
    )

    def validate(self):
        super().validate()
        name = "stop" if self.use_vllm else "stop_strings"
        if self.tree_width is not None and (self.generation_kwargs or {}).get(name):
            raise ValueError(
                "DeepSearch samples in steps of a fixed number of tokens and would not see a stop string that crosses "
                f"them: leave `{name}` out of `generation_kwargs`, got {self.generation_kwargs!r}, or set "
                "`tree_width=None`."
            )


class DeepsearchGRPOTrainer(PolicyTrainer):
    r"""
    DeepSearch: GRPO whose groups are found by tree search, with an advantage for every step of them.

    One tree per prompt, whose nodes are steps of a fixed number of tokens. A node is expanded by `tree_width` sampled
    steps. Where none of them is the end of a completion, the search goes on below one of them; else one terminal is
    kept, a right one if there is one, otherwise the wrong one of lowest entropy. Its reward v = ±1 is backed up to
    every node i on its path of length l (arXiv:2509.25454, Eq. 3 and 5),

    $$
    q_i \leftarrow \begin{cases} q_i + w_i v & q_i v \ge 0 \\ w_i v & q_i < 0 < v \\ q_i & v < 0 < q_i \end{cases}
    \qquad w_i = \max(i / l, \gamma),
    $$

    and the search goes on at the node of the whole frontier with the largest λ1·tanh(Q(parent)) + λ2·H + λ3·D(depth)
    (Eq. 7). Once G = `num_generations` trajectories are kept, each token of node j gets (Eq. 13 and 15)

    $$
    A_j = \tanh(q_j / \epsilon)\, q_{max} - \bar v,
    $$

    with the terminal's reward unclipped and the mean over the tree's trajectories. Where a trajectory is longer than
    allowed, every value of it is lowered by up to 1 before the mean is taken: see `tree_overlong_share`. They take the
    place of advantages from rewards. As in the released code, steps of a tree without any right trajectory get
    advantages above 0, since their values are closer to 0 than its mean reward is.

    Where a frontier runs empty, which short completions make likely, terminals that were not kept are taken as well,
    and then completions sampled directly; these are single nodes. The paper leaves the case open, and the released
    code stops with an error. Prompts that were solved, but rarely, are replayed: see `tree_replay_accuracy_max`.
    Trajectories are trained without correction for how they were found. Weights of the backup are the paper's; the
    released code counts nodes from 1. Uncertainty is in the priority, as in the paper. Left out: dynamic
    widths, and the reuse of keys and values from
    one step to the next.

    The trees of all prompts grow in lockstep, and each step is one call of the sampler, vLLM included. Groups are
    shared out among the ranks, whichever of them holds their rows.

    Relations:
        DLER resamples prompts without signal and `num_generations` could just be larger; DeepSearch looks for a right
        answer below promising beginnings. It sets the advantages itself: methods that normalize rewards otherwise
        combine, but only act on rows that are not from a tree.

    Paper: [DeepSearch: Overcome the Bottleneck of Reinforcement Learning with Verifiable Rewards via Monte Carlo Tree
    Search](https://huggingface.co/papers/2509.25454).

    Example:

    ```python
    >>> from papertrl import DeepsearchGRPOConfig, DeepsearchGRPOTrainer
    >>> args = DeepsearchGRPOConfig(max_completion_length=4096, tree_dump_dir="trees")  # doctest: +SKIP
    >>> trainer = DeepsearchGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```

    `python -m papertrl.samplers.trees.dump trees/step_000000.json` draws a dumped tree.
    """

    method = declared("deepsearch")
    replaces = {"rollout": {"tree_width": None}, "spread": {"tree_width": None}}
    config_class = DeepsearchGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        # Right completions to replay, by prompt
        self._tree_replay: dict[str, list[list[int]]] = {}
        self._next_tree_dump = 0
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        if self.args.tree_width is not None and self.rollout_func is not None:
            raise ValueError(
                "DeepSearch samples by itself, which `rollout_func` would do as well. Leave `rollout_func` out, or "
                "set `tree_width=None`."
            )
        if self.args.tree_width is not None and self.endings.stops is not None:
            raise ValueError(
                "DeepSearch takes end tokens alone for the end of a completion. Leave `stop_strings` out of the "
                "model's generation config, or set `tree_width=None`."
            )
        name, known = self.args.tree_correctness_reward, self.reward_func_names
        if name is not None and name not in known:
            raise ValueError(f"`tree_correctness_reward` must be one of {known}, got {name!r}.")
        if name is None and len(known) > 1 and self.args.tree_width is not None:
            logger.warning(
                f"DeepSearch takes completions for right by the first of the rewards {known}, '{known[0]}'. Name "
                "another as `tree_correctness_reward`."
            )
        self._correctness_column = 0 if name is None else known.index(name)

    # --- Roll out -----------------------------------------------------------------------------------------------

    def rollout(self, inputs: list[dict[str, Any]], prompts: list[Any]) -> Generation:
        if not self.model.training:
            return super().rollout(inputs, prompts)
        size, rank, world = self.num_generations, self.accelerator.process_index, self.accelerator.num_processes
        prompt_ids = self.tokenize_prompts(prompts)
        # A group's rows may lie on two ranks: each rank searches for whole groups of the global batch
        rows = gather_object(list(zip(inputs, prompts, prompt_ids, strict=True)))
        heads = rows[::size]
        found = {}
        for summary in gather_object(self._grow_trees(heads, range(rank, len(heads), world))):
            found[summary["group"]] = summary
        for group, (_, prompt, _) in enumerate(heads):
            self._remember_right(prompt, found[group])
        self._log_search(list(found.values()))
        mine = range(rank * len(inputs), (rank + 1) * len(inputs))
        trajectories = [found[row // size]["trajectories"][row % size] for row in mine]
        generation = self.complete(
            inputs, prompts, prompt_ids, [t["tokens"] for t in trajectories], [t["logps"] for t in trajectories]
        )
        generation.inputs = [
            row | {NODES: {"lengths": t["lengths"], "advantages": t["advantages"]}}
            for row, t in zip(generation.inputs, trajectories, strict=True)
        ]
        generation.source = [t["source"] for t in trajectories]
        return generation

    def _grow_trees(self, heads: list[tuple], groups: range) -> list[dict[str, Any]]:
        """Search for the `groups` of this rank; `heads` has dataset row, prompt and its tokens of every group."""
        rules = self._tree_rules()
        trees = []
        for group in groups:
            _, prompt, ids = heads[group]
            cached = self._tree_replay.get(_key(prompt))
            trees.append(Tree(ids, rules, grown=cached is not None))
            for tokens in cached or []:
                trees[-1].add(tokens, [math.nan] * len(tokens), correct=True)
        replayed = [len(tree.returned) for tree in trees]

        def verify(asked: list[tuple[int, list[int]]]) -> list[bool]:
            return self._verified([(*heads[groups[i]], tokens) for i, tokens in asked], (*heads[0], heads[0][2][-1:]))

        grow(trees, rules, self._sample_from(heads[0][2]), verify, self._largest)
        self._dump_trees(trees)
        return [
            {"group": group} | self._tree_summary(tree, count)
            for group, tree, count in zip(groups, trees, replayed, strict=True)
        ]

    def _tree_rules(self) -> Rules:
        args = self.args
        return Rules(
            width=args.tree_width,
            step_tokens=-(-self.max_completion_length // args.tree_max_depth),
            max_tokens=self.max_completion_length,
            trajectories=self.num_generations,
            end_tokens=frozenset([*self.eos_token_ids, self.tokenizer.pad_token_id]),
            selection=args.tree_selection,
            uct=args.tree_lambda_uct,
            quality=args.tree_lambda_quality,
            uncertainty=args.tree_lambda_uncertainty,
            depth=args.tree_lambda_depth,
            own=args.tree_lambda_self,
            depth_bonus=args.tree_depth_bonus,
            decay_floor=args.tree_gamma_min,
            incomplete_score=args.tree_incomplete_score,
        )

    def _largest(self, number: int) -> int:
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _sample_from(self, filler: list[int]):
        """Sampler of the search. Ranks sample equally many rows, some from the prompt `filler`, which are dropped."""

        def sample(prompts: list[list[int]], counts: list[int], tokens: int):
            rows = [ids for ids, count in zip(prompts, counts, strict=True) for _ in range(count)]
            wanted = len(rows)
            rows += [filler] * (self._largest(wanted) - wanted)
            completions, logps = self.sample(rows, tokens)
            if logps is None:
                logps = self._logps_of(rows, completions)
            return completions[:wanted], logps[:wanted]

        return sample

    def _logps_of(self, prompts: list[list[int]], completions: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of completions whose sampler does not give them."""
        fill, device = self.tokenizer.pad_token_id, self.accelerator.device
        logps = self.score_rows(
            *pad_rows(prompts, fill, "left", device), *pad_rows(completions, fill, "right", device)
        )
        return [row[: len(ids)] for row, ids in zip(logps.tolist(), completions, strict=True)]

    def _verified(self, asked: list[tuple], filler: tuple) -> list[bool]:
        """Which of (dataset row, prompt, its tokens, completion's tokens) are right; ranks verify equally many."""
        wanted = len(asked)
        most = self._largest(wanted)
        if most == 0:
            return []
        rewards = self.verify(*map(list, zip(*asked, *[filler] * (most - wanted), strict=True)))
        return (rewards[:, self._correctness_column] > self.args.success_threshold).tolist()[:wanted]

    def _tree_summary(self, tree: Tree, replayed: int) -> dict[str, Any]:
        """Trajectories of a tree, of which the first `replayed` are from earlier, and its metrics."""
        args = self.args
        steps = [path(node)[1:] for node in tree.returned]
        lengths = pad_sequence([torch.tensor([len(node.tokens) for node in row]) for row in steps], batch_first=True)
        values = pad_sequence([torch.tensor([node.value for node in row]) for row in steps], batch_first=True)
        penalties = overlong_penalty(lengths.sum(1), self.max_completion_length, args.tree_overlong_share)
        advantages = node_advantages(
            values, lengths, args.tree_q_temperature, args.tree_q_max, args.tree_adv_norm, penalties
        )
        inner = [node.value for row in steps for node in row[:-1]]
        entropies = [value for node in tree.returned if math.isfinite(value := entropy(path(node)))]
        return {
            "trajectories": [
                {
                    "tokens": completion(node),
                    "logps": [None if math.isnan(logp) else logp for step in row for logp in step.logps],
                    "lengths": [len(step.tokens) for step in row],
                    "advantages": advantages[i, : len(row)].tolist(),
                    "correct": node.reward == 1.0,
                    "source": Source.REPLAY if i < replayed else Source.POLICY,
                }
                for i, (node, row) in enumerate(zip(tree.returned, steps, strict=True))
            ],
            "replayed": replayed > 0,
            "metrics": {
                "iterations": tree.iterations,
                "depth_mean": fmean(map(len, steps)),
                "terminal_reward_mean": fmean(node.reward for node in tree.returned),
                "correct_fraction": fmean(node.reward == 1.0 for node in tree.returned),
                "solved_prompt_fraction": float(any(node.reward == 1.0 for node in tree.returned)),
                "cached_prompt_fraction": float(replayed > 0),
                "tokens_per_trajectory": tree.sampled_tokens / len(tree.returned),
            }
            | ({"entropy": fmean(entropies)} if entropies else {})
            | (
                {
                    "saturated_fraction": fmean(
                        math.tanh(abs(value) / args.tree_q_temperature) > _SATURATED for value in inner
                    )
                }
                if inner
                else {}
            ),
        }

    def _remember_right(self, prompt: Any, summary: dict[str, Any]) -> None:
        if self.args.tree_replay_accuracy_max is None:
            return
        fresh = [t for t in summary["trajectories"] if t["source"] == Source.POLICY]
        right = [t["tokens"] for t in fresh if t["correct"]]
        rarely = len(right) <= self.args.tree_replay_accuracy_max * len(fresh)
        if summary["replayed"]:
            if not (fresh and rarely):
                self._tree_replay.pop(_key(prompt), None)
        elif right and rarely:
            self._tree_replay[_key(prompt)] = right

    def _log_search(self, summaries: list[dict[str, Any]]) -> None:
        for name in dict.fromkeys(name for summary in summaries for name in summary["metrics"]):
            values = [s["metrics"][name] for s in summaries if name in s["metrics"]]
            self.log_metric(f"deepsearch/{name}", fmean(values))

    def _dump_trees(self, trees: list[Tree]) -> None:
        step, folder = self.state.global_step, self.args.tree_dump_dir
        if folder is None or step < self._next_tree_dump:
            return
        self._next_tree_dump = step + self.args.tree_dump_steps
        rank = f"_rank{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        Path(folder).mkdir(parents=True, exist_ok=True)
        content = {"step": step, "trees": [tree_as_dict(tree, self.tokenizer.decode) for tree in trees]}
        (Path(folder) / f"step_{step:06}{rank}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    # --- Spread -------------------------------------------------------------------------------------------------

    def spread(self, record: RolloutRecord, scored: ScoredBatch) -> None:
        if not self.model.training:
            return
        # Rows that other methods put in since then are none of a tree, whatever stands in their dataset row
        found = (record.source == Source.POLICY) | (record.source == Source.REPLAY)
        nodes = [row.get(NODES, {"lengths": [0], "advantages": [0.0]}) for row in self.generation.inputs]
        lengths, values = (
            pad_sequence([torch.tensor(row[name]) for row in nodes], batch_first=True).to(record.advantages.device)
            for name in ("lengths", "advantages")
        )
        found = found & (lengths.sum(1) > 0)
        time = record.completion_mask.shape[1]
        rated = scored.usable[scored.local] & ~record.rewards.isnan().all(1)
        advantages = spread_nodes(values, lengths, time) * rated.unsqueeze(1)
        kept = column(record.advantages).expand(-1, time)
        record.advantages = torch.where(found.unsqueeze(1), advantages, kept)

    # --- State --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | {"deepsearch": self._tree_replay}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._tree_replay = dict(state["deepsearch"])


def _key(prompt: Any) -> str:
    """Name of a prompt in the replay buffer."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
