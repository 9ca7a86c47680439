"""UPO: pairs whose labels a classifier is sure of, the others smoothed or left out."""

from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.rpo import sequence_nll
from ...losses.preference.scores import either_wrong
from ...losses.preference.upo import (
    bald,
    draw_pairs,
    halves,
    majority_agrees,
    selection_probabilities,
    smoothing_alpha,
)
from ...losses.terms import LossTerm
from ...models.uncertainty import (
    PairClassifier,
    TokenizedPair,
    copied_backbone,
    fit,
    label_probabilities,
    loaded_backbone,
)
from .base import PreferenceConfig, PreferenceTrainer
from .online.candidates import Candidate, Group, Pair
from .record import PreferenceRecord


@method_config
class UpoDPOConfig(PreferenceConfig):
    """Configuration of [`UpoDPOTrainer`]."""

    upo_mc_passes: int = method_field(
        10,
        "Monte-Carlo-dropout passes T of the estimator over each pair, at least 2; 0 does without estimator, "
        "selection and smoothing. Default of the authors' code.",
        ge=0,
    )
    upo_dropout: float = method_field(
        0.1, "Dropout rate of the estimator. Default of the authors' code, there in adapters.", gt=0.0, lt=1.0
    )
    upo_estimator: str | None = method_field(
        None,
        "Model that the estimator is made of: id or folder. Unset, a copy of the policy without its adapter, at the "
        "time when it is needed.",
    )
    upo_estimator_learning_rate: float = method_field(
        2e-5, "Learning rate of the estimator. Default of the authors' code.", gt=0.0
    )
    upo_estimator_epochs: int = method_field(
        2, "Passes of the estimator's training over the labeled pairs. Default of the authors' code.", ge=1
    )
    upo_estimator_batch_size: int = method_field(32, "Pairs per step, and per forward, of the estimator.", ge=1)
    upo_mu: float = method_field(
        1.0, "μ: a pair of uncertainty B is drawn in proportion to (1 - B)^μ. Default of the authors' code.", gt=0.0
    )
    upo_select_rate: float = method_field(
        0.5,
        "Share of the pairs with which the estimator agrees that is drawn. Default of the authors' code.",
        gt=0.0,
        le=1.0,
    )
    upo_hard_rate: float = method_field(
        0.0,
        "Share, of the same pairs, that is drawn in addition from those left, in proportion to their uncertainty. The "
        "authors' code adds 0.2.",
        ge=0.0,
        le=1.0,
    )
    upo_original_rate: float = method_field(
        0.0,
        "Share of an iteration's prompts whose labeled pair in the dataset (`chosen`, `rejected`) is trained on as "
        "well. The authors' code adds 0.4.",
        ge=0.0,
        le=1.0,
    )
    upo_alpha_mode: str = method_field(
        "certainty",
        "How much of a pair's loss is that of the exchanged labels: `certainty`, α_max · B / log 2; `scaled`, "
        "1/(1 + nP); `paper`, 1/(1 + P), which turns nearly all labels around; `none`, 0, as in the authors' code.",
        choices=("certainty", "scaled", "paper", "none"),
    )
    upo_alpha_max: float = method_field(0.5, "α_max of `certainty`.", gt=0.0, le=0.5)
    upo_nll_coef: float = method_field(
        0.0, "λ: weight of the mean of -log π(chosen) per token. The paper's is not known; the code has none.", ge=0.0
    )
    upo_pairing: str = method_field(
        "halves",
        "How candidates become pairs: `halves`, each of the upper half of scores against each of the lower half; "
        "`none` leaves it to the base or another method.",
        choices=("halves", "none"),
    )
    online_iterations: int = method_field(
        3, "Iterations of the online loop. Default of the paper. 0 selects among the dataset's pairs instead.", ge=0
    )
    online_num_samples: int = method_field(
        4, "Completions per prompt. The paper has at least 4, the authors' code 6.", ge=1
    )
    online_reference: str = method_field(
        "previous",
        "Reference model of an iteration: `initial`, `previous` or `ema`. The paper has the previous policy.",
        choices=("initial", "previous", "ema"),
    )

    def validate(self) -> None:
        super().validate()
        if self.upo_mc_passes == 1:
            raise ValueError("`upo_mc_passes` must be 0 or at least 2, got 1: one pass cannot disagree with itself.")
        if self.upo_original_rate and self.online_iterations == 0:
            raise ValueError(
                f"`upo_original_rate={self.upo_original_rate}` adds labeled pairs to sampled ones and needs "
                "`online_iterations` > 0. Set it to 0: without the loop, all pairs are the dataset's."
            )


