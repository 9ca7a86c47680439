"""GAIN-RL: a curriculum over prompts by the model's own angles, for the slot *prompts*."""

import math
from typing import Any

import torch
from accelerate.logging import get_logger
from trl.data_utils import common_prefix_length, is_conversational
from trl.trainer.utils import pad

from ...core.configuration import ComponentConfig, method_config, method_field
from ...core.declaration import declared
from ...core.slots import Component
from ...losses.policy.gain_rl import mean_pairwise_cosine, prefill_signal
from ...models.observation import Pass, last_mlp, observe
from .angle_curriculum import AngleCurriculum

logger = get_logger(__name__)
# Odds of the first prompt against the last below which there is no curriculum to speak of
_FLAT = 1.5


@method_config
class GainRlConfig(ComponentConfig):
    """
    Configuration of [`GainRl`].

    `gain_sigma`, `gain_step` and `gain_shift_max` count prompts; below 1 they are shares of the dataset. The paper's
    values are for thousands of prompts: with N < 1000, a σ of 1000 is nearly uniform.
    """

    gain_sigma: float | None = method_field(
        1000.0, "σ of the Gaussian over ranks. `None` turns the curriculum off.", gt=0, optional=True
    )
    gain_step: float = method_field(500.0, "s, scale of each of the two terms that move the window.", gt=0)
    gain_alpha_acc: float = method_field(2.0, "Sensitivity to accuracy.", gt=0)
    gain_alpha_angle: float = method_field(2.0, "Sensitivity to angle concentration.", gt=0)
    gain_beta: float = method_field(0.5, "β, target accuracy.", ge=0, le=1)
    gain_shift_min: float = method_field(
        0.0, "Smallest move of the window in one round, in prompts; below 0 it can move back.", gt=-math.inf
    )
    gain_shift_max: float = method_field(1000.0, "Largest move of the window in one round.", gt=0)
    gain_subset_size: int | None = method_field(
        None, "Prompts per round. `None` takes one generation batch; the released TRL variant has 256.", ge=1
    )
    gain_inter_weight: float = method_field(
        1.0, "Weight of the cosine between question and prefix in the signal; 8 in the released code.", ge=0
    )
    gain_accuracy_reward: str | None = method_field(
        None, "Name of the reward function that is the accuracy in [0, 1]. `None` takes the first one."
    )

    def validate(self):
        super().validate()
        if self.gain_shift_min > self.gain_shift_max:
            raise ValueError(
                f"`gain_shift_min` must be at most `gain_shift_max`={self.gain_shift_max}, got {self.gain_shift_min}."
            )


