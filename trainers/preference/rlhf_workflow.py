"""RLHF Workflow: online iterative DPO on two of many sampled completions."""

from statistics import fmean

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.rlhf_workflow import CHOOSE_TYPES, choose_pair
from ...losses.preference.scores import either_wrong
from .base import PreferenceConfig, PreferenceTrainer
from .online.candidates import Group, Pair
from .record import PreferenceRecord


@method_config
class RlhfWorkflowDPOConfig(PreferenceConfig):
    """Configuration of [`RlhfWorkflowDPOTrainer`]."""

    rlhf_choose_type: str = method_field(
        "max_min",
        "Which two of a prompt's completions make a pair: the one with the highest score, and the worst (`max_min`), "
        "the first other one (`max_random`) or the second best (`max_max`); or best and worst by the score less "
        "`rlhf_length_penalty` for each token (`max_min_p`).",
        choices=CHOOSE_TYPES,
    )
    rlhf_length_penalty: float = method_field(
        0.0, "λ of `max_min_p`, in score per token; the authors' code counts characters.", ge=0.0
    )
    rlhf_order_by: str = method_field(
        "penalized",
        "Which of the two that `max_min_p` picked is the chosen one: that of the higher penalized score, or, as in "
        "the authors' code, of the higher score without penalty (`raw`), so that the longer one can win.",
        choices=("penalized", "raw"),
    )
    rlhf_label_smoothing: float = method_field(
        0.0,
        "How likely a label is wrong, in every pair and for every loss: (1 − ε)·ℓ(chosen, rejected) + ε·ℓ(rejected, "
        "chosen). 0.1 in the authors' script for short runs.",
        ge=0.0,
        lt=0.5,
    )
    online_iterations: int = method_field(
        3, "Iterations of the online loop, each on fresh prompts. Default of the paper; 0 is DPO.", ge=0
    )
    online_num_samples: int = method_field(8, "Completions sampled per prompt. Default of the paper.", ge=1)
    online_max_new_tokens: int = method_field(
        2048, "Longest sampled completion, in tokens. Default of the authors' script.", ge=1
    )
    online_reference: str = method_field(
        "previous",
        "Reference model of an iteration: `initial`, as given, to which the paper's theory refers; `previous`, the "
        "policy with which the iteration begins, as in the authors' scripts; or `ema`, an average over such policies.",
        choices=("initial", "previous", "ema"),
    )
    max_length: int | None = method_field(
        2048, "Longest prompt and completion together, in tokens. Default of the authors' script.", ge=1
    )

    def validate(self) -> None:
        super().validate()
        if self.rlhf_length_penalty and self.rlhf_choose_type != "max_min_p":
            raise ValueError(
                f"`rlhf_length_penalty={self.rlhf_length_penalty}` acts with `rlhf_choose_type='max_min_p'` alone, "
                f"got {self.rlhf_choose_type!r}. Set one of the two."
            )


class RlhfWorkflowDPOTrainer(PreferenceTrainer):
    r"""
    Iterates: many completions of fresh prompts by the current policy, a proxy preference model that scores them, two
    of them as a pair, and DPO on these pairs.

    In iteration t, with n completions y₁ … y_n ~ π_{t−1}(·|x) of each prompt x and their scores r,

    y_w = argmax r,  y_l = argmin r,  L = −mean log σ(β · (h(y_w) − h(y_l)))   (`rlhf_choose_type="max_min"`)

    with h = log π_θ − log π_ref summed over tokens, and π_ref = π_{t−1} (`online_reference="previous"`). Best against
    worst stands for the paper's pair of a main and an exploring agent. Prompts whose two completions score the same
    are left out, and completions without a score count as not there. A score may come from a reward model or function
    (`reward_funcs=`), or be the mean probability to win against the prompt's other completions under a pairwise
    preference model (`judge=`).

    Scores of proxies tend to favor length. `max_min_p` selects by r − λ·|y| instead. `online/rlhf_reward_gap` and
    `online/rlhf_length_gap` say by how much the chosen completions lead, in score and in tokens, and
    `online/rlhf_dropped_share` how many prompts had no pair. With `rlhf_label_smoothing` ε,
    L = −mean [(1 − ε) log σ(βΔ) + ε log σ(−βΔ)].

    The reading implemented is that of the authors' scripts, but for: lengths in tokens; pairs ordered by the score
    that selected them (`rlhf_order_by="raw"` for theirs); the optimizer and its schedule, which go through all
    iterations, while the scripts start anew with each.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`RlhfWorkflowDPOConfig`], or a [`~trl.DPOConfig`] to take the
            method's defaults.
        reward_funcs, judge, reward_processing_classes:
            As for [`~papertrl.PreferenceTrainer`].

    Relations:
        - TRL's experimental `OnlineDPOTrainer` samples two completions in every step. Here a round samples for many
          steps at once, and the best and the worst of many are further apart.
        - [`XpoDPOTrainer`](xpo.py) draws one of the completions from the reference and explores away from it; the two
          combine.
        - [`~trl.GRPOTrainer`] learns from all completions of a prompt; prefer it where the reward is exact.

    Paper: [RLHF Workflow: From Reward Modeling to Online RLHF](https://arxiv.org/abs/2405.07863)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from tempfile import mkdtemp
    >>> from datasets import Dataset
    >>> from papertrl import RlhfWorkflowDPOConfig, RlhfWorkflowDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> def digits(completions, **kwargs):
    ...     return [sum(c.isdigit() for c in text) for text in completions]

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> args = RlhfWorkflowDPOConfig(
    ...     mkdtemp(), online_iterations=1, online_num_samples=4, online_max_new_tokens=4, max_steps=1,
    ...     bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    ... )
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8})
    >>> trainer = RlhfWorkflowDPOTrainer(
    ...     model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer, reward_funcs=digits
    ... )
    >>> trainer.train()
    {'train_runtime': ..., 'online/rlhf_reward_gap': ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = RlhfWorkflowDPOConfig
    method = declared("rlhf_workflow")
    extends = {"smoothing": {"rlhf_label_smoothing": 0.0}}
    replaces = {"pair": {"online_iterations": 0}}

    def pair(self, groups: list[Group]) -> list[Pair]:
        args = self.args
        pairs = []
        for group in groups:
            scored = group.scored()
            places = choose_pair(
                [candidate.score for candidate in scored],
                [len(candidate.completion_ids) for candidate in scored],
                args.rlhf_choose_type,
                args.rlhf_length_penalty,
                args.rlhf_order_by,
            )
            if places is not None:
                chosen, rejected = places
                pairs.append(Pair(group, scored[chosen], scored[rejected]))
        self.log_round({"rlhf_dropped_share": 1 - len(pairs) / len(groups)})
        if pairs:
            lengths = [len(pair.chosen.completion_ids) - len(pair.rejected.completion_ids) for pair in pairs]
            gaps = [pair.chosen.score - pair.rejected.score for pair in pairs]
            self.log_round({"rlhf_reward_gap": fmean(gaps), "rlhf_length_gap": fmean(lengths)})
        return pairs

    def smoothing(self, record: PreferenceRecord) -> torch.Tensor | None:
        flip = record.logps.new_full((len(record.logps) // 2,), self.args.rlhf_label_smoothing)
        return either_wrong(super().smoothing(record), flip)
