"""XPO: online DPO that explores by pushing down what a fixed sampling policy says."""

import textwrap
from statistics import fmean
from typing import Any

import torch
from trl.trainer.utils import pad

from ...configuration import method_config, method_field
from ...losses.preference.xpo import explored_logps, scheduled
from ..method import Method
from ..terms import LossTerm
from .base import PreferenceConfig, PreferenceTrainer
from .candidates import Candidate, Group, Pair
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

    def validate(self) -> None:
        super().validate()
        if isinstance(self.xpo_alpha, int | float):
            self.xpo_alpha = [float(self.xpo_alpha)]
        if not self.xpo_alpha or not all(0 <= alpha < float("inf") for alpha in self.xpo_alpha):
            raise ValueError(f"`xpo_alpha` must be numbers in [0, inf), at least one, got {self.xpo_alpha!r}.")
        if self.online_iterations and self.online_num_samples < 2:
            raise ValueError(
                f"`online_num_samples` must be at least 2, one of which is the explored one, got "
                f"{self.online_num_samples}."
            )


class XpoDPOTrainer(PreferenceTrainer):
    r"""
    Learns from pairs of the policy's completion and that of a fixed sampling policy, and is optimistic about what
    neither of them says: it lowers the probability of what the sampling policy says.

    In iteration t, with y ~ π_{t−1}(·|x), ỹ ~ π̃(·|x) and the better one of both as y_w,

    L = mean over pairs of [−log σ(β · (h(y_w) − h(y_l))) + α_t · log π_θ(ỹ|x)]

    with h = log π_θ − log π_ref, and all log-probabilities summed over tokens. π̃ is the reference by default. The
    second part, `loss/xpo`, is on the policy's own log-probability, is added with a plus whether ỹ was chosen or
    rejected, and has its gradient. It has no lower bound: `logps/explored` says where it is.

    Of `online_num_samples` candidates per prompt the last is ỹ. With two of them it is in every pair. With more, the
    pair is the best against the worst, or what another method makes of them, and ỹ is scored besides, in a further
    pass. A tie, in which all candidates of a prompt score alike, is a pair won by the policy's sample, as in TRL;
    where another method replaces the stage *pair*, that method decides. If the two completions are the same text, the
    first part is constant, and the pair explores only. Evaluation reports the first part alone.

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
    >>> from datasets import Dataset
    >>> from papertrl import XpoDPOConfig, XpoDPOTrainer
    >>> from papertrl.tiny import tiny_model, tiny_tokenizer

    >>> def digits(completions, **kwargs):
    ...     return [sum(c.isdigit() for c in text) for text in completions]

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> args = XpoDPOConfig(
    ...     "/tmp/xpo", online_iterations=1, online_max_new_tokens=4, max_steps=1, bf16=False, use_cpu=True,
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
    method = Method(
        name="xpo",
        summary="Online DPO that explores by pushing down samples of the reference",
        extends=("propose", "pair", "select_pairs", "collate", "extra_terms"),
        neutral={"online_iterations": 0},
        signal="xpo/alpha",
    )
    _tag_names = ["trl", "papertrl", "dpo", "xpo"]
    _name = "XPO"
    _paper = {
        "title": "Exploratory Preference Optimization: "
        "Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF",
        "id": "2405.21046",
        "citation": textwrap.dedent("""\
            @article{xie2024exploratory,
                title         = {{Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for Sample-Efficient RLHF}},
                author        = {Tengyang Xie and Dylan J. Foster and Akshay Krishnamurthy and Corby Rosset and Ahmed Awadallah and Alexander Rakhlin},
                year          = 2024,
                eprint        = {arXiv:2405.21046}
            }"""),  # noqa: E501
    }

    @classmethod
    def needed_columns(cls, args: Any) -> list[str]:
        offline = args.online_iterations > 0 and args.xpo_sampler == "offline"
        return super().needed_columns(args) + (["chosen"] if offline else [])

    # --- Rounds -------------------------------------------------------------------------------------------------

    def propose(self, groups: list[Group]) -> None:
        super().propose(groups)
        if self.args.xpo_sampler == "reference":
            self.draw(groups, 1, source="reference")
