"""OBLR-PO on GRPO."""

import torch

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.head import sum_of_squares
from ...losses.policy.groups import group_mean
from ...losses.policy.oblr_po import logit_energy, optimal_baseline
from ...models.observation import gradients_apart, lm_head
from ...optimizers.snr_learning_rate import SnrLearningRate, SnrLearningRateConfig
from .base import PolicyConfig, PolicyTrainer
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch


@method_config
class OblrPoGRPOConfig(SnrLearningRateConfig, PolicyConfig):
    """
    Configuration of [`OblrPoGRPOTrainer`].

    The learning rate's fields, `snr_lr` and others, are those of
    [`~papertrl.optimizers.snr_learning_rate.SnrLearningRateConfig`].
    """

    oblr_weight: str = method_field(
        "logit_energy",
        "What a completion weighs in its group's baseline: the squared norm of its gradient at the logits, its "
        "length, the same for all (RLOO), or the squared norm of its whole gradient, which takes a backward pass per "
        "completion. `none` leaves the baseline to others.",
        choices=("logit_energy", "length", "uniform", "exact", "none"),
    )
    oblr_leave_one_out: bool = method_field(
        True, "Whether a completion's baseline leaves out its own reward, so that the gradient is unbiased."
    )
    scale_rewards: str = method_field(
        "none", "Standard deviation that divides the centered rewards; the derivation has none. See TRL's."
    )

    def validate(self):
        super().validate()
        if self.oblr_weight != "none" and self.multi_objective_aggregation != "sum_then_normalize":
            raise ValueError(
                "OBLR-PO centers the summed reward: `multi_objective_aggregation` must be 'sum_then_normalize', got "
                f"{self.multi_objective_aggregation!r}. Change it, or set `oblr_weight='none'`."
            )


class OblrPoGRPOTrainer(PolicyTrainer):
    r"""
    Optimal baseline and learning rate: GRPO with the baseline of least gradient variance, and smaller steps in noise.

    Of all baselines that keep the policy gradient unbiased, the one of least variance is a mean of the group's
    rewards weighted by W, the squared norm of each completion's gradient (arXiv:2511.23310):

    $$
    b_k = \frac{\sum_{j \ne k} W_j R_j}{\sum_{j \ne k} W_j}, \qquad A_k = R_k - b_k .
    $$

    The learning rate is multiplied by SNR / (1 + SNR), SNR being that of the gradient: see the component
    [`~papertrl.SnrLearningRate`], which other trainers carry as well.

    The equations are derived from the paper's abstract and the theory it names: its body and code were not available
    to us, and it may estimate norms and SNR in other ways. `logit_energy` is our default since it costs no backward
    pass.

    Relations:
        RLOO is `oblr_weight="uniform"` with `snr_lr=False`; GRPO's group mean weighs uniformly and includes the row
        itself. Lite PPO and DLER change what divides the centered rewards and combine with it.

    Paper: [OBLR-PO: A Theoretical Framework for Stable Reinforcement
    Learning](https://huggingface.co/papers/2511.23310).

    Example:

    ```python
    >>> from papertrl import OblrPoGRPOConfig, OblrPoGRPOTrainer
    >>> args = OblrPoGRPOConfig(gradient_accumulation_steps=8)  # doctest: +SKIP
    >>> trainer = OblrPoGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("oblr_po")
    components = (SnrLearningRate,)
    extends = {"statistics": ({"oblr_weight": "none"}, {"oblr_weight": "uniform"}, {"oblr_weight": "length"})}
    replaces = {"baseline": {"oblr_weight": "none"}}
    config_class = OblrPoGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if self.args.oblr_weight == "exact" and (sharded or self.has_images):
            raise ValueError(
                "`oblr_weight='exact'` needs whole gradients of a text model: it supports neither sharded parameters "
                "(DeepSpeed, FSDP) nor vision-language models. Set `oblr_weight='logit_energy'`."
            )

    def old_pass_needs(self):
        needs = {"logit_energy": {"logps", "hidden_states"}, "exact": {"logps"}}
        return super().old_pass_needs() | needs[self.args.oblr_weight]

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        exact = self.args.oblr_weight == "exact"
        weights = self._gradient_squares(record) if exact else self._logit_energy(record, old_pass)
        scored.statistics["oblr_po/weights"] = self.accelerator.gather(weights)

    def baseline(self, scored: ScoredBatch, rewards: torch.Tensor) -> torch.Tensor:
        if self.args.oblr_weight == "uniform":
            weights = torch.ones_like(rewards)
        elif self.args.oblr_weight == "length":
            weights = scored.lengths.to(rewards)
        else:
            weights = scored.statistics["oblr_po/weights"].to(rewards)
        baseline = optimal_baseline(rewards, weights, scored.group_ids, self.args.oblr_leave_one_out)
        shift = (baseline - group_mean(rewards, scored.group_ids)).abs().nanmean()
        self.log_metric("oblr_po/baseline_shift", shift)
        self.log_metric("oblr_po/weight_cv", weights.std(correction=0) / weights.mean().clamp(min=1e-8))
        return baseline

    def _logit_energy(self, record: RolloutRecord, old_pass: OldPass) -> torch.Tensor:
        mask = record.loss_mask.bool()
        squares = torch.zeros_like(old_pass.logps)
        with lm_head(self.model) as (weight, bias, logit_scale, softcap):
            found = sum_of_squares(
                old_pass.hidden_states[mask], weight, bias, self.temperature, logit_scale=logit_scale, softcap=softcap
            )
        squares[mask] = found.to(squares)
        return logit_energy(old_pass.logps, squares, mask)

    @torch.enable_grad()
    def _gradient_squares(self, record: RolloutRecord) -> torch.Tensor:
        """|∇ logπ|² of each row, over all parameters that are trained: one backward pass per row."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        squares = []
        layout = (record.prompt_ids, record.prompt_mask, record.completion_ids, record.completion_mask)
        for *row, tokens in zip(*(part.split(1) for part in layout), record.loss_mask, strict=True):
            logps = self.score_rows(*row, gradient=True)
            gradient = gradients_apart((logps[0] * tokens).sum(), parameters)
            squares.append(torch.stack([g.float().square().sum() for g in gradient if g is not None]).sum())
        return torch.stack(squares)
