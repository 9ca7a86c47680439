"""A temperature for each token: higher where the next one is open, lower where it is settled."""

from torch import Tensor
from transformers import LogitsProcessor

from ...losses.policy.hapo import next_token_entropy, normalized_entropy


class EntropyTemperature(LogitsProcessor):
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
