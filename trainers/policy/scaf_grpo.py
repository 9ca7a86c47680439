"""Scaf-GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.policy.scaf_grpo import exempt_steps, weakest_success
from .base import PolicyConfig, PolicyTrainer
from .draft import Draft
from .record import ScoredBatch


@method_config
class ScafGRPOConfig(PolicyConfig):
    """Configuration of [`ScafGRPOTrainer`]. The paper samples 8 completions and has no divergence term."""

    scaf_hints_column: str = method_field(
        "hints",
        "Dataset column with a list of prompts that contain hints, from the weakest to the strongest, as text or "
        "messages like the prompt itself. An empty list gives no hints.",
    )
    scaf_exempt_ratio: float = method_field(
        0.15, "Share of the training steps, from the start, in which no hint is given. 1 is GRPO.", ge=0, le=1
    )
    scaf_exempt_steps: int | None = method_field(
        None, "Number of such steps, instead of `scaf_exempt_ratio`. The released script has 50.", ge=0
    )
    scaf_search: str = method_field(
        "sequential",
        "Whether hints are tried one after another until one helps (the paper), or all at once (`parallel`, the "
        "released code): the same result with more tokens and fewer rounds.",
        choices=("sequential", "parallel"),
    )
    scaf_slot: str = method_field(
        "random",
        "Which of the failed completions gives way: a random one (the paper) or the first (the released code).",
        choices=("random", "first"),
    )


class ScafGRPOTrainer(PolicyTrainer):
    r"""
    Scaffolded GRPO: where a whole group fails, the policy's own success with the smallest hint takes one place in it.

    If no completion of a prompt q is solved, hints $h_1, h_2, \dots$ of growing strength are tried with one sample
    each. The first that succeeds replaces one failed completion and is scored under the prompt it was sampled under
    (arXiv:2510.19807, Eq. 4):

    $$
    r_t = \frac{\pi_\theta(o_t \mid o_{<t}, p)}{\pi_{old}(o_t \mid o_{<t}, p)}, \qquad p = q \oplus h^*,
    $$

    so that everything stays on policy and advantages and loss are GRPO's over the repaired group. A group with any
    success is left alone (Eq. 5), as is one that no hint helps. In the first steps no hints are given; the paper ends
    this period where unaided learning stalls and names no rule, hence a share of the steps.

    [`~papertrl.losses.policy.scaf_grpo.cumulative_hints`] makes the ladder of hints from tiers of items.

    Relations:
        Guide-GRPO samples the whole group with a hint and learns it without; the two replace one stage. HPT shows a
        demonstration where no hint helps; the two combine.

    Paper: [Scaf-GRPO: Scaffolded Group Relative Policy Optimization for Enhancing LLM
    Reasoning](https://huggingface.co/papers/2510.19807).

    Example:

    ```python
    >>> from papertrl import ScafGRPOTrainer
    >>> dataset = dataset.map(
    ...     lambda row: {"hints": [f"{row['prompt']}\n{hint}" for hint in cumulative_hints(row["tiers"])]}
    ... )  # doctest: +SKIP
    >>> trainer = ScafGRPOTrainer("Qwen/Qwen3-0.6B", reward, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("scaf_grpo")
    extends = {"columns": {"scaf_exempt_ratio": 1.0, "scaf_exempt_steps": None}}
    replaces = {"repair": {"scaf_exempt_ratio": 1.0, "scaf_exempt_steps": None}}
    config_class = ScafGRPOConfig

    @classmethod
    def needed_columns(cls, args):
        return [*super().needed_columns(args), args.scaf_hints_column]

    def groups_to_repair(self, scored: ScoredBatch) -> torch.Tensor | None:
        if not self._due():
            return None
        failing = self.solved_share(scored) == 0
        self.log_metric("scaf/trigger_rate", failing.float().mean())
        if not bool(failing.any()):
            self.log_metric("scaf/repaired_groups", 0.0)
        return failing

    def repair(self, draft: Draft) -> None:
        if not self._due():
            return
        groups = (self.solved_share(draft.scored) == 0).nonzero().squeeze(1).tolist()
        ladders = {group: self._hints(draft, group) for group in groups}
        levels = max(map(len, ladders.values()), default=0)
        generator = self.keyed_generator(len(groups))
        repaired, total_level = 0, 0
        rounds = [range(levels)] if self.args.scaf_search == "parallel" else [[level] for level in range(levels)]
        for tried in rounds:
            tries = [(g, level) for g in groups for level in tried if level < len(ladders[g])]
            if not tries:
                break
            rows = [draft.rows[draft.places(g)[0]]["inputs"] for g, _ in tries]
            hinted = self.reroll(rows, [ladders[g][level] for g, level in tries])
            group = torch.tensor([groups.index(g) for g, _ in tries], device=hinted.scored.lengths.device)
            first = weakest_success(self.solved(hinted.scored), group, len(groups)).tolist()
            for g, index in zip(groups, first, strict=True):
                if index < len(tries):
                    places = draft.places(g)
                    slot = int(torch.randint(len(places), (), generator=generator))
                    draft.take(places[slot if self.args.scaf_slot == "random" else 0], hinted, index)
                    repaired, total_level = repaired + 1, total_level + tries[index][1] + 1
            groups = [g for g, index in zip(groups, first, strict=True) if index == len(tries)]
        self.log_metric("scaf/repaired_groups", float(repaired))
        self.log_metric("scaf/intractable_groups", float(len(groups)))
        if repaired:
            self.log_metric("scaf/hint_level", total_level / repaired)

    def _due(self) -> bool:
        """Whether hints are given at this step."""
        args = self.args
        exempt = exempt_steps(args.scaf_exempt_ratio, self.state.max_steps, args.scaf_exempt_steps)
        return self.state.global_step >= exempt

    def _hints(self, draft: Draft, group: int) -> list:
        """Different prompts with hints for a group, weakest first."""
        hints = draft.rows[draft.places(group)[0]]["inputs"][self.args.scaf_hints_column]
        return [hint for i, hint in enumerate(hints) if hint not in hints[:i]]
