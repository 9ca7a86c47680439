"""RSO: preference pairs among candidates that statistical rejection sampling accepts."""

from dataclasses import replace
from statistics import fmean

import torch
from accelerate.utils import broadcast_object_list

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.pair_losses import PAIR_LOSS_INPUTS
from ...losses.preference.rso import Accepted, collapse_equal, point_reward, rejection_sample
from .base import PreferenceConfig, PreferenceTrainer
from .online.candidates import Candidate, Group, Pair
from .record import PreferenceRecord

# Losses of scores and margins alone; 'sft' compares nothing and may stand beside them
_OF_SCORES = [
    name for name, needs in PAIR_LOSS_INPUTS.items() if {"margin", "chosen_scores"} & set(needs) or name == "sft"
]


@method_config
class RsoDPOConfig(PreferenceConfig):
    """Configuration of [`RsoDPOTrainer`]."""

    rso_num_samples: int = method_field(
        8, "Candidates that rejection sampling accepts per prompt. Default of the paper.", ge=2
    )
    rso_beta: float = method_field(
        0.5,
        "β of rejection sampling, in units of the score, not that of the loss: 0 takes the best candidates, a large "
        "value any. Default of the paper, for the logits of its ranker.",
        ge=0.0,
    )
    rso_dedup: bool = method_field(
        True,
        "Whether equal completions of a prompt count as one candidate, as in the paper's listing. That is no longer a "
        "draw from the optimal policy where few completions are likely; turn it off for short answers.",
    )
    rso_pairing: str = method_field(
        "first_round",
        "How accepted candidates become pairs: `first_round` pairs neighbors in the order of acceptance, `tournament` "
        "lets winners go on until one is left; `none` leaves pairs, and the judge, to the base or another method.",
        choices=("first_round", "tournament", "none"),
    )
    rso_normalized: bool = method_field(
        True,
        "Whether completions are compared by log-ratios to the reference. If not, by log-probabilities: with "
        "`loss_type='hinge'` this is the loss of SLiC.",
    )
    online_iterations: int = method_field(
        1,
        "Iterations of the online loop. With 1, as in the paper, all candidates come from the initial policy; 0 "
        "trains on the dataset's pairs.",
        ge=0,
    )
    online_num_samples: int = method_field(64, "Candidates per prompt. Default of the paper.", ge=1)
    online_temperature: float = method_field(0.7, "Temperature of sampling. Default of the paper.", gt=0.0)
    online_top_k: int = method_field(
        40, "Number of most likely tokens to sample from; 0 for all. Default of the paper.", ge=0
    )
    beta: float = method_field(
        0.05, "γ of the paper, which is not β of rejection sampling. Best of the paper's 0.005, 0.05 and 0.5.", gt=0.0
    )

    def validate(self) -> None:
        super().validate()
        if (
            self.online_iterations > 0
            and self.rso_pairing != "none"
            and self.rso_num_samples > self.online_num_samples
        ):
            raise ValueError(
                f"`rso_num_samples` must be at most `online_num_samples` ({self.online_num_samples}), got "
                f"{self.rso_num_samples}."
            )
        refused = [name for name in self.loss_type if name not in _OF_SCORES]
        if not self.rso_normalized and refused:
            raise ValueError(
                f"`rso_normalized=False` needs `loss_type`s of scores or their margin, {_OF_SCORES}, got {refused}. "
                "Choose among these, or set `rso_normalized=True`."
            )


