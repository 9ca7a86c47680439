"""HyPO: offline preference optimization with a reverse-KL penalty on the policy's own samples."""

import math
from typing import Any

import torch
from accelerate.utils import is_peft_model

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.hypo import online_kl_weights
from ...losses.terms import LossTerm
from .base import PreferenceConfig, PreferenceTrainer
from .record import PreferenceRecord
from .sampling import SampledCompletions, left_padded_prompts, sample_completions, sample_seeds


@method_config
class HypoDPOConfig(PreferenceConfig):
    """Configuration of [`HypoDPOTrainer`]."""

    hypo_kl_coef: float = method_field(
        1e-4,
        "Weight λ of the penalty; 0 is DPO and generates nothing. The default is recalled from the paper's "
        "summarization run, with completions of some 50 tokens. The gradient estimate grows with the square of the "
        "length: toy tasks with a few tokens want 0.01 to 0.5.",
        ge=0.0,
        was="online_kl_coef",
    )
    hypo_kl_num_samples: int = method_field(
        2,
        "Completions sampled per prompt. Default of the paper's summarization run.",
        ge=1,
        was="online_kl_num_samples",
    )
    hypo_kl_estimator: str = method_field(
        "rloo",
        "`rloo` subtracts from a sample's log-ratio the mean of the prompt's other samples, as in the paper's "
        "summarization run; `reinforce` takes it as it is, with more variance.",
        choices=("rloo", "reinforce"),
        was="online_kl_estimator",
    )
    hypo_kl_clip: float | None = method_field(
        None,
        "Bound on the absolute log-ratio of a sample, in nats: less variance, some bias. An option of this library.",
        gt=0.0,
        was="online_kl_clip",
    )
    hypo_kl_every: int = method_field(
        1,
        "Sample at every this many optimizer steps; the steps between are DPO. An option of this library.",
        ge=1,
        was="online_kl_every",
    )
    hypo_kl_max_new_tokens: int = method_field(
        64,
        "Longest sampled completion, in tokens. Set it to the length of the task's answers.",
        ge=1,
        was="online_kl_max_new_tokens",
    )
    beta: float = method_field(
        0.05, "Deviation from the reference model in the DPO part. Recalled from the paper.", gt=0.0
    )

    def validate(self) -> None:
        super().validate()
        if self.hypo_kl_coef == 0:
            return
        if self.hypo_kl_estimator == "rloo" and self.hypo_kl_num_samples < 2:
            raise ValueError(
                f"`hypo_kl_estimator='rloo'` needs `hypo_kl_num_samples` of at least 2, got "
                f"{self.hypo_kl_num_samples}. Raise it, or set `hypo_kl_estimator='reinforce'`."
            )
        if self.truncation_mode != "keep_start":
            raise ValueError(
                f"`hypo_kl_coef={self.hypo_kl_coef}` samples from the prompt and needs `truncation_mode="
                f"'keep_start'`, got {self.truncation_mode!r}, which cuts the prompt."
            )


