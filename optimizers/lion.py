"""Lion, for the slot *optimizer*."""

from typing import Any

import torch

from ..core.configuration import ComponentConfig, method_config, method_field
from ..core.declaration import declared
from ..core.slots import Component


class LionOptimizer(torch.optim.Optimizer):
    """
    The optimizer itself; see [`Lion`].

    Args:
        params:
            Parameters, or groups of them.
        lr (`float`):
            Learning rate.
        betas (`tuple[float, float]`):
            Shares that momentum keeps in the step, and from one step to the next.
        weight_decay (`float`):
            Decoupled weight decay.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(torch.lerp(parameter.grad, momentum, first).sign_(), alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)
        return loss


@method_config
class LionConfig(ComponentConfig):
    """Configuration of [`Lion`]. The paper's learning rate is 3 to 10 times smaller than AdamW's, its decay larger."""

    lion_beta1: float | None = method_field(
        0.9, "β1, share of the momentum in the step. `None` leaves the optimizer to `optim`.", ge=0, lt=1
    )
    lion_beta2: float = method_field(0.99, "β2, share of the momentum that stays.", ge=0, lt=1)


class Lion(Component):
    r"""
    Evolved sign momentum: every weight moves by the learning rate, up or down.

    With gradient g and momentum m (arXiv:2302.06675, Program 1),

    $$
    \theta \leftarrow \theta - \eta \big(\mathrm{sign}(\beta_1 m + (1 - \beta_1) g) + \lambda \theta\big), \qquad
    m \leftarrow \beta_2 m + (1 - \beta_2) g .
    $$

    `learning_rate` is η and `weight_decay` λ, on the parameters on which the trainer puts it. Logged is the share of
    weights whose gradient and momentum agree in sign.

    In a bare TRL trainer: `optimizers=(Lion().optimizer(model, args), None)`, or, where it takes them,
    `optimizer_cls_and_kwargs=Lion().optimizer_cls_and_kwargs(args, model)`.

    Relations:
        AdamW keeps a second moment as well, and takes steps of different size.

    Paper: [Symbolic Discovery of Optimization Algorithms](https://huggingface.co/papers/2302.06675).

    Example:

    ```python
    >>> import torch
    >>> from papertrl.optimizers.lion import LionOptimizer
    >>> weight = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    >>> weight.grad = torch.tensor([0.3, -20.0])
    >>> LionOptimizer([weight], lr=0.5).step()
    >>> weight.tolist()
    [0.5, -0.5]

    ```
    """

    method = declared("lion")
    config_class = LionConfig

    def optimizer_cls_and_kwargs(self, args: Any, model: Any) -> tuple[type, dict[str, Any]]:
        return LionOptimizer, {"lr": args.learning_rate, "betas": (self.config.lion_beta1, self.config.lion_beta2)}

    def optimizer(self, model: torch.nn.Module, args: Any) -> LionOptimizer:
        """The optimizer of all parameters of `model`, with the rate and the decay of the config `args`."""
        cls, kwargs = self.optimizer_cls_and_kwargs(args, model)
        return cls([p for p in model.parameters() if p.requires_grad], weight_decay=args.weight_decay, **kwargs)

    def before_update(self, grad_norm: Any) -> None:
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        agreeing = [
            (state["momentum"] * parameter.grad > 0).float().mean()
            for parameter, state in optimizer.state.items()
            if parameter.grad is not None
        ]
        if agreeing:
            self.log_metric("lion/agreement", torch.stack(agreeing).mean())
