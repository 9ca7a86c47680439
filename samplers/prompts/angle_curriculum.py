"""The prompt sampler of GAIN-RL: a Gaussian window that moves along an order of the data."""

import math
from typing import Any

import torch


class AngleCurriculum:
    """
    Draws prompts from a Gaussian over their rank in a fixed order, and moves it on as the model learns.

    A round draws `subset_size` distinct ranks with p(r) ∝ exp(−(r − μ)² / 2σ²) and hands them out; when they are used
    up, μ moves by clip(s·tanh(α_acc·(accuracy − β)) + s·tanh(α_angle·C), low, high), from the means of that round
    (arXiv:2506.02281, Sec. 3).

    Args:
        order (`torch.Tensor` of shape `(prompts,)`, int64):
            Prompts by descending signal.
        sigma, step, shift_min, shift_max (`float`):
            σ, s, low and high, in ranks.
        alpha_acc, alpha_angle, beta (`float`):
            α_acc, α_angle and β.
        subset_size (`int`):
            Prompts per round.
    """

    def __init__(
        self,
        order: torch.Tensor,
        sigma: float,
        step: float,
        shift_min: float,
        shift_max: float,
        alpha_acc: float,
        alpha_angle: float,
        beta: float,
        subset_size: int,
    ):
        self.order = order
        self.sigma, self.step = sigma, step
        self.shift_min, self.shift_max = shift_min, shift_max
        self.alpha_acc, self.alpha_angle, self.beta = alpha_acc, alpha_angle, beta
        self.subset_size = min(subset_size, len(order))
        self.mu = 0.0
        self.queue: list[int] = []
        self.observed: list[tuple[float, float]] = []

    def choose(self, count: int, generator: torch.Generator) -> list[int]:
        """The next `count` prompts. Where a round runs out, μ moves and a new round is drawn."""
        chosen: list[int] = []
        while len(chosen) < count:
            if not self.queue:
                self._move()
                self.queue = self.draw(self.subset_size, generator)
            chosen.append(self.queue.pop(0))
        return chosen

    def draw(self, count: int, generator: torch.Generator) -> list[int]:
        """`count` prompts from the Gaussian at μ, distinct as far as there are enough."""
        ranks = torch.arange(len(self.order), dtype=torch.float64)
        log_weight = -0.5 * ((ranks - self.mu) / self.sigma).square()
        drawn: list[int] = []
        while len(drawn) < count:
            # The largest of log p + Gumbel noise are a draw without replacement, safe where p underflows
            uniform = torch.rand(len(ranks), generator=generator, dtype=torch.float64).clamp(min=1e-300)
            keys = log_weight - torch.log(-torch.log(uniform))
            drawn += self.order[torch.topk(keys, min(count - len(drawn), len(ranks))).indices].tolist()
        return drawn

    def observe(self, accuracy: float, angle: float) -> None:
        """Record mean accuracy in [0, 1] and mean angle concentration of one generation batch."""
        self.observed.append((accuracy, angle))

    def _move(self) -> None:
        if not self.observed:
            return
        accuracy = sum(a for a, _ in self.observed) / len(self.observed)
        angle = sum(c for _, c in self.observed) / len(self.observed)
        self.observed = []
        shift = self.step * (math.tanh(self.alpha_acc * (accuracy - self.beta)) + math.tanh(self.alpha_angle * angle))
        shift = min(max(shift, self.shift_min), self.shift_max)
        # Beyond the last prompt the distribution would collapse on the tail
        self.mu = min(max(self.mu + shift, 0.0), len(self.order) - 1.0)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes over training, and the order."""
        return {"order": self.order, "mu": self.mu, "queue": self.queue, "observed": self.observed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore [`state_dict`]."""
        self.order, self.mu, self.queue = state["order"], state["mu"], list(state["queue"])
        self.observed = [tuple(pair) for pair in state["observed"]]
