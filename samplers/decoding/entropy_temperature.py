"""A temperature for each token, higher where the next one is open and lower where it is settled: slot *decoding*."""

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from ...core.configuration import ComponentConfig, method_config, method_field
from ...core.declaration import declared
from ...core.slots import Component
from ...losses.policy.hapo import entropy_scale, next_token_entropy, normalized_entropy
from .processors import check_config, check_sampled, check_trainer

SCALE = ("hapo/pivot", "hapo/lowest", "hapo/highest")


class EntropyTemperatureProcessor(LogitsProcessor):
    """
    Divide logits by 1 + τh, h in [-1, 1] being their normalized entropy (HAPO, arXiv:2509.16591, Eq. 8).

    With a temperature T after it, tokens are drawn at T · (1 + τh).

    Args:
        scale (`torch.Tensor` of shape `(3,)`):
            From [`~papertrl.losses.policy.hapo.entropy_scale`].
        tau (`float`):
            τ in [0, 1).
        temperature (`float`, *optional*, defaults to `1.0`):
            T, at which entropies are measured, as they were for `scale`.
        signed (`bool`, *optional*, defaults to `True`):
            See [`~papertrl.losses.policy.hapo.normalized_entropy`].

    Attributes:
        factors (`list[torch.Tensor]`):
            1 + τh of the rows at each step so far.
    """

    def __init__(self, scale: Tensor, tau: float, temperature: float = 1.0, signed: bool = True):
        self.scale = scale
        self.tau = tau
        self.temperature = temperature
        self.signed = signed
        self.factors: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        entropies = next_token_entropy(scores, self.temperature)
        factor = 1 + self.tau * normalized_entropy(entropies, *self.scale.unbind(), signed=self.signed)
        self.factors.append(factor)
        return scores / factor.unsqueeze(1).to(scores.dtype)


@method_config
class EntropyTemperatureConfig(ComponentConfig):
    """Configuration of [`EntropyTemperature`]."""

    hapo_entropy_quantile: float = method_field(
        0.8, "Quantile of the tokens' entropies above which one counts as high.", ge=0, le=1
    )
    hapo_temperature_tau: float = method_field(
        0.1,
        "τ: tokens are drawn at temperature T · (1 + τh). The released recipe has 0.05. 0 samples as GRPO.",
        ge=0,
        lt=1,
    )
    hapo_sign: str = method_field(
        "signed",
        "Sign of the normalized entropy h: negative below the quantile (the paper), or never (the released code), by "
        "which no token counts as one of low entropy.",
        choices=("signed", "released"),
    )

    def validate(self):
        super().validate()
        if self.hapo_temperature_tau > 0:
            check_config(self, EntropyTemperature.method)


class EntropyTemperature(Component):
    r"""
    HAPO's temperature: tokens of training rollouts are drawn at T·(1 + τh), by their entropy.

    With x = log H of a token, Q the quantile of x and max and min its extremes, h is (x − Q)/(max − Q) above Q and
    (x − Q)/(Q − min) below, limited to [−1, 1] (arXiv:2509.16591, Eqs. 5, 6 and 8). Quantile and extremes are those
    of the tokens of the previous generation batch that were trained on, over all ranks; the first batch is drawn at
    T, and so are evaluations. Entropies are those at T, where the released code has 1. Ratios are not corrected for
    the temperature, neither in the paper nor in the code nor here; the log-probabilities that the loop returns, in
    `sampling_per_token_logps`, are those of the tempered distribution.

    It needs the rollout loop of this library, and the pass over rollouts of the policy family. A bare TRL trainer has
    no door for it: its `generation_kwargs` hold no processors. `generate` takes [`EntropyTemperatureProcessor`].

    Relations:
        One of the four parts of HAPO, which carries it. `temperature` is T, the same for all tokens.

    Paper: [From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's
    Nature](https://huggingface.co/papers/2509.16591).

    Example:

    ```python
    >>> from papertrl import EntropyTemperature, compose
    >>> trainer_class = compose("grpo", EntropyTemperature)
    >>> args = trainer_class.config_class("out", hapo_temperature_tau=0.05, bf16=False)
    >>> trainer = trainer_class("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("entropy_temperature")
    config_class = EntropyTemperatureConfig

    def __init__(self, config: Any = None, **settings: Any):
        super().__init__(config, **settings)
        # Of the last generation batch, for the next one
        self.scale: Tensor | None = None
        self._processor: EntropyTemperatureProcessor | None = None

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        check_trainer(trainer, self.method)

    def logits_processors(self) -> list[LogitsProcessor]:
        self._processor = None
        if not self.trainer.model.training or self.scale is None:
            return []
        self._processor = EntropyTemperatureProcessor(
            self.scale,
            self.config.hapo_temperature_tau,
            self.trainer.temperature,
            signed=self.config.hapo_sign == "signed",
        )
        return [self._processor]

    def sampled(self) -> None:
        check_sampled(self.trainer.args, self.method, "hapo_temperature_tau")
        if self._processor is None:
            return
        temperatures = self.trainer.temperature * torch.cat(self._processor.factors)
        self._processor = None
        self.trainer.log_mean("hapo/temperature_mean", temperatures.sum(), temperatures.new_tensor(len(temperatures)))
        extremes = self.trainer.accelerator.gather(torch.stack([temperatures.min(), temperatures.max()]))
        self.log_metric("hapo/temperature_min", extremes.min())
        self.log_metric("hapo/temperature_max", extremes.max())

    def needs(self) -> frozenset[str]:
        return frozenset({"entropy"})

    def see_rollouts(self, record: Any, scored: Any, old_pass: Any) -> None:
        record.statistics["hapo/entropies"] = old_pass.entropies.detach()

    def prepared(self, record: Any) -> None:
        scale = measure_entropies(self.trainer, record, self.config.hapo_entropy_quantile)
        if self.trainer.model.training:
            self.scale = scale

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        scale = state["scale"]
        self.scale = None if scale is None else scale.to(self.trainer.accelerator.device)


def measure_entropies(trainer: Any, record: Any, quantile: float) -> Tensor:
    """
    What entropies are measured by, over the selected tokens of all ranks; also put into `record.statistics`.

    Args:
        trainer ([`~papertrl.PolicyTrainer`]):
            Gathers over ranks.
        record (`RolloutRecord`):
            A selected generation batch, with `"hapo/entropies"` in its statistics.
        quantile (`float`):
            As in [`~papertrl.losses.policy.hapo.entropy_scale`].

    Returns:
        `torch.Tensor` of shape `(3,)`: see [`~papertrl.losses.policy.hapo.entropy_scale`].
    """
    tokens = record.loss_mask.bool() & (record.row_weight > 0).unsqueeze(1)
    entropies = trainer.gather_ragged(record.statistics["hapo/entropies"][tokens].float(), fill=-1.0)
    scale = entropy_scale(entropies, quantile)
    for name, value in zip(SCALE, scale, strict=True):
        record.statistics[name] = value.expand(record.row_weight.shape[0]).clone()
    return scale