class GainRl(Component):
    r"""
    GAIN-RL: trains on the prompts that the model can learn from now, by the angles between its own token vectors.

    Before training, one prefill per prompt gives the signal C = C_intra + w·C_inter: mean cosines between inputs of
    the last layer's MLP, within the question and between question and prefix. Prompts are ordered by descending C,
    and each round draws from a Gaussian over ranks (arXiv:2506.02281):

    $$
    p(r) \propto \exp(-(r - \mu)^2 / 2\sigma^2), \quad
    \mu \leftarrow \mu + \mathrm{clip}\big(s \tanh(\alpha_1(\mathrm{Acc} - \beta)) + s \tanh(\alpha_2 C_t)\big),
    $$

    with accuracy and online concentration C_t of the round that has just been trained on. The choice happens right
    before generation, so that this feedback is never older than one batch. μ stays within the data.

    The released code slices rows where segments were meant; segments are derived here from the chat template. A plain
    text prompt is all question.

    It needs the pass over rollouts of the policy family, and a map-style dataset of prompts.

    Relations:
        The order is fixed; only the window moves. Combines with any method that does not choose prompts, refills of
        filtered groups included: they are drawn from the same Gaussian.

    Paper: [Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own
    Signals](https://huggingface.co/papers/2506.02281).

    Example:

    ```python
    >>> from papertrl import GainRl, LpRegGRPOTrainer, compose
    >>> trainer_class = compose(LpRegGRPOTrainer, GainRl)
    >>> args = trainer_class.config_class("out", gain_sigma=0.1, gain_step=0.05, bf16=False)
    >>> trainer = trainer_class("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = declared("gain_rl")
    config_class = GainRlConfig

    def __init__(self, config: Any = None, **settings: Any):
        super().__init__(config, **settings)
        self._curriculum: AngleCurriculum | None = None
        self._seen: set[int] = set()

    def attach(self, trainer: Any) -> None:
        super().attach(trainer)
        name, known = self.config.gain_accuracy_reward, trainer.reward_func_names
        if name is not None and name not in known:
            raise ValueError(f"`gain_accuracy_reward` must be one of {known}, got {name!r}.")
        self._accuracy_column = 0 if name is None else known.index(name)
        last_mlp(trainer.model)
        dataset = trainer.train_dataset
        if self.config.gain_sigma is not None and hasattr(dataset, "__len__"):
            sigma = self._prompts(self.config.gain_sigma, len(dataset))
            odds = math.exp((len(dataset) - 1) ** 2 / (2 * sigma**2)) if len(dataset) < 10 * sigma else math.inf
            if odds < _FLAT:
                logger.warning(
                    f"'gain_rl': with `gain_sigma`={self.config.gain_sigma:g} the first of {len(dataset)} prompts is "
                    f"at the start only {odds:.2f} times as likely as the last one, hardly a curriculum. Below 1, "
                    "`gain_sigma`, `gain_step` and `gain_shift_max` are shares of the dataset; try 0.15, 0.05 and 0.1."
                )

    @staticmethod
    def _prompts(value: float, total: int) -> float:
        """A number of prompts, of `total`, that the config gives as such or as a share."""
        return value * total if value < 1 else value

    def choose(self, count: int, round: int, generator: torch.Generator) -> list[int]:
        if self._curriculum is None:
            self._curriculum = self._make_curriculum(self._prompt_order(), count)
        if round > 0:
            return self._curriculum.draw(count, generator)
        chosen = self._curriculum.choose(count, generator)
        self._seen.update(chosen)
        self.log_metric("gain_rl/mu", self._curriculum.mu)
        self.log_metric("gain_rl/passed_fraction", self._curriculum.mu / len(self.trainer.train_dataset))
        self.log_metric("gain_rl/distinct_prompts", float(len(self._seen)))
        return chosen

    def needs(self) -> frozenset[str]:
        return frozenset({"mlp_inputs"})

    def see_rollouts(self, record: Any, scored: Any, old_pass: Any) -> None:
        mask = torch.cat([record.prompt_mask, record.completion_mask], dim=1)
        record.statistics["gain_rl/concentration"] = mean_pairwise_cosine(old_pass.mlp_inputs, mask)

    def observe(self, scored: Any, record: Any) -> None:
        accuracy = scored.sampled_rewards[:, self._accuracy_column].clamp(0, 1).nanmean()
        angle = self.trainer.accelerator.gather(record.statistics["gain_rl/concentration"]).nanmean()
        accuracy, angle = torch.nan_to_num(torch.stack([accuracy, angle])).tolist()
        self._curriculum.observe(accuracy, angle)
        self.log_metric("gain_rl/accuracy", accuracy)
        self.log_metric("gain_rl/concentration", angle)

    def state_dict(self) -> dict[str, Any]:
        if self._curriculum is None:
            return {}
        return self._curriculum.state_dict() | {"seen": sorted(self._seen)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            count = self.trainer.args.generation_batch_size // self.trainer.num_generations
            self._curriculum = self._make_curriculum(state["order"], count)
            self._curriculum.load_state_dict(state)
            self._seen = set(state["seen"])

    def _make_curriculum(self, order: torch.Tensor, count: int) -> AngleCurriculum:
        config, total = self.config, len(order)
        return AngleCurriculum(
            order,
            sigma=self._prompts(config.gain_sigma, total),
            step=self._prompts(config.gain_step, total),
            shift_min=config.gain_shift_min,
            shift_max=self._prompts(config.gain_shift_max, total),
            alpha_acc=config.gain_alpha_acc,
            alpha_angle=config.gain_alpha_angle,
            beta=config.gain_beta,
            subset_size=config.gain_subset_size or count,
        )

    def _prompt_order(self) -> torch.Tensor:
        """All prompts by descending signal, those without one last. Every rank prefills its share of them."""
        total, world = len(self.trainer.train_dataset), self.trainer.accelerator.num_processes
        size = self.trainer.args.per_device_train_batch_size
        share = -(-total // world)
        mine = [
            min(i, total - 1)
            for i in range(
                self.trainer.accelerator.process_index * share, (self.trainer.accelerator.process_index + 1) * share
            )
        ]
        signals = [
            self._signals([self.trainer.train_dataset[i]["prompt"] for i in mine[at : at + size]])
            for at in range(0, share, size)
        ]
        signals = self.trainer.accelerator.gather(torch.cat(signals))[:total]
        return torch.argsort(torch.nan_to_num(signals, nan=-torch.inf), descending=True, stable=True).cpu()

    @torch.no_grad()
    def _signals(self, prompts: list[Any]) -> torch.Tensor:
        device = self.trainer.accelerator.device
        rows = [self._segments(prompt) for prompt in prompts]
        ids, prefix, question = (
            pad([torch.tensor(row[i]) for row in rows], padding_value=0, padding_side="left").to(device)
            for i in range(3)
        )
        mask = pad([torch.ones(len(row[0]), dtype=torch.long) for row in rows], padding_value=0, padding_side="left")
        with (
            observe(last_mlp(self.trainer.model), Pass.PREFILL, inputs=True) as observed,
            self.trainer.accelerator.autocast(),
        ):
            self.trainer.model(input_ids=ids, attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
        return prefill_signal(observed.hidden_states(), prefix, question, self.config.gain_inter_weight)

    def _segments(self, prompt: Any) -> tuple[list[int], list[int], list[int]]:
        """Token ids of a prompt, and the masks of its prefix and its question."""
        ids = self.trainer.tokenize_prompts([prompt])[0]
        first, last = 0, len(ids)
        if is_conversational({"prompt": prompt}):
            template = {"chat_template": self.trainer.chat_template, "tokenize": True, "return_dict": False}
            template |= self.trainer.chat_template_kwargs
            template["tools"] = self.trainer.tools or None
            last = common_prefix_length(ids, self.trainer.tokenizer.apply_chat_template(prompt, **template))
            # What stands before any question, a system prompt that the template adds included
            unasked = [*prompt[:-1], {**prompt[-1], "content": ""}]
            first = min(
                last, common_prefix_length(ids, self.trainer.tokenizer.apply_chat_template(unasked, **template))
            )
        places = range(len(ids))
        return ids, [int(i < first) for i in places], [int(first <= i < last) for i in places]
