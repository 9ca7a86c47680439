"""DRIFT: iterated DPO of improved answers against the answers that users were not satisfied with."""

import string
from collections import Counter
from typing import Any

import torch
from trl.data_utils import is_conversational

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.drift import unusable
from ...losses.terms import LossTerm
from ...metrics.estimators import distinct_n
from ...models.tokenization import template_options, tokenize_prompt
from ...rewards.matching import completion_text
from .base import PreferenceConfig, PreferenceTrainer
from .online.candidates import Group, Pair
from .record import PreferenceRecord

TEMPLATE_FIELDS = ("prompt", "rejected", "feedback", "instruction")
Messages = list[dict[str, Any]]


@method_config
class DriftDPOConfig(PreferenceConfig):
    """Configuration of [`DriftDPOTrainer`]."""

    drift_instruction: str = method_field(
        "Take this into account and answer the original request again, better than before. Give the answer alone.",
        "What is asked after the user's feedback. The paper's wording is another one.",
    )
    drift_text_template: str = method_field(
        "{prompt}{rejected}\n{feedback}\n{instruction}\n",
        "How prompt, rejected answer, feedback and instruction become one text, for prompts that are text; messages "
        "become further turns.",
    )
    drift_max_prompt_length: int = method_field(
        2048, "Longest such prompt, in tokens; the oldest part of the history is cut. The paper's.", ge=1
    )
    drift_drop_unfinished: bool = method_field(
        False,
        "Whether sampled answers that were cut at `online_max_new_tokens` are dropped. The paper's code keeps them.",
    )
    drift_nll_coef: float = method_field(
        0.001, "ω: weight of the chosen answers' negative log-likelihood per token. The paper's code.", ge=0.0
    )
    online_iterations: int = method_field(
        2, "Iterations of the online loop; 0 trains on the dataset's pairs. The paper's number.", ge=0
    )
    online_reuse_prompts: bool = method_field(
        True, "Whether every iteration answers the same dissatisfied turns. In the paper each answers all of them."
    )
    online_num_samples: int = method_field(1, "Improved answers sampled per rejected one. The paper's number.", ge=1)
    online_max_new_tokens: int = method_field(512, "Longest sampled answer, in tokens. The paper's.", ge=1)
    online_temperature: float = method_field(0.7, "Temperature of sampling. The paper's.", gt=0.0)
    online_top_p: float = method_field(0.9, "Nucleus of sampling. The paper's.", gt=0.0, le=1.0)
    online_reference: str = method_field(
        "previous",
        "Reference model of an iteration; see [`PreferenceConfig`]. The paper's is the model that begins it.",
        choices=("initial", "previous", "ema"),
    )

    def validate(self) -> None:
        super().validate()
        try:
            named = {name for _, name, _, _ in string.Formatter().parse(self.drift_text_template) if name is not None}
        except ValueError:
            named = set()
        if not {"prompt", "rejected", "feedback"} <= named <= set(TEMPLATE_FIELDS):
            raise ValueError(
                "`drift_text_template` must contain {prompt}, {rejected} and {feedback}, may contain {instruction}, "
                f"and nothing else in braces, got {self.drift_text_template!r}."
            )


