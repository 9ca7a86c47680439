"""SRPO: a policy and its own improver, trained on pairs, for answers that are revised at inference."""

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...evaluation.revision import CHAT_REQUEST, TEXT_TEMPLATE, revision_prompt
from ...losses.preference.srpo import improver_loss, joint_loss
from ...losses.terms import LossTerm
from ...models.tokenization import stack_sequences, template_options, tokenize_prompt
from .base import PreferenceConfig, PreferenceTrainer
from .record import PreferenceRecord
from .replaced import refuse_settings_of_pair_losses


@method_config
class SrpoDPOConfig(PreferenceConfig):
    """Configuration of [`SrpoDPOTrainer`]."""

    srpo_alpha: float | None = method_field(
        0.5,
        "Weight α of the improver's loss against 1 − α of the joint one. 1 trains the improver alone, 0 leaves it "
        "without the anchor that sets its scale. The paper's value is not known. `None` is DPO.",
        ge=0.0,
        le=1.0,
        optional=True,
    )
    srpo_revision_template: str = method_field(
        TEXT_TEMPLATE,
        "Prompt of the improver for text: holds `{answer}`, the answer to improve, and mostly `{prompt}`. The paper's "
        "is not known.",
    )
    srpo_revision_request: str = method_field(
        CHAT_REQUEST, "What the user says to the improver, after the messages of prompt and answer."
    )
    beta: float = method_field(
        0.01,
        "Deviation from the reference model, on log-ratios summed over tokens: losses vanish where their brackets "
        "reach 1/β and 1/(2β) nats. The paper's value is not known.",
        gt=0.0,
    )

    def validate(self) -> None:
        refuse_settings_of_pair_losses(self, "srpo_alpha", None)
        super().validate()
        template = self.srpo_revision_template
        try:
            holds = "\x00" in template.format(prompt="", answer="\x00")
        except (IndexError, KeyError, ValueError):
            holds = False
        if not holds:
            raise ValueError(
                "`srpo_revision_template` must hold `{answer}` and no other braces than those of `{prompt}`, doubled "
                f"ones aside, got {template!r}."
            )


