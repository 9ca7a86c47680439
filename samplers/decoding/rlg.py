"""RLG: rollouts from a mixture of the trained model and the one it was trained from, for the slot *decoding*."""

import math
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import AutoTokenizer
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ...core.configuration import ComponentConfig, method_config, method_field
from ...core.declaration import declared
from ...core.slots import Component
from ...losses.policy.surrogate import kl_estimate
from ...models.loading import whole_checkpoints
from .guidance import GuidanceLogitsProcessor, Reader
from .processors import RowProcessor, check_config, check_sampled, check_trainer

logger = get_logger(__name__)


class RowReader(Reader):
    """A [`~.guidance.Reader`] whose rows may leave, or be repeated."""

    def logits(self, input_ids: Tensor) -> Tensor:
        if self._read is None or input_ids.shape[1] > self._read.shape[1]:
            self._scores = super().logits(input_ids)
        return self._scores

    def select(self, rows: Tensor) -> None:
        """Keep, or repeat, the rows at `rows`."""
        self._cache.batch_select_indices(rows)
        self._read, self._scores = self._read[rows], self._scores[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]


class GuidedRows(GuidanceLogitsProcessor, RowProcessor):
    """
    [`~.guidance.GuidanceLogitsProcessor`] for the rollout loop, where rows leave: each prompt is read once.

    Args:
        base_model, scale, plausibility_alpha:
            As there.
    """

    def __init__(self, base_model: torch.nn.Module, scale: float, plausibility_alpha: float = 0.0):
        super().__init__(base_model, scale, plausibility_alpha=plausibility_alpha)

    def begin(self, prompt_ids: Tensor, attention_mask: Tensor | None) -> None:
        self._base = RowReader(self._base.voice, attention_mask)
        self._base.logits(prompt_ids)

    def select(self, rows: Tensor) -> None:
        self._base.select(rows)


@method_config
class RlgConfig(ComponentConfig):
    """Configuration of [`Rlg`]."""

    rlg_scale: float = method_field(
        1.6,
        "w: 0 is the base model, 1 the trained one, beyond it goes on in the direction of training. 1.6 is what the "
        "paper shows.",
        gt=-math.inf,
    )
    rlg_plausibility_alpha: float = method_field(
        0.0,
        "Tokens less likely under the trained model than this share of its most likely one are excluded. 0: none.",
        ge=0,
        lt=1,
    )
    rlg_base_model: str | None = method_field(
        None,
        "Base model, by path or id. `None`: the one that the trained model was loaded from, which is, with an "
        "adapter, the model without it.",
    )
    rlg_train: bool = method_field(
        False, "Whether training rollouts are guided too, with importance weights; else evaluations only."
    )
    rlg_max_ratio: float = method_field(
        2.0, "Largest importance weight of a token, where training rollouts are guided. The value is ours.", ge=1
    )

    def validate(self):
        super().validate()
        if self.rlg_scale != Rlg.method.neutral["rlg_scale"]:
            check_config(self, Rlg.method)


