"""Training of the normalization layers alone, for the slot *model*."""

import re
from typing import Any

import torch

from ..core.configuration import ComponentConfig, method_config, method_field
from ..core.declaration import declared
from ..core.slots import Component


@method_config
class NormTuningConfig(ComponentConfig):
    """Configuration of [`NormTuning`]."""

    norm_tuning_pattern: str | None = method_field(
        "norm",
        "Regular expression, searched for in the names of parameters without regard to case; what it matches is "
        "trained. `None` trains all.",
    )


class NormTuning(Component):
    """
    Only the weights of the normalization layers are trained; all others are frozen before the model is wrapped.

    The paper tunes the two LayerNorms of each attention block and that behind the last; here it is every parameter
    whose name `norm_tuning_pattern` matches, the RMS norms of today's models included.

    In a bare TRL trainer: `model=NormTuning().prepare(model)`.

    Relations:
        LoRA adds weights; this trains a few thousandths of those there are. With a `peft_config`, which freezes them
        again, it is refused.

    Paper: [Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM
    Finetuning](https://huggingface.co/papers/2312.11420).

    Raises:
        `ValueError`: if no parameter matches, or an adapter is trained.

    Example:

    ```python
    >>> from papertrl import NormTuning
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer
    >>> model = NormTuning().prepare(tiny_model(tiny_tokenizer(), num_layers=1))
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][-1]
    'model.norm.weight'

    ```
    """

    method = declared("norm_tuning")
    config_class = NormTuningConfig

    def prepare(self, model: torch.nn.Module) -> torch.nn.Module:
        pattern = re.compile(self.config.norm_tuning_pattern, re.IGNORECASE)
        matched = {name for name, _ in model.named_parameters() if pattern.search(name)}
        if not matched:
            raise ValueError(
                f"`norm_tuning_pattern` must match the name of a parameter, got {self.config.norm_tuning_pattern!r}. "
                f"Names are, among others, {[name for name, _ in model.named_parameters()][-3:]}."
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in matched)
        return model

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        if hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"):
            raise ValueError(
                "`peft_config` must be None with 'norm_tuning', which trains weights of the model itself. Leave it "
                "out, or set `norm_tuning_pattern=None`."
            )
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        self._share = trained / sum(p.numel() for p in trainer.model.parameters())

    def before_update(self, grad_norm: Any) -> None:
        self.log_metric("norm_tuning/trained_share", self._share)