class SrpoDPOTrainer(PreferenceTrainer):
    r"""
    Trains a policy π(y|x) together with its own improver π†(y'|y, x), the same model asked to improve on the answer y:
    the solution of the game between them depends on the preferences alone, not on who wrote the pairs, and answers can
    be revised at inference.

    With h(y) = log π_θ(y|x) − log π_ref(y|x) and h†(a|b) the same for the answer a after the prompt that asks to
    improve on b, summed over tokens, the reference under the same prompt,

    L = (1 − α)·L_J + α·L†
    L_J = mean (½ − (β/2)·[h†(y_w|y_l) − h†(y_l|y_w) + h(y_w) − h(y_l)])²
    L† = mean ½·[(½ − β(h†(y_w|y_l) − h†(y_l|y_l)))² + (½ − β(h†(y_w|y_w) − h†(y_l|y_w)))²]

    Source: arXiv:2406.01660. The min-max objective is the paper's; these losses are our derivation from it (inner
    optimum p(y' ≻ y) = ½ + β[h†(y'|y) − h†(y|y)], outer optimum h(y') − h(y) = h†(y'|y') − h†(y|y)), since no code has
    been released: constants, and the defaults of α, β and the prompts, are not confirmed.

    A pair takes the scores of six sequences under each model instead of two; the improver's two prompts are computed
    once each. Its contexts are two to three times as long: a pair of which `max_length` leaves one of the six without
    completion does not count, and `srpo/dropped_pairs` says how many. Smoothed labels become the soft targets
    p̂ − ½ of the squares, as far as the gradient goes. Other methods' `scores` and `margin` act on h(y_w) − h(y_l).

    [`~papertrl.revise`] answers and revises with the trained model.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`SrpoDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults. A `DPOConfig` keeps its own `beta`.

    Relations:
        - `loss_type="ipo"` of [`~trl.DPOTrainer`] is the squared loss without improver, per token.
        - Not to be confused with other methods called SRPO, such as routers between self-distillation and policy
          optimization.
        - [`IrpoDPOTrainer`](irpo.py) replaces the losses of pairs as well: the two do not combine.

    Paper: [Self-Improving Robust Preference Optimization](https://arxiv.org/abs/2406.01660)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import SrpoDPOConfig, SrpoDPOTrainer, revise
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["3"] * 8})
    >>> args = SrpoDPOConfig("/tmp/srpo", max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> trainer = SrpoDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    {'train_runtime': ..., 'loss/joint': '0.25', 'loss/improver': '0.25', ...}
    TrainOutput(global_step=1, ...)
    >>> [answers] = revise(model.eval(), tokenizer, ["1+1="], num_revisions=2, max_new_tokens=4)
    >>> len(answers)
    3

    ```
    """

    config_class = SrpoDPOConfig
    method = declared("srpo")
    extends = {
        "prepare": {"srpo_alpha": None},
        "collate": {"srpo_alpha": None},
        "statistics": {"srpo_alpha": None},
    }
    replaces = {"pair_losses": {"srpo_alpha": None}}

    # --- Rows ---------------------------------------------------------------------------------------------------

    def prepare(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        dataset = super().prepare(dataset, name)
        options = {
            "tokenizer": self.tokenizer,
            "template": self.args.srpo_revision_template,
            "request": self.args.srpo_revision_request,
        }
        return dataset.map(revision_prompt_ids, fn_kwargs=options)

    def carried(self) -> list[str]:
        columns = ("prompt_ids", "chosen_ids", "rejected_ids", "srpo_after_chosen_ids", "srpo_after_rejected_ids")
        return [*super().carried(), *columns]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        extras = super().collate(examples)
        rows = [
            [(example[f"srpo_after_{before}_ids"], example[f"{answer}_ids"]) for before, answer in _SEQUENCES]
            for example in examples
        ]
        parts = stack_sequences(rows, self.tokenizer.pad_token_id, self.args.max_length, self.args.truncation_mode)
        return extras | dict(zip(_TENSORS, parts, strict=True))

    # --- The step -----------------------------------------------------------------------------------------------

    def statistics(self, model: torch.nn.Module, inputs: dict[str, Any]) -> PreferenceRecord:
        record = super().statistics(model, inputs)
        sequences = [record.extras[name].flatten(0, 1) for name in _TENSORS]
        logps = self.score_sequences(model, *sequences).sum(1)
        ref_logps = self.score_sequences(model, *sequences, role="reference").sum(1)
        log_ratios = (logps - ref_logps).view(-1, len(_SEQUENCES))
        return replace(record, extras={**record.extras, "srpo_log_ratios": log_ratios})

    def pair_losses(
        self,
        record: PreferenceRecord,
        chosen_scores: torch.Tensor,
        rejected_scores: torch.Tensor,
        margin: torch.Tensor,
    ) -> list[LossTerm]:
        alpha = self.args.srpo_alpha
        log_ratios = record.extras["srpo_log_ratios"]
        if record.exchanged:
            log_ratios = log_ratios.flip(1)
        chosen_after_rejected, rejected_after_rejected, chosen_after_chosen, rejected_after_chosen = log_ratios.unbind(
            1
        )
        counts = record.extras["srpo_completion_mask"][:, :, 1:].any(2).all(1)
        for lengths in record.lengths.chunk(2):
            counts = counts & (lengths > 0)
        coef = self.loss_weights[0]
        terms = [
            LossTerm(
                "joint",
                joint_loss(margin, chosen_after_rejected, rejected_after_chosen, self.beta),
                mask=counts,
                coef=coef * (1 - alpha),
            ),
            LossTerm("improver", improver_loss(*log_ratios.unbind(1), self.beta), mask=counts, coef=coef * alpha),
        ]
        if not record.exchanged:
            improvements = [
                chosen_after_rejected - rejected_after_rejected,
                chosen_after_chosen - rejected_after_chosen,
            ]
            self._log_game(terms, torch.stack(improvements, dim=1).detach(), counts)
        return terms

    def _log_game(self, terms: list[LossTerm], improvements: torch.Tensor, counts: torch.Tensor) -> None:
        pairs = counts.sum()
        self.log_means(
            {
                **{f"loss/{term.name}": (term.sum(), pairs) for term in terms},
                "srpo/improver_margins": ((self.beta * improvements.mean(1) * counts).sum(), pairs),
                "srpo/improver_accuracies": (((improvements > 0).float().mean(1) * counts).sum(), pairs),
                "srpo/dropped_pairs": ((~counts).sum(), torch.ones_like(counts).sum()),
            }
        )


# The improver's sequences: the answer that it is to improve on, and the one that is scored
_SEQUENCES = (("rejected", "chosen"), ("rejected", "rejected"), ("chosen", "chosen"), ("chosen", "rejected"))
_TENSORS = ("srpo_input_ids", "srpo_attention_mask", "srpo_completion_mask")


def revision_prompt_ids(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: str, request: str
) -> dict[str, list[int]]:
    """Tokens of the prompts that ask to improve on the chosen and on the rejected answer of a prepared row."""
    columns = {}
    for name in ("chosen", "rejected"):
        # TRL ends texts with the end-of-sequence token
        answer = row[name].removesuffix(tokenizer.eos_token) if isinstance(row[name], str) else row[name]
        prompt = revision_prompt(row["prompt"], answer, template, request)
        columns[f"srpo_after_{name}_ids"] = tokenize_prompt(tokenizer, prompt, template_options(row))
    return columns