class UpoDPOTrainer(PreferenceTrainer):
    """
    Trains on pairs whose labels a separate classifier is sure of: it drops those that it contradicts, draws the rest
    by certainty, and smooths what remains uncertain.

    The estimator f_ψ reads prompt and both completions and says which is better. It learns from labeled pairs, then
    makes T passes over each pair with its dropout on, in both orders. With p_t the probability of the label,

    B = H(mean_t p_t) − mean_t H(p_t),  P_j = (1 − B_j)^μ / Σ_k (1 − B_k)^μ

    over the pairs where the majority of passes agrees with the label. A share `upo_select_rate` of them is drawn with
    P, and

    L = −mean_j[(1 − α_j) log σ(βΔ_j) + α_j log σ(−βΔ_j)] + λ · mean_j[−log π_θ(y_w|x) / |y_w|]

    or the like of another `loss_type`; see [`~papertrl.losses.preference.upo.smoothing_alpha`] for α.

    With the online loop, pairs are the policy's own completions, upper against lower half of their scores, and the
    estimator learns from the pairs of the dataset if it has `chosen` and `rejected`, otherwise from those of the
    round. With `online_iterations=0` it learns from the dataset's pairs and selects among the same: noisy labels.

    What is read into the paper: μ as an exponent, because as a factor it cancels; the negative sign of the likelihood;
    α by default from B, because the printed 1/(1 + P) is close to 1 and would turn labels around. The authors' code
    trains plain DPO.

    The estimator's dropout acts in every layer, as that of the authors' adapters. With the default rate B was 0.001 to
    0.03 nats in our runs, so that the vote of the passes decides on most of the selection and the default α smooths
    little; a higher `upo_dropout` raises both. In the one task on which we compared, B was about twice as high for
    pairs that are hard to tell apart as for others; how it is elsewhere was not measured. A classifier that has
    learned nothing says ½ with little uncertainty too: watch `upo/confidence`, the mean distance of its probabilities
    from ½, and let it learn longer.

    Left out are further samplings of the authors' code (a random quarter of the pairs, the 30% of largest margin, the
    dataset's answer among the candidates), adapters in the estimator, and the division of the likelihood by the
    reward, which explodes near 0.

    Args:
        model, ref_model, args, reward_funcs, judge, ...:
            As for [`PreferenceTrainer`](base.py); `args` is a [`UpoDPOConfig`], or a [`~trl.DPOConfig`] to take the
            method's defaults.

    Raises:
        `ValueError`: if the dataset is an iterable one, or the policy sharded and no `upo_estimator` given, or no pair
            is left because the estimator contradicts all.

    Relations:
        - `loss_type="robust"` and `label_smoothing` of [`~trl.DPOTrainer`] smooth all pairs alike.
        - [`RsoDPOTrainer`](rso.py) selects candidates by reward, before there are pairs; both decide on the stage
          *pair*.
        - [`RpoDPOTrainer`](rpo.py) with `sequence_mean` has the same term on chosen completions.

    Paper: [Self-Evolutionary Large Language Models through Uncertainty-Enhanced Preference
    Optimization](https://arxiv.org/abs/2409.11212)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import UpoDPOConfig, UpoDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["3"] * 8})
    >>> args = UpoDPOConfig(
    ...     "/tmp/upo", online_iterations=0, upo_estimator_learning_rate=1e-3, upo_estimator_epochs=20, max_steps=1,
    ...     bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
    ... )
    >>> trainer = UpoDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> len(trainer.train_dataset)
    4
    >>> trainer.train()
    {'train_runtime': ..., 'upo/alpha': ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = UpoDPOConfig
    method = declared("upo")
    extends = {
        "select_pairs": ({"online_iterations": 0}, {"upo_mc_passes": 0}),
        "collate": {"upo_mc_passes": 0},
        "smoothing": {"upo_mc_passes": 0},
        "extra_terms": {"upo_nll_coef": 0.0},
    }
    replaces = {"pair": ({"online_iterations": 0}, {"upo_pairing": "none"})}

    def __init__(self, model, ref_model=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, ref_model, args, *trl_args, **trl_kwargs)
        # Of a selection among the dataset's pairs
        self._upo_summary: dict[str, float] = {}
        if self.args.upo_mc_passes == 0:
            return
        if self.args.upo_estimator is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "`upo_estimator` is unset, and a policy that FSDP or DeepSpeed shards cannot be copied. Set "
                "`upo_estimator` to a model."
            )
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"`train_dataset` must be a map-style `Dataset` for `upo_mc_passes` > 0, got "
                f"`{type(self.train_dataset).__name__}`."
            )
        if self.args.online_iterations == 0:
            pairs = tokenized(self.train_dataset)
            places, columns, self._upo_summary = self._upo_select(pairs, pairs)
            if not places:
                raise ValueError(
                    f"`train_dataset`: the estimator contradicts the labels of all {len(pairs)} pairs. Let it learn "
                    "more, by `upo_estimator_learning_rate` or `upo_estimator_epochs`."
                )
            self.train_dataset = self.train_dataset.select(places)
            for name, values in columns.items():
                self.train_dataset = self.train_dataset.add_column(name, values)

    # --- Rounds -------------------------------------------------------------------------------------------------

    def pair(self, groups: list[Group]) -> list[Pair]:
        pairs = []
        for group in groups:
            scored = group.scored()
            places = halves([candidate.score for candidate in scored])
            pairs += [Pair(group, scored[chosen], scored[rejected]) for chosen, rejected in places]
        return pairs

    def select_pairs(self, pairs: list[Pair]) -> list[Pair]:
        labeled = self._upo_labeled()
        # Through the hands of other methods as well, as all pairs must have the same columns
        originals = self._upo_originals(pairs, labeled)
        pairs = super().select_pairs(pairs + originals)
        original = {id(pair) for pair in originals}
        sampled = [pair for pair in pairs if id(pair) not in original]
        kept = [pair for pair in pairs if id(pair) in original]
        for pair in kept:
            pair.extras |= {"upo_alpha": 0.0, "upo_bald": 0.0}
        if not sampled:
            return kept
        tokens = [
            TokenizedPair(pair.group.prompt_ids, pair.chosen.completion_ids, pair.rejected.completion_ids)
            for pair in sampled
        ]
        places, columns, summary = self._upo_select(tokens, list(labeled.values()) or tokens)
        for row, place in enumerate(places):
            sampled[place].extras |= {name: values[row] for name, values in columns.items()}
        self.log_round({f"upo_{name}": value for name, value in summary.items()})
        return [sampled[place] for place in places] + kept

    def _upo_labeled(self) -> dict[int, TokenizedPair]:
        """The dataset's own pairs, by row; none if it holds prompts only."""
        if not {"chosen", "rejected"} <= set(self.train_dataset.column_names):
            return {}
        return dict(enumerate(tokenized(self.tokenize_pairs(self.train_dataset, "labeled pairs"))))

    def _upo_originals(self, pairs: list[Pair], labeled: dict[int, TokenizedPair]) -> list[Pair]:
        """Labeled pairs of some of the prompts that have sampled ones."""
        groups = list({pair.group.index: pair.group for pair in pairs if pair.group.index in labeled}.values())
        count = round(self.args.upo_original_rate * len(groups))
        originals = []
        for group in self.round_random("upo originals").sample(groups, count):
            _, *tokens = labeled[group.index]
            originals.append(
                Pair(
                    group,
                    *(
                        Candidate(group.row[side], ids, finished=True, source="dataset")
                        for side, ids in zip(("chosen", "rejected"), tokens, strict=True)
                    ),
                )
            )
        return originals

    # --- Selection ----------------------------------------------------------------------------------------------

    def _upo_select(
        self, pairs: list[TokenizedPair], labeled: list[TokenizedPair]
    ) -> tuple[list[int], dict[str, list[float]], dict[str, float]]:
        """Draw among `pairs`: their places, their columns, and a summary; the same on every rank."""
        args = self.args
        probabilities, loss = self._upo_probabilities(pairs, labeled)
        uncertainty, eligible = bald(probabilities), majority_agrees(probabilities)
        easy, hard = draw_pairs(
            uncertainty,
            eligible,
            args.upo_mu,
            args.upo_select_rate,
            args.upo_hard_rate,
            torch.Generator().manual_seed(self.round_random("upo").getrandbits(48)),
        )
        weights = selection_probabilities(uncertainty, eligible, args.upo_mu)
        alpha = smoothing_alpha(uncertainty, weights, eligible, args.upo_alpha_mode, args.upo_alpha_max)
        places = torch.cat([easy, hard])
        summary = {
            "estimator_loss": loss,
            "agreement": eligible.float().mean().item(),
            "bald": uncertainty.mean().item(),
            "confidence": (probabilities.mean(0) - 0.5).abs().mean().item(),
            "hard_share": len(hard) / max(1, len(places)),
            "selected_share": len(places) / len(pairs),
        }
        columns = {"upo_alpha": alpha[places].tolist(), "upo_bald": uncertainty[places].tolist()}
        return places.tolist(), columns, summary

    def _upo_probabilities(
        self, pairs: list[TokenizedPair], labeled: list[TokenizedPair]
    ) -> tuple[torch.Tensor, float]:
        """
        What the passes of an estimator that learned from `labeled` say of `pairs`, `(passes, pairs)`, and its loss.

        The same on every rank, and without a trace in the global generators.
        """
        args = self.args
        size = args.upo_estimator_batch_size
        with torch.random.fork_rng():
            torch.manual_seed(self.round_random("upo").getrandbits(48))
            if args.upo_estimator is None:
                policy = self.accelerator.unwrap_model(self.model)
                backbone, read = copied_backbone(policy, args.trust_remote_code), TokenizedPair
            else:
                backbone, read = loaded_backbone(args.upo_estimator, self.tokenizer, args.trust_remote_code)
            classifier = PairClassifier(backbone.to(self.accelerator.device), args.upo_dropout)
            labeled, pairs = [read(*pair) for pair in labeled], [read(*pair) for pair in pairs]
            loss = fit(classifier, labeled, args.upo_estimator_epochs, args.upo_estimator_learning_rate, size)
            # What this rank finds, kernels that do not add in a fixed order may find otherwise elsewhere
            found = [label_probabilities(classifier, pairs, args.upo_mc_passes, size), loss]
        broadcast_object_list(found)
        return tuple(found)

    # --- The step -----------------------------------------------------------------------------------------------

    def carried(self) -> list[str]:
        return [*super().carried(), "upo_alpha"]

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # Pairs to evaluate on are taken as they are labeled
        alpha = torch.tensor([example.get("upo_alpha", 0.0) for example in examples])
        return {**super().collate(examples), "upo_alpha": alpha}

    def smoothing(self, record: PreferenceRecord) -> torch.Tensor | None:
        alpha = record.extras["upo_alpha"]
        self.log_mean("upo/alpha", alpha.sum(), alpha.new_tensor(len(alpha)))
        for name, value in self._upo_summary.items():
            self.log_metric(f"upo/{name}", value)
        return either_wrong(super().smoothing(record), alpha)

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        terms = super().extra_terms(model, record)
        logps, _ = record.per_token_logps.chunk(2)
        mask, _ = record.shift_completion_mask.chunk(2)
        return [*terms, LossTerm("upo_nll", sequence_nll(logps, mask, per_token=True), coef=self.args.upo_nll_coef)]


def tokenized(dataset: Dataset) -> list[TokenizedPair]:
    """Token ids of prepared rows."""
    columns = (dataset[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return [TokenizedPair(*ids) for ids in zip(*columns, strict=True)]