class DriftDPOTrainer(PreferenceTrainer):
    """
    Learns from dissatisfied users: what they rejected stays the rejected answer, and the chosen one is sampled anew
    from the current policy, which is shown the rejected answer and what the user said of it.

    In iteration k, y⁺ ~ π_k(· | x, y⁻, f, instruction), and L = L_DPO(x, y⁺, y⁻) + ω · mean over chosen tokens of
    −log π_θ(y⁺_t | x), with π_k as reference. Feedback f and instruction stand in the prompt of sampling only; y⁺ is
    scored under x alone, where it may be unlikely at first.

    Every iteration answers every row once more, so that each y⁻ meets a new y⁺ each time; `online_num_prompts` limits
    all iterations to the same rows, and `online_reuse_prompts=False` divides the rows among them.

    Rows are dissatisfied turns: `prompt` (x, text or messages), `rejected` (y⁻, the real answer) and `feedback` (f, a
    text, the user's next turn). Answers that are empty or equal y⁻ make no pair. Nobody has to score; reward functions
    or a judge, if given, score samples and rejected answers for the record. What the paper does before, DPO on turns
    that ended well, is a stage of its own: see the recipe. The paper's code writes turns as plain lines, cuts answers
    out of decoded text and cuts long prompts at their end; here messages go through the chat template, the sampled
    tokens are taken as they are, and the history is cut at its beginning. Arguments of the chat template in a row
    (`tools`, `chat_template_kwargs`) hold for scoring, not for sampling.

    Since y⁻ returns in every iteration, its probability falls on and on: watch `logps/rejected`.

    Args:
        model, ref_model, args, ...:
            As for [`PreferenceTrainer`]; `args` is a [`DriftDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults.

    Raises:
        `ValueError`: if the dataset lacks `rejected` or `feedback`, or a row's `feedback` is no text.

    Relations:
        - [`PreferenceTrainer`](base.py) with `online_iterations` pairs the best sample with the worst, which needs a
          reward; both sides then improve together, and their difference shrinks.
        - [`RpoDPOTrainer`](rpo.py) has the same imitation term with `rpo_aggregation="token_mean"`.

    Paper: [DRIFT: Learning from Abundant User Dissatisfaction in Real-World Preference
    Learning](https://arxiv.org/abs/2510.02341)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from tempfile import mkdtemp
    >>> from datasets import Dataset
    >>> from papertrl import DriftDPOConfig, DriftDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> turns = {"prompt": ["1+1="] * 8, "rejected": ["3"] * 8, "feedback": ["Too high."] * 8}
    >>> args = DriftDPOConfig(
    ...     mkdtemp(), max_steps=2, online_max_new_tokens=4, bf16=False, use_cpu=True, report_to="none",
    ...     disable_tqdm=True,
    ... )
    >>> trainer = DriftDPOTrainer(
    ...     model, deepcopy(model), args, train_dataset=Dataset.from_dict(turns), processing_class=tokenizer
    ... )
    >>> trainer.train()
    {'train_runtime': ..., 'online/drift_kept_share': ...}
    TrainOutput(global_step=2, ...)

    ```
    """

    config_class = DriftDPOConfig
    method = declared("drift")
    extends = {
        "columns": {"online_iterations": 0},
        "judge": {"online_iterations": 0},
        "extra_terms": {"drift_nll_coef": 0.0},
    }
    replaces = {"propose": {"online_iterations": 0}, "pair": {"online_iterations": 0}}

    @classmethod
    def needs_scores(cls, args: Any) -> bool:
        return False

    @classmethod
    def dataset_formats(cls, args: Any) -> tuple[str, ...]:
        return ("feedback",)

    def check_online(self, dataset, reward_funcs, judge):
        super().check_online(dataset, reward_funcs, judge)
        missing = {"rejected", "feedback"} - set(dataset.column_names) if self.args.online_iterations > 0 else ()
        if missing:
            raise ValueError(
                f"`train_dataset` lacks {sorted(missing)}: 'drift' needs the rejected answer in `rejected` and the "
                f"user's next turn in `feedback`; its columns are {sorted(dataset.column_names)}."
            )

    # --- Stages -------------------------------------------------------------------------------------------------

    def propose(self, groups: list[Group]) -> None:
        prompts = [self.feedback_prompt(group.row) for group in groups]
        self.draw(groups, self.args.online_num_samples, prompts=prompts)
        for group in groups:
            group.candidates.append(self.dataset_candidate(group, "rejected"))

    def pair(self, groups: list[Group]) -> list[Pair]:
        pairs, reasons = [], Counter()
        for group in groups:
            *sampled, rejected = group.candidates
            for candidate in sampled:
                texts = (completion_text(candidate.completion), completion_text(rejected.completion))
                reason = unusable(*texts, candidate.finished, self.args.drift_drop_unfinished)
                reasons[reason or "kept"] += 1
                if reason is None:
                    pairs.append(Pair(group, candidate, rejected))
        total = sum(reasons.values())
        shares = {
            f"drift_{name}_share": reasons[name] / total for name in ("kept", "empty", "identical", "unfinished")
        }
        chosen = [completion_text(pair.chosen.completion) for pair in pairs]
        self.log_round({**shares, "drift_distinct_2": distinct_n(chosen, 2)})
        return pairs

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        terms = super().extra_terms(model, record)
        logps, _ = record.per_token_logps.chunk(2)
        mask, _ = record.shift_completion_mask.chunk(2)
        return [*terms, LossTerm("drift_nll", -logps, mask=mask, coef=self.args.drift_nll_coef)]

    # --- The prompt of sampling ---------------------------------------------------------------------------------

    def feedback_prompt(self, row: dict[str, Any]) -> str | Messages:
        """Prompt, rejected answer, feedback and instruction of a row; what is too long loses its beginning."""
        if not isinstance(row["feedback"], str):
            raise ValueError(f"`feedback` must be a text in every row, got {row['feedback']!r}.")
        history, write = row["prompt"], self._as_text
        if is_conversational(row):
            history, write = list(row["prompt"]), self._as_messages
        while True:
            prompt = write(history, row)
            tokens = tokenize_prompt(self.tokenizer, prompt, template_options(row))
            excess = len(tokens) - self.args.drift_max_prompt_length
            shorter = self._shortened(history, excess) if excess > 0 else history
            if shorter == history:
                return prompt
            history = shorter

    def _as_text(self, history: str, row: dict[str, Any]) -> str:
        return self.args.drift_text_template.format(
            prompt=history,
            rejected=row["rejected"].removesuffix(self.tokenizer.eos_token),
            feedback=row["feedback"],
            instruction=self.args.drift_instruction,
        )

    def _as_messages(self, history: Messages, row: dict[str, Any]) -> Messages:
        request = f"{row['feedback']}\n\n{self.args.drift_instruction}"
        return [*history, *row["rejected"], {"role": "user", "content": request}]

    def _shortened(self, history: str | Messages, excess: int) -> str | Messages:
        """The history without its oldest turn after a system message, or the last turn without its first tokens."""
        if isinstance(history, str):
            ids = self.tokenizer(history, add_special_tokens=False)["input_ids"]
            return self.tokenizer.decode(ids[excess:])
        system = [message for message in history[:1] if message["role"] == "system"]
        turns = history[len(system) :]
        if len(turns) > 1:
            return [*system, *turns[1:]]
        return [*system, *({**turn, "content": self._shortened(turn["content"], excess)} for turn in turns)]
