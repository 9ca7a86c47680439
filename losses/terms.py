"""Named loss terms, kept per unit until the one place that reduces and adds them."""

from dataclasses import dataclass

import torch


@dataclass
class LossTerm:
    """
    A named part of a loss, not yet reduced.

    Args:
        name (`str`):
            Logged as `loss/{name}`: the mean per unit, without `coef`.
        values (`torch.Tensor`):
            One value per token `(batch, time)` or per row or pair `(batch,)`, with gradient.
        mask (`torch.Tensor`, *optional*):
            Same shape as `values`; 0 where a unit does not count. Defaults to all ones. A masked value adds nothing
            to loss or gradient, but must be finite.
        coef (`float`, *optional*, defaults to `1.0`):
            Weight of the term in the total.
        per (`float`, *optional*):
            What the sum over a whole generation batch is divided by. Defaults to the normalizer of the policy loss;
            row weights, which are the policy loss's, then apply. Policy family only.
    """

    name: str
    values: torch.Tensor
    mask: torch.Tensor | None = None
    coef: float = 1.0
    per: float | None = None

    def sum(self) -> torch.Tensor:
        """Sum of the values that count."""
        return self.values.sum() if self.mask is None else (self.values * self.mask).sum()

    def count(self) -> torch.Tensor:
        """Number of units that count."""
        return self.values.new_tensor(self.values.numel()) if self.mask is None else self.mask.sum().to(self.values)