class RsoDPOTrainer(PreferenceTrainer):
    """
    Samples many completions per prompt from the initial policy, keeps some that are distributed as draws from the
    optimal policy would be, and learns preferences among these.

    Of the candidates not accepted yet, y is accepted if u < exp((r(y) − max r) / β_RSO), u ~ U[0, 1) (Eq. 14), in
    repeated passes; see [`~papertrl.losses.preference.rso.rejection_sample`]. Those accepted follow
    π_r(y|x) ∝ π_sft(y|x) exp(r(x, y) / β_RSO), from which the maximum-likelihood estimate of the policy wants its
    pairs.

    r is the score by `reward_funcs`. With a pairwise `judge` ρ instead, r(x, y) = logit ρ(x, y, y_b) against one
    random candidate y_b of the prompt (Eq. 7), 0 for y_b itself, and ρ itself says who wins a pair. Ties make no pair.
    Each prompt has random numbers of its own, and its candidates are visited in random order.

    With Δ the difference of log-ratios, or of log-probabilities, and γ = `beta`, the losses of the paper are

    | paper | | settings |
    |---|---|---|
    | sigmoid-norm (Eq. 8) | −log σ(γ Δ log π/π_sft) | `loss_type="sigmoid"`, the default |
    | hinge-norm (Eq. 10) | max(0, 1 − γ Δ log π/π_sft) | `loss_type="hinge"` |
    | hinge (Eq. 9, SLiC) | max(0, 1 − γ Δ log π) | `loss_type="hinge"`, `rso_normalized=False` |

    (TRL's `loss_type="sigmoid_norm"` is something else: it divides by lengths.) `rewards/*` are on log-ratios with
    every loss; `rewards/optimized_margins` is γΔ as the loss has it.

    Args:
        model, ref_model, args, reward_funcs, judge, ...:
            As for [`PreferenceTrainer`](base.py); `args` is a [`RsoDPOConfig`], or a [`~trl.DPOConfig`] to take the
            method's defaults (a `DPOConfig` keeps its own `beta`). `train_dataset` holds prompts.

    Relations:
        - [`PreferenceTrainer`](base.py) with `online_iterations=1` pairs the best with the worst candidate of each
          prompt: the clearest pairs, but hardly ever ones that a good policy would produce.
        - [`UpoDPOTrainer`](upo.py) selects among pairs by how sure a classifier is of their labels; it replaces the
          same stage.
        - [`RpoDPOTrainer`](rpo.py) and [`LnDPOTrainer`](ln_dpo.py) change the loss and combine with this trainer.

    Paper: [Statistical Rejection Sampling Improves Preference Optimization](https://arxiv.org/abs/2309.06657)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from tempfile import mkdtemp
    >>> from datasets import Dataset
    >>> from papertrl import RsoDPOConfig, RsoDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> def digits(completions, **kwargs):
    ...     return [float(sum(c.isdigit() for c in text)) for text in completions]
    >>> args = RsoDPOConfig(
    ...     mkdtemp(), online_num_samples=8, rso_num_samples=4, online_max_new_tokens=6, max_steps=1, bf16=False,
    ...     use_cpu=True, report_to="none", disable_tqdm=True,
    ... )
    >>> trainer = RsoDPOTrainer(
    ...     model, deepcopy(model), args, train_dataset=Dataset.from_dict({"prompt": ["1+1="] * 8}),
    ...     processing_class=tokenizer, reward_funcs=digits,
    ... )
    >>> trainer.train()
    {'train_runtime': ..., 'online/rso_acceptance': ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = RsoDPOConfig
    method = declared("rso")
    extends = {"scores": {"rso_normalized": True}}
    replaces = {
        "judge": ({"online_iterations": 0}, {"rso_pairing": "none"}),
        "pair": ({"online_iterations": 0}, {"rso_pairing": "none"}),
    }

    def judge(self, groups: list[Group]) -> None:
        if self.judge_func is None:
            super().judge(groups)
            return
        members = [(group, candidate) for group in groups for candidate in group.candidates]
        baselines = {
            group.index: self.round_random("rso baseline", group.index).choice(group.candidates)
            for group in groups
            if group.candidates
        }
        won = self.compare(
            [group for group, _ in members],
            [candidate for _, candidate in members],
            [baselines[group.index] for group, _ in members],
        )
        for (_, candidate), probability in zip(members, won, strict=True):
            candidate.score = point_reward(probability)

    def pair(self, groups: list[Group]) -> list[Pair]:
        left = self._accepted_candidates(groups)
        pairs = []
        while any(len(players) > 1 for players in left):
            matches = [
                (i, *players[place : place + 2])
                for i, players in enumerate(left)
                for place in range(0, len(players) - 1, 2)
            ]
            winners: list[list[Candidate]] = [[] for _ in groups]
            for (i, first, second), p in zip(matches, self._first_wins(groups, matches), strict=True):
                winner, loser = (first, second) if p >= 0.5 else (second, first)
                winners[i].append(winner)
                if p != 0.5:
                    pairs.append(Pair(groups[i], winner, loser))
            if self.args.rso_pairing == "first_round":
                break
            # Who has no opponent goes on as well
            left = [won + players[2 * len(won) :] for won, players in zip(winners, left, strict=True)]
        if pairs:
            self.log_round({"rso_pair_margin": fmean(pair.chosen.score - pair.rejected.score for pair in pairs)})
        return pairs

    def _accepted_candidates(self, groups: list[Group]) -> list[list[Candidate]]:
        """Candidates of each group that rejection sampling accepts, in the order of acceptance."""
        args = self.args
        accepted: list[list[Candidate]] = []
        before: list[Candidate] = []
        unique: list[int] = []
        outcomes: list[Accepted] = []
        for group in groups:
            rng = self.round_random("rso", group.index)
            candidates = group.scored()
            before += candidates
            rng.shuffle(candidates)
            rewards = [candidate.score for candidate in candidates]
            places, distinct_rewards = collapse_equal([str(c.completion) for c in candidates], rewards)
            unique.append(len(places))
            if args.rso_dedup:
                candidates, rewards = [candidates[place] for place in places], distinct_rewards
            outcomes.append(rejection_sample(rewards, args.rso_num_samples, args.rso_beta, rng))
            accepted.append([candidates[i] for i in outcomes[-1].indices])
        after = [candidate for group in accepted for candidate in group]
        if after:
            visits = sum(outcome.visits for outcome in outcomes)
            self.log_round(
                {
                    "rso_acceptance": len(after) / max(visits, len(after)),
                    "rso_passes": fmean(outcome.passes for outcome in outcomes),
                    "rso_unique_share": sum(unique) / len(before),
                    "rso_score_before": fmean(candidate.score for candidate in before),
                    "rso_score_after": fmean(candidate.score for candidate in after),
                }
            )
        return accepted

    def _first_wins(self, groups: list[Group], matches: list[tuple[int, Candidate, Candidate]]) -> list[float]:
        """Probability that the first of each match is the better one; by scores, it is 0, ½ or 1."""
        if self.judge_func is None:
            return [0.5 + 0.5 * ((a.score > b.score) - (a.score < b.score)) for _, a, b in matches]
        # Asked once and heard on all ranks, as a judge may answer differently each time
        answer: list = [None]
        if self.accelerator.is_main_process:
            places, firsts, seconds = zip(*matches, strict=True)
            answer = [self.compare([groups[i] for i in places], list(firsts), list(seconds))]
        broadcast_object_list(answer)
        return answer[0]

    def scores(self, record: PreferenceRecord) -> tuple[torch.Tensor, torch.Tensor]:
        # As under a reference that finds all completions alike
        return super().scores(replace(record, ref_logps=torch.zeros_like(record.ref_logps)))
