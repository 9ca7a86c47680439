"""GAIN-RL on GRPO."""

import math
from typing import Any

import torch
from trl.data_utils import common_prefix_length, is_conversational
from trl.trainer.utils import pad

from ...core.configuration import method_config, method_field
from ...losses.policy.gain_rl import mean_pairwise_cosine, prefill_signal
from ...models.observation import Pass, last_mlp, observe
from ...samplers.prompts.angle_curriculum import AngleCurriculum
from ..method import Method
from .base import PolicyConfig, PolicyTrainer
from .passes import OldPass
from .record import RolloutRecord, ScoredBatch


@method_config
class GainRlGRPOConfig(PolicyConfig):
    """
    Configuration of [`GainRlGRPOTrainer`].

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


class GainRlGRPOTrainer(PolicyTrainer):
    r"""
    GAIN-RL: GRPO on the prompts that the model can learn from now, by the angles between its own token vectors.

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

    Relations:
        The order is fixed; only the window moves. Combines with any method that does not choose prompts, refills of
        filtered groups included: they are drawn from the same Gaussian.

    Paper: [Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own
    Signals](https://huggingface.co/papers/2506.02281).

    Example:

    ```python
    >>> from papertrl import GainRlGRPOConfig, GainRlGRPOTrainer
    >>> args = GainRlGRPOConfig(gain_sigma=0.1, gain_step=0.05)  # doctest: +SKIP
    >>> trainer = GainRlGRPOTrainer("Qwen/Qwen3-0.6B", reward, args, train_dataset=dataset)  # doctest: +SKIP
    ```
    """

    method = Method(
        name="gain_rl",
        summary="Chooses prompts along a curriculum ordered by the angles between the model's own token vectors",
        extends=("statistics", "feedback"),
        replaces={"choose_prompts": {"gain_sigma": None}},
        neutral={"gain_sigma": None},
        signal="gain_rl/mu",
    )
    config_class = GainRlGRPOConfig
    _name = "GAIN-RL"
    _tag_names = ["trl", "papertrl", "grpo", "gain-rl"]
    _paper = {
        "title": "Angles Don't Lie: Unlocking Training-Efficient RL Through the Model's Own Signals",
        "id": "2506.02281",
        "citation": "@article{gainrl2025,\n    title   = {{Angles Don't Lie: Unlocking Training-Efficient RL Through "
        "the Model's Own Signals}},\n    year    = 2025,\n    eprint  = {arXiv:2506.02281}\n}",
    }

    def __init__(self, model, reward_funcs=None, args=None, *trl_args, **trl_kwargs):
        self._curriculum: AngleCurriculum | None = None
        self._seen: set[int] = set()
        super().__init__(model, reward_funcs, args, *trl_args, **trl_kwargs)
        name = self.args.gain_accuracy_reward
        if name is not None and name not in self.reward_func_names:
            raise ValueError(f"`gain_accuracy_reward` must be one of {self.reward_func_names}, got {name!r}.")
        self._accuracy_column = 0 if name is None else self.reward_func_names.index(name)
        if self.args.gain_sigma is not None:
            last_mlp(self.model)

    @classmethod
    def prompt_drawing_methods(cls, args):
        return super().prompt_drawing_methods(args) + ["gain_rl"] * (args.gain_sigma is not None)

    def choose_prompts(self, count: int, round: int) -> list[int] | None:
        if self.args.gain_sigma is None:
            return super().choose_prompts(count, round)
        if self._curriculum is None:
            self._curriculum = self._make_curriculum(self._prompt_order(), count)
        generator = self.keyed_generator(round)
        if round > 0:
            return self._curriculum.draw(count, generator)
        chosen = self._curriculum.choose(count, generator)
        self._seen.update(chosen)
        self.log_metric("gain_rl/mu", self._curriculum.mu)
        self.log_metric("gain_rl/passed_fraction", self._curriculum.mu / len(self.train_dataset))
        self.log_metric("gain_rl/distinct_prompts", float(len(self._seen)))
        return chosen

    def old_pass_needs(self):
        needs = super().old_pass_needs()
        return needs if self.args.gain_sigma is None else needs | {"mlp_inputs"}

    def collect_statistics(self, record: RolloutRecord, scored: ScoredBatch, old_pass: OldPass) -> None:
        super().collect_statistics(record, scored, old_pass)
        if self.args.gain_sigma is not None:
            mask = torch.cat([record.prompt_mask, record.completion_mask], dim=1)
            record.statistics["gain_rl/concentration"] = mean_pairwise_cosine(old_pass.mlp_inputs, mask)

    def observe_batch(self, scored: ScoredBatch, record: RolloutRecord) -> None:
        super().observe_batch(scored, record)
        if self.args.gain_sigma is None:
            return
        accuracy = scored.sampled_rewards[:, self._accuracy_column].clamp(0, 1).nanmean()
        angle = self.accelerator.gather(record.statistics["gain_rl/concentration"]).nanmean()
        accuracy, angle = torch.nan_to_num(torch.stack([accuracy, angle])).tolist()
        self._curriculum.observe(accuracy, angle)
        self.log_metric("gain_rl/accuracy", accuracy)
        self.log_metric("gain_rl/concentration", angle)

    def method_state(self) -> dict[str, Any]:
        state = super().method_state()
        if self._curriculum is not None:
            state["gain_rl"] = self._curriculum.state_dict() | {"seen": sorted(self._seen)}
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        if "gain_rl" in state:
            count = self.args.generation_batch_size // self.num_generations
            self._curriculum = self._make_curriculum(state["gain_rl"]["order"], count)
            self._curriculum.load_state_dict(state["gain_rl"])
            self._seen = set(state["gain_rl"]["seen"])

    def _make_curriculum(self, order: torch.Tensor, count: int) -> AngleCurriculum:
        def prompts(value: float) -> float:
            return value * len(order) if value < 1 else value

        args = self.args
        return AngleCurriculum(
            order,
            sigma=prompts(args.gain_sigma),
            step=prompts(args.gain_step),
            shift_min=args.gain_shift_min,
            shift_max=prompts(args.gain_shift_max),
            alpha_acc=args.gain_alpha_acc,
            alpha_angle=args.gain_alpha_angle,
            beta=args.gain_beta,
            subset_size=args.gain_subset_size or count,
        )

    def _prompt_order(self) -> torch.Tensor:
        """All prompts by descending signal, those without one last. Every rank prefills its share of them."""
        total, world = len(self.train_dataset), self.accelerator.num_processes
        size = self.args.per_device_train_batch_size
        share = -(-total // world)
        mine = [
            min(i, total - 1)
            for i in range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        ]
        signals = [
            self._signals([self.train_dataset[i]["prompt"] for i in mine[at : at + size]])
            for at in range(0, share, size)
        ]
        signals = self.accelerator.gather(torch.cat(signals))[:total]
        return torch.argsort(torch.nan_to_num(signals, nan=-torch.inf), descending=True, stable=True).cpu()

    @torch.no_grad()
    def _signals(self, prompts: list[Any]) -> torch.Tensor:
        device = self.accelerator.device
        rows = [self._segments(prompt) for prompt in prompts]
        ids, prefix, question = (
            pad([torch.tensor(row[i]) for row in rows], padding_value=0, padding_side="left").to(device)
            for i in range(3)
        )
        mask = pad([torch.ones(len(row[0]), dtype=torch.long) for row in rows], padding_value=0, padding_side="left")
        with observe(last_mlp(self.model), Pass.PREFILL, inputs=True) as observed, self.accelerator.autocast():
            self.model(input_ids=ids, attention_mask=mask.to(device), use_cache=False, logits_to_keep=1)
        return prefill_signal(observed.hidden_states(), prefix, question, self.args.gain_inter_weight)

    def _segments(self, prompt: Any) -> tuple[list[int], list[int], list[int]]:
        """Token ids of a prompt, and the masks of its prefix and its question."""
        ids = self.tokenize_prompts([prompt])[0]
        first, last = 0, len(ids)
        if is_conversational({"prompt": prompt}):
            template = {"chat_template": self.chat_template, "tokenize": True, "return_dict": False}
            template |= self.chat_template_kwargs
            template["tools"] = self.tools or None
            last = common_prefix_length(ids, self._tokenizer.apply_chat_template(prompt, **template))
            # What stands before any question, a system prompt that the template adds included
            unasked = [*prompt[:-1], {**prompt[-1], "content": ""}]
            first = min(last, common_prefix_length(ids, self._tokenizer.apply_chat_template(unasked, **template)))
        places = range(len(ids))
        return ids, [int(i < first) for i in places], [int(first <= i < last) for i in places]
