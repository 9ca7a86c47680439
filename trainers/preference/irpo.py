"""IRPO: preference optimization on lists of ranked items, which stand in one context or apart."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl.trainer.utils import pad

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.irpo import (
    exchanged_weights,
    item_scores,
    item_weights,
    list_loss,
    ndcg,
    reciprocal_rank,
)
from ...losses.preference.scores import sequence_logps
from ...losses.terms import LossTerm
from ...models.tokenization import stack_sequences
from .base import PreferenceConfig, PreferenceTrainer
from .ranking import best_and_worst, tokenize_list
from .record import PreferenceRecord
from .replaced import refuse_settings_of_pair_losses

_COLUMNS = ("irpo_prompt_ids", "irpo_completion_ids", "irpo_item_index", "irpo_relevance", "irpo_ranks")
_PLACES = (1, 3, 5, 10)


@method_config
class IrpoDPOConfig(PreferenceConfig):
    """Configuration of [`IrpoDPOTrainer`]."""

    irpo_weighting: str = method_field(
        "dcg",
        "Weight of an item: `dcg` is its part of the discounted cumulative gain, (2^rel − 1) / log2(1 + rank); "
        "`position` leaves out the gain and `inverse_rank` divides it by the rank, the paper's ablations. `none` is "
        "DPO on `chosen` and `rejected`.",
        choices=("dcg", "position", "inverse_rank", "none"),
    )
    irpo_layout: str = method_field(
        "in_context",
        "`in_context` puts all items of a list into one completion, as the paper does, in an order that seed and "
        "row decide. `separate` makes each item a completion of its own after the prompt.",
        choices=("in_context", "separate"),
    )
    irpo_separator: str = method_field("\n", "Stands between the items of a list in context; not scored.")
    irpo_item_score: str = method_field(
        "mean",
        "An item's score: `mean` of its tokens' log-probabilities, as in the paper, or their `sum`.",
        choices=("mean", "sum"),
    )
    irpo_normalize: bool = method_field(
        True,
        "Whether to take means over the items of a list and over their competitors, as the released code does; else "
        "sums, as the objective is written.",
    )
    beta: float = method_field(1.0, "Factor on log-ratios per item. Default of the released code.", gt=0.0)

    def validate(self) -> None:
        refuse_settings_of_pair_losses(self, "irpo_weighting", "none")
        super().validate()


class IrpoDPOTrainer(PreferenceTrainer):
    r"""
    Ranks the items of a list by graded relevance: each relevant item is compared with all others at once, and counts
    by its place as in NDCG.

    With p_i the mean log-probability of the tokens of item i, q_i the same under the reference, r_i = p_i − q_i,

    L = mean over lists of (1/N) Σ_i w_i · (−log σ(−z_i)),  z_i = log( (1/(N−1)) Σ_{j≠i} exp(β(r_j − r_i)) ),
    w_i = (2^rel_i − 1) / log2(1 + rank_i)

    Source: arXiv:2504.15477. Loss, weights and defaults are those of the released code, but for three things: an
    item's tokens are predicted from the position before them, not from their own; an item does not compete with
    itself; and lists are averaged, not summed.

    The dataset has `prompt`, `completions` (texts or lists of messages: the items), and `relevance` (graded, 0 for
    irrelevant), `ranks` (1 is best) or `scores`. Ranks default to the order of scores, or of relevance; relevance to
    (N − rank) / (N − 1). A row with `chosen` and `rejected` instead is a list of two, for which the loss in the layout
    `separate` is half of DPO's on log-ratios per token. In context, an item is scored after the items before it, in
    shuffled order. Lists may differ in length. Pairs of the online loop are lists of two.

    To the other stages a list is a pair: its best and its worst item, each with what stands before it. Their
    log-probabilities, rewards and imitation terms, weights of pairs and smoothed labels (the opposite ranking) keep
    their meaning; a change of `scores` or `margin` changes what is logged, not the loss.

    An item of which `max_length` leaves no token drops out with its weight. A list with fewer than two items, or
    without relevant ones, does not count in the mean; `irpo/skipped_lists` and `irpo/dropped_items` say how many.
    Metrics of ranking (`irpo/ndcg@k`, `irpo/mrr`) sort the items by p.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`IrpoDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults (a `DPOConfig` keeps its own `beta`).

    Raises:
        `ValueError`: if a row's columns do not make a list, or items cannot stand in one context.

    Relations:
        - Not Iterative Reasoning Preference Optimization, which has the same initials and is DPO with the imitation
          term of [`RpoDPOTrainer`](rpo.py) per token.
        - [`LnDPOTrainer`](ln_dpo.py) compares two answers per token; prefer it where there is one chosen and one
          rejected.
        - [`SrpoDPOTrainer`](srpo.py) replaces the losses of pairs as well: the two do not combine.

    Paper: [In-context Ranking Preference Optimization](https://arxiv.org/abs/2504.15477)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import IrpoDPOConfig, IrpoDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> row = {"prompt": "even: ", "completions": ["1", "2", "3", "4"], "relevance": [0, 2, 0, 1]}
    >>> dataset = Dataset.from_list([row] * 8)
    >>> args = IrpoDPOConfig("/tmp/irpo", max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> trainer = IrpoDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    {'train_runtime': ..., 'irpo/items': '4', ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = IrpoDPOConfig
    method = declared("irpo")
    extends = {
        "columns": {"irpo_weighting": "none"},
        "prepare": {"irpo_weighting": "none"},
        "collate": {"irpo_weighting": "none"},
    }
    replaces = {
        "statistics": {"irpo_weighting": "none"},
        "scores": {"irpo_weighting": "none"},
        "pair_losses": {"irpo_weighting": "none"},
    }

    # --- Rows ---------------------------------------------------------------------------------------------------

    @classmethod
    def dataset_formats(cls, args: Any) -> tuple[str, ...]:
        formats = super().dataset_formats(args)
        return ("rankings", *formats) if args.online_iterations == 0 else formats

    def as_pairs(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        dataset = super().as_pairs(dataset)
        lists = self.args.irpo_weighting != "none" and "completions" in next(iter(dataset))
        return dataset.map(best_and_worst) if lists else dataset

    def prepare(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        dataset = super().prepare(dataset, name)
        options = {
            "tokenizer": self.tokenizer,
            "layout": self.args.irpo_layout,
            "separator": self.args.irpo_separator,
            "seed": self.args.seed,
        }
        return dataset.map(tokenize_list, fn_kwargs=options)

    def carried(self) -> list[str]:
        return [*super().carried(), *_COLUMNS]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        extras = super().collate(examples)
        input_ids, attention_mask, item_index = stack_sequences(
            [[(row["irpo_prompt_ids"], ids) for ids in row["irpo_completion_ids"]] for row in examples],
            self.tokenizer.pad_token_id,
            self.args.max_length,
            self.args.truncation_mode,
            marks=[row["irpo_item_index"] for row in examples],
        )
        return {
            **extras,
            "irpo_input_ids": input_ids,
            "irpo_attention_mask": attention_mask,
            "irpo_item_index": item_index,
            "irpo_relevance": pad([torch.tensor(example["irpo_relevance"]) for example in examples]),
            # 0 where the list has no item
            "irpo_ranks": pad([torch.tensor(example["irpo_ranks"]) for example in examples]),
        }

    # --- The step -----------------------------------------------------------------------------------------------

    def statistics(self, model: torch.nn.Module, inputs: dict[str, Any]) -> PreferenceRecord:
        extras = inputs["extras"]
        per_token, aux_loss = self._score_lists(model, extras)
        tokens, ranks = extras["irpo_item_index"][:, :, 1:].flatten(1), extras["irpo_ranks"]
        (scores, present), (ref_scores, _) = (
            item_scores(per_token[name].flatten(1), tokens, ranks.shape[1], self.args.irpo_item_score == "mean")
            for name in ("per_token_logps", "ref_per_token_logps")
        )
        best = ranks.where(present, torch.inf).argmin(1)
        worst = ranks.where(present, -torch.inf).argmax(1)
        pairs = self._rows_of_items(extras, torch.stack([best, worst]), per_token)
        shift_mask = pairs["completion_mask"][:, 1:]
        return PreferenceRecord(
            **pairs,
            logps=sequence_logps(pairs["per_token_logps"], shift_mask),
            ref_logps=sequence_logps(pairs["ref_per_token_logps"], shift_mask),
            aux_loss=aux_loss,
            extras={
                **extras,
                "irpo_scores": scores.detach(),
                "irpo_log_ratios": scores - ref_scores,
                "irpo_present": present,
                "irpo_ends": torch.stack([best, worst], dim=1),
            },
        )

    def _score_lists(
        self, model: torch.nn.Module, extras: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Per-token fields of the record, of shape `(lists, rows of a list, time)`, and the auxiliary loss."""
        exists = extras["irpo_attention_mask"].any(2)
        rows = {name: extras[f"irpo_{name}"][exists] for name in ("input_ids", "attention_mask")}
        # From the first item on, with what stands between items
        scored = (extras["irpo_item_index"][exists].cummax(1).values > 0) * rows["attention_mask"]
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self.score_tokens(model, {**rows, **router}, scored)
        ref_logps = self.reference_logps(rows, scored)
        fields = {"per_token_logps": outputs["log_probs"], "ref_per_token_logps": ref_logps}
        observed = ("entropy", "mean_logits", "is_top1", *(["log_sum_sq_probs"] if self.use_weighting else []))
        fields |= {name: outputs[name].detach() for name in observed}
        place = exists.unsqueeze(2)
        return {
            name: values.new_zeros(*exists.shape, values.shape[1]).masked_scatter(place, values)
            for name, values in fields.items()
        }, outputs["aux_loss"] if self.aux_loss_enabled else None

    def _rows_of_items(
        self, extras: dict[str, torch.Tensor], items: torch.Tensor, per_token: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Rows of a record that end with the given items, `(2, lists)`: what stands before an item is its prompt."""
        lists = torch.arange(items.shape[1], device=items.device)
        belongs = extras["irpo_item_index"] == (items + 1)[:, :, None, None]
        at = (lists.repeat(2), belongs.any(3).long().argmax(2).flatten())
        completion_mask = belongs.flatten(0, 1)[torch.arange(items.numel(), device=items.device), at[1]].long()
        # An item of which no token is left keeps its whole row
        until_end = completion_mask.flip(1).cummax(1).values.flip(1)
        until_end = until_end.where(completion_mask.any(1, keepdim=True), 1)
        attention_mask = extras["irpo_attention_mask"][at] * until_end
        outside = completion_mask[:, 1:] == 0
        return {
            "input_ids": extras["irpo_input_ids"][at].masked_fill(attention_mask == 0, self.tokenizer.pad_token_id),
            "attention_mask": attention_mask,
            "completion_mask": completion_mask,
            **{name: values[at].masked_fill(outside, 0) for name, values in per_token.items()},
        }

    def scores(self, record: PreferenceRecord) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, rejected = record.extras["irpo_log_ratios"].gather(1, record.extras["irpo_ends"]).unbind(1)
        return chosen, rejected

    def pair_losses(
        self,
        record: PreferenceRecord,
        chosen_scores: torch.Tensor,
        rejected_scores: torch.Tensor,
        margin: torch.Tensor,
    ) -> list[LossTerm]:
        extras = record.extras
        ranks, present = extras["irpo_ranks"], extras["irpo_present"]
        weights = item_weights(extras["irpo_relevance"], ranks, present, self.args.irpo_weighting)
        if record.exchanged:
            weights = exchanged_weights(weights, ranks, present)
        values, z = list_loss(extras["irpo_log_ratios"], weights, present, self.beta, self.args.irpo_normalize)
        counts = (present.sum(1) > 1) & (weights > 0).any(1)
        if not record.exchanged:
            self._log_lists(record, z.detach(), counts)
        return [LossTerm("irpo", values, mask=counts, coef=self.loss_weights[0])]

    def _log_lists(self, record: PreferenceRecord, z: torch.Tensor, counts: torch.Tensor) -> None:
        names = ("scores", "relevance", "ranks", "present")
        scores, relevance, ranks, present = (record.extras[f"irpo_{name}"] for name in names)
        relevant = present & (relevance > 0)
        lists, ranked, listed = torch.ones_like(counts).sum(), relevant.any(1).sum(), (ranks > 0).sum()
        quality = {f"ndcg@{k}": ndcg(scores, relevance, present, k) for k in _PLACES}
        quality["mrr"] = reciprocal_rank(scores, relevance, present)
        means = {name: (values.sum(), ranked) for name, values in quality.items()} | {
            "items": (present.sum(), lists),
            "relevant_z": ((z * relevant).sum(), relevant.sum()),
            "skipped_lists": ((~counts).sum(), lists),
            "dropped_items": (listed - present.sum(), listed),
        }
        self.log_means({f"irpo/{name}": sums for name, sums in means.items()})