class HypoDPOTrainer(PreferenceTrainer):
    """
    Prefers the chosen completion on offline pairs, and penalizes the reverse KL divergence to the reference on samples
    of the current policy, so that completions which no pair covers do not drift.

    L = L_DPO + λ · mean_i sg(w_i) · log π_θ(y_i|x_i),  y_i ~ π_θ(·|x_i), k per prompt of the batch

    with K_i = log π_θ(y_i|x_i) − log π_ref(y_i|x_i) summed over tokens and w_i = K_i minus the mean K of the prompt's
    other samples (`rloo`) or w_i = K_i (`reinforce`). The gradient of the second part is an unbiased estimate of
    λ ∇ KL(π_θ ‖ π_ref). It needs no labels and no reward model.

    Samples come from the whole distribution at temperature 1, without dropout and without the penalties and filters of
    the model's generation config. They depend on `seed`, the optimizer step and the pair only, so that a resumed run
    and a run on another number of processes draw the same. Completions that reach `hypo_kl_max_new_tokens` count.
    Evaluation generates nothing and reports the DPO part alone. A pair whose prompt is empty has no samples.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`HypoDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults (a `DPOConfig` keeps its own `beta`).

    Raises:
        `ValueError`: if no reference model is at hand for the samples (`precompute_ref_log_probs` without `ref_model`
            or PEFT), or the dataset holds images.

    Relations:
        - [`RpoDPOTrainer`](rpo.py) regularizes on the chosen completions and needs no generation; prefer it where the
          data covers what the policy says.
        - [`~trl.GRPOTrainer`] with `beta > 0` has the same penalty under a reward; prefer it where there is one.
        - Combines with [`LnDPOTrainer`](ln_dpo.py), which changes the offline margin alone.

    Paper: [The Importance of Online Data: Understanding Preference Fine-tuning via
    Coverage](https://arxiv.org/abs/2406.01462)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import HypoDPOConfig, HypoDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["3"] * 8})
    >>> args = HypoDPOConfig(
    ...     "/tmp/hypo", hypo_kl_coef=0.1, hypo_kl_max_new_tokens=4, max_steps=1, bf16=False, use_cpu=True,
    ...     report_to="none", disable_tqdm=True,
    ... )
    >>> trainer = HypoDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    {'train_runtime': ..., 'completions/mean_length': ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = HypoDPOConfig
    method = declared("hypo")
    extends = {
        "sample": {"hypo_kl_coef": 0.0},
        "extra_terms": {"hypo_kl_coef": 0.0},
    }

    def __init__(self, model, ref_model=None, args=None, *trl_args, **trl_kwargs):
        super().__init__(model, ref_model, args, *trl_args, **trl_kwargs)
        if self.args.hypo_kl_coef == 0:
            return
        if self.ref_model is None and not is_peft_model(self.model):
            raise ValueError(
                "`hypo_kl_coef` > 0 scores samples under the reference model, which `precompute_ref_log_probs=True` "
                "does not keep. Set `precompute_ref_log_probs=False`, pass `ref_model`, or train with PEFT."
            )
        if self.has_images:
            raise ValueError("`hypo_kl_coef` > 0 does not support datasets with images. Set `hypo_kl_coef=0`.")

    def sample(self, inputs: dict[str, Any]) -> dict[str, SampledCompletions]:
        samples = super().sample(inputs)
        args = self.args
        if not self.model.training or self.state.global_step % args.hypo_kl_every != 0:
            return samples
        batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        half = {name: rows.chunk(2)[0] for name, rows in batch.items()}
        k, pad_token_id = args.hypo_kl_num_samples, self.tokenizer.pad_token_id
        prompts = left_padded_prompts(**half, pad_token_id=pad_token_id)
        prompt_ids, prompt_padding_mask, prompt_mask = (rows.repeat_interleave(k, dim=0) for rows in prompts)
        seeds = sample_seeds(args.seed, self.state.global_step, batch["input_ids"], batch["attention_mask"], k)
        with self.generation_model() as unwrapped_model:
            sampled = sample_completions(
                unwrapped_model,
                prompt_ids,
                prompt_padding_mask,
                seeds,
                args.hypo_kl_max_new_tokens,
                pad_token_id,
                self.eos_token_ids(unwrapped_model),
            )
        return {**samples, "hypo": SampledCompletions(*sampled, prompt_mask=prompt_mask, num_samples=k)}

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        terms = super().extra_terms(model, record)
        samples = record.samples.get("hypo")
        if samples is None:
            return terms
        sequences = (samples.input_ids, samples.attention_mask, samples.completion_mask)
        logps = self.score_sequences(model, *sequences).sum(1)
        ref_logps = self.score_sequences(model, *sequences, role="reference").sum(1)
        log_ratios = logps.detach() - ref_logps
        weights = online_kl_weights(
            log_ratios.view(-1, samples.num_samples), self.args.hypo_kl_estimator, self.args.hypo_kl_clip
        )
        self._log_samples(samples, log_ratios)
        surrogate = weights.flatten() * logps
        return [*terms, LossTerm("online_kl", surrogate, mask=samples.prompt_mask, coef=self.args.hypo_kl_coef)]

    def _log_samples(self, samples: SampledCompletions, log_ratios: torch.Tensor) -> None:
        mask = samples.prompt_mask
        clip = self.args.hypo_kl_clip
        sums = {
            "count": mask.sum(),
            "mean": (log_ratios * mask).sum(),
            "square": (log_ratios.square() * mask).sum(),
            "length": (samples.completion_mask.sum(1) * mask).sum(),
            "clipped": ((log_ratios.abs() > (math.inf if clip is None else clip)) * mask).sum(),
        }
        totals = self.accelerator.reduce(torch.stack([v.float() for v in sums.values()]), reduction="sum")
        count, *totals = totals
        mean, square, length, clipped = (total / count.clamp(min=1.0) for total in totals)
        self.log_metric("online_kl/mean", mean)
        self.log_metric("online_kl/std", (square - mean.square()).clamp(min=0.0).sqrt())
        self.log_metric("completions/mean_length", length)
        if clip is not None:
            self.log_metric("online_kl/clip_ratio", clipped)