class Rlg(Component):
    r"""
    Reinforcement learning guidance: samples from a mixture of the trained model and its base, and beyond.

    With \\( \pi_0 \\) the base model, the model being trained \\( \pi \\) is sampled from as

    $$
    p_w(v \mid y_{<t}) \propto \pi_0(v \mid y_{<t})^{1-w} \, \pi(v \mid y_{<t})^{w},
    $$

    before temperature and filters. The rule is that of arXiv:2508.21016 for diffusion, carried over; per token it is
    that of a KL penalty β/w, if π is the optimum of the penalty β. The product over a completion is not the tilted
    distribution over completions.

    The paper guides at inference, and so does this by default: evaluations in training answer with guidance, training
    rollouts do not. With `rlg_train` these are guided too. They are then not the policy's, and each token's loss is
    weighted by min(π_old/p, c), p being the distribution that was really sampled, temperature and filters included,
    whose log-probabilities are in `sampling_per_token_logps`. Truncation and weights per token make this biased, as
    in TRL's correction for vLLM in the mode `token_truncate`.

    Left out are first steps without guidance, which the released code has for denoising and sets to 0.

    It costs a second model and cache, and twice the forward passes of sampling. Needs the rollout loop of this
    library. A bare TRL trainer has no door for it, since its `generation_kwargs` hold no processors; `generate` takes
    [`~.guidance.GuidanceLogitsProcessor`].

    Relations:
        Temperature flattens or sharpens π alone. [`~papertrl.EntropyTemperature`] does so by token; the two combine.

    Paper: [Inference-Time Alignment Control for Diffusion Models with Reinforcement Learning
    Guidance](https://huggingface.co/papers/2508.21016).

    Example:

    ```python
    >>> from papertrl import Rlg, compose
    >>> trainer_class = compose("grpo", Rlg)
    >>> args = trainer_class.config_class("out", rlg_scale=2.0, eval_strategy="steps", bf16=False)
    >>> trainer = trainer_class("Qwen/Qwen3-0.6B", reward, args, dataset, held_out)  # doctest: +SKIP
    ```
    """

    method = declared("rlg")
    config_class = RlgConfig

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        check_trainer(trainer, self.method)
        if not self.config.rlg_train and trainer.args.eval_strategy == "no":
            logger.warning(
                "'rlg' does nothing while training: with `rlg_train=False` it guides evaluations alone, of which "
                "`eval_strategy='no'` makes none. Set one of the two, or call `evaluate`."
            )
        name = self.config.rlg_base_model
        code, revision = trainer.args.trust_remote_code, None
        if name is not None:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=code)
            if tokenizer.get_vocab() != trainer.tokenizer.get_vocab():
                raise ValueError(
                    f"`rlg_base_model` must share the trained model's vocabulary, which {name!r} does not."
                )
        if name is None and is_peft_model(trainer.model):
            self._base_model = trainer.model
            return
        if name is None:
            name = get_config_model_id(trainer.model.config)
            revision = (trainer.args.model_init_kwargs or {}).get("revision")
        if not name:
            raise ValueError("`rlg_base_model` is missing: the trained model was not loaded by a name. Set it.")
        with whole_checkpoints():
            base_model = create_model_from_path(
                name,
                revision=revision or "main",
                dtype=trainer.model.dtype,
                attn_implementation=trainer.model.config._attn_implementation,
                trust_remote_code=code,
                device_map=None,
            )
        self._base_model = base_model.to(trainer.accelerator.device).requires_grad_(False).eval()

    @property
    def _acts(self) -> bool:
        return self.config.rlg_train or not self.trainer.model.training

    def logits_processors(self) -> list[GuidedRows]:
        if not self._acts:
            return []
        return [GuidedRows(self._base_model, self.config.rlg_scale, self.config.rlg_plausibility_alpha)]

    def sampled(self) -> None:
        check_sampled(self.trainer.args, self.method, "rlg_scale")

    def needs(self) -> frozenset[str]:
        return frozenset({"logps"}) if self._acts else frozenset()

    def see_rollouts(self, record: Any, scored: Any, old_pass: Any) -> None:
        if not self._acts:
            return
        mask = record.loss_mask
        # Rows that were sampled under another prompt have old log-probabilities of their own
        old = old_pass.logps if record.old_per_token_logps is None else record.old_per_token_logps
        sampled = record.sampling_per_token_logps
        # Not known of tokens that were not sampled, such as demonstrations
        sampled = torch.where((mask == 0) | sampled.isnan(), old, sampled)
        self.trainer.log_mean("rlg/kl_trained", (kl_estimate(sampled, old) * mask).sum(), mask.sum())
        if self.trainer.model.training:
            ratio = (old - sampled).exp().clamp(max=self.config.rlg_max_ratio)
            record.importance_sampling_ratio = ratio
            self.trainer.log_mean("rlg/importance_weight", (ratio * mask).sum(), mask.sum())
