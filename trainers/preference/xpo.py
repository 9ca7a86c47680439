"""XPO: online DPO that explores by pushing down what a fixed sampling policy says."""

from statistics import fmean
from typing import Any

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.xpo import explored_logps, scheduled
from ...losses.terms import LossTerm
from ...models.tokenization import stack_sequences
from .base import PreferenceConfig, PreferenceTrainer
from .online.candidates import Candidate, Group, Pair
from .record import PreferenceRecord


@method_config
class XpoDPOConfig(PreferenceConfig):
    """Configuration of [`XpoDPOTrainer`]."""

    xpo_alpha: list[float] = method_field(
        [1e-5],
        "Weight α of the exploration term, one value per iteration; the last one holds for all further ones. 0 does "
        "not explore. It competes with β·σ(−βΔ) ≤ β on each token, so that it should stay well below β/2. Default of "
        "TRL's implementation.",
    )
    xpo_sampler: str = method_field(
        "reference",
        "Who writes the completion ỹ that is pushed down, one per prompt: the `reference` model of the iteration, as "
        "in the paper; the current `policy`; or `offline`, the dataset's column `chosen`.",
        choices=("reference", "policy", "offline"),
    )
    online_iterations: int = method_field(
        3, "Iterations of the online loop; 0 is DPO. Default recalled from the paper's experiments.", ge=0
    )
    online_accumulate: bool = method_field(
        True, "Whether pairs of earlier iterations are trained on as well, as in the paper's algorithm."
    )

    online_num_samples: int = method_field(
        1, "Completions of the policy per prompt; ỹ is one more. Default of the paper.", ge=1
    )

    def validate(self) -> None:
        super().validate()
        values = self.xpo_alpha if isinstance(self.xpo_alpha, list) else [self.xpo_alpha]
        self.xpo_alpha = [float(alpha) for alpha in values]
        if not self.xpo_alpha or not all(0 <= alpha < float("inf") for alpha in self.xpo_alpha):
            raise ValueError(f"`xpo_alpha` must be numbers in [0, inf), at least one, got {self.xpo_alpha!r}.")


class XpoDPOTrainer(PreferenceTrainer):
    r"""
    Learns from pairs of the policy's completion and that of a fixed sampling policy, and is optimistic about what
    neither of them says: it lowers the probability of what the sampling policy says.

    In iteration t, with y ~ π_{t−1}(·|x), ỹ ~ π̃(·|x) and the better one of both as y_w,

    L = mean over pairs of [−log σ(β · (h(y_w) − h(y_l))) + α_t · log π_θ(ỹ|x)]

    with h = log π_θ − log π_ref, and all log-probabilities summed over tokens. π̃ is the reference by default. The
    second part, logged as `loss/xpo`, is on the policy's own log-probability, with gradient, and is added whether ỹ
    was chosen or rejected. It has no lower bound; stop if it runs away.

    ỹ is sampled beside `online_num_samples` completions of the policy. With one of these, every pair is of the two.
    With more, the pair is the best against the worst, or what another method makes of all of them, and ỹ is scored
    besides, in a further pass. Where all candidates of a prompt score alike, the policy's sample wins against ỹ, as in
    TRL; where another method replaces the stage *pair*, that method decides. If the two completions are the same text,
    the first part is constant, and the pair explores only. Evaluation reports the first part alone.

    With `loss_type="ipo"`, h is divided by the length of its completion, as in [`~trl.DPOTrainer`]; the second part,
    and TRL's experimental trainer throughout, has sums.

    Pairs of earlier iterations stay (`online_accumulate=True`), as in the paper's Algorithm 1, each with its own ỹ;
    α is that of the iteration that trains.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`XpoDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults.
        reward_funcs, judge, reward_processing_classes:
            As for [`~papertrl.PreferenceTrainer`].

    Relations:
        - TRL's experimental `XPOTrainer` samples in every step, and trains on each pair once.
        - [`RlhfWorkflowDPOTrainer`](rlhf_workflow.py) explores by best against worst of many samples; the two combine.
        - [`HypoDPOTrainer`](hypo.py) pulls the policy towards the reference on its own samples; XPO pushes it away
          on the reference's.

    Paper: [Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient
    RLHF](https://arxiv.org/abs/2405.21046)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from tempfile import mkdtemp
    >>> from datasets import Dataset
    >>> from papertrl import XpoDPOConfig, XpoDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> def digits(completions, **kwargs):
    ...     return [sum(c.isdigit() for c in text) for text in completions]

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> args = XpoDPOConfig(
    ...     mkdtemp(), online_iterations=1, online_max_new_tokens=4, max_steps=1, bf16=False, use_cpu=True,
    ...     report_to="none", disable_tqdm=True, save_strategy="no",
    ... )
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8})
    >>> trainer = XpoDPOTrainer(
    ...     model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer, reward_funcs=digits
    ... )
    >>> trainer.train()
    {'train_runtime': ..., 'loss/xpo': ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = XpoDPOConfig
    method = declared("xpo")
    extends = {
        "propose": {"online_iterations": 0},
        "pair": {"online_iterations": 0},
        "select_pairs": {"online_iterations": 0},
        "collate": {"online_iterations": 0},
        "extra_terms": {"online_iterations": 0},
    }

    def check_online(self, dataset: Any, *judges: Any) -> None:
        super().check_online(dataset, *judges)
        args = self.args
        if args.online_iterations and args.xpo_sampler == "offline" and "chosen" not in dataset.column_names:
            raise ValueError(
                f"`xpo_sampler='offline'` needs the dataset column 'chosen', but the columns are "
                f"{sorted(dataset.column_names)}."
            )

    # --- Rounds -------------------------------------------------------------------------------------------------

    def propose(self, groups: list[Group]) -> None:
        super().propose(groups)
        if self.args.xpo_sampler == "offline":
            for group in groups:
                group.candidates.append(self.dataset_candidate(group, "chosen"))
        else:
            self.draw(groups, 1, source=self.args.xpo_sampler)
        for group in groups:
            group.candidates[-1].extras["xpo"] = True

    def pair(self, groups: list[Group]) -> list[Pair]:
        pairs = super().pair(groups)
        if self.replaced_by("pair") is not None:
            return pairs
        paired = {id(pair.group) for pair in pairs}
        ties = [tie_of(group) for group in groups if id(group) not in paired]
        return pairs + [pair for pair in ties if pair is not None]

    def select_pairs(self, pairs: list[Pair]) -> list[Pair]:
        pairs = super().select_pairs(pairs)
        repeated = []
        for pair in pairs:
            explored = explored_of(pair.group)
            pair.extras["xpo_explored"] = int(pair.chosen is explored) - int(pair.rejected is explored)
            tokens = [] if explored is None else explored.completion_ids
            if self._scores_besides:
                pair.extras["xpo_ids"] = tokens
            repeated.append(any(c.completion_ids == tokens for c in pair.group.candidates if c is not explored))
        sides = [pair.extras["xpo_explored"] for pair in pairs if pair.extras["xpo_explored"]]
        if sides:
            self.log_round(
                {"xpo_explored_win_rate": sides.count(1) / len(sides), "xpo_repeated_share": fmean(repeated)}
            )
        return pairs

    @property
    def _scores_besides(self) -> bool:
        # With two candidates, their pair has what is needed
        return self.args.online_num_samples > 1

    # --- The step -----------------------------------------------------------------------------------------------

    def carried(self) -> list[str]:
        return [*super().carried(), "xpo_explored", *(["xpo_ids"] if self._scores_besides else [])]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().collate(examples)
        # Rows to evaluate on come from no round
        batch["xpo_explored"] = torch.tensor([row.get("xpo_explored", 0) for row in examples])
        if self._scores_besides:
            rows = [[(row["prompt_ids"], row.get("xpo_ids", []))] for row in examples]
            parts = stack_sequences(rows, self.tokenizer.pad_token_id, self.args.max_length, self.args.truncation_mode)
            batch |= dict(zip(_SEQUENCES, [part[:, 0] for part in parts], strict=True))
        return batch

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        terms = super().extra_terms(model, record)
        alpha = scheduled(self.args.xpo_alpha, self.iteration)
        if alpha == 0 or not self.model.training:
            return terms
        if self._scores_besides:
            sequences = [record.extras[name] for name in _SEQUENCES]
            logps = self.score_sequences(model, *sequences).sum(1)
            there = sequences[-1].any(1)
        else:
            explored = record.extras["xpo_explored"]
            logps = explored_logps(record.per_token_logps, explored)
            there = explored != 0
        self.log_metric("xpo/alpha", alpha)
        self.log_mean("xpo/explored_share", there.sum(), there.new_tensor(len(there), dtype=torch.long))
        return [*terms, LossTerm("xpo", logps, mask=there.to(logps), coef=alpha)]


_SEQUENCES = ("xpo_input_ids", "xpo_attention_mask", "xpo_completion_mask")


def explored_of(group: Group) -> Candidate | None:
    """ỹ of a group: the candidate that the sampling policy wrote."""
    return next((candidate for candidate in group.candidates if "xpo" in candidate.extras), None)


def tie_of(group: Group) -> Pair | None:
    """The policy's first sample against ỹ, where both have a score."""
    scored = group.scored()
    explored = [candidate for candidate in scored if "xpo" in candidate.extras]
    others = [candidate for candidate in scored if "xpo" not in candidate.extras]
    return Pair(group, others[0], explored[0]) if explored and others else None
