"""OFS-DPO: two adapters of different speed that chase each other."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch.nn.utils import get_total_norm
from trl.trainer.utils import disable_dropout_in_model

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...losses.preference.ofs_dpo import chase
from ...losses.terms import LossTerm
from ..reduction import mean_of_terms
from .base import PreferenceConfig, PreferenceTrainer
from .record import PreferenceRecord

# PEFT's name for a trainer's adapter, and the second one's
MODULES = ("default", "slow")


@method_config
class OfsDPOConfig(PreferenceConfig):
    """Configuration of [`OfsDPOTrainer`]."""

    ofs_alpha: float | None = method_field(
        0.1,
        "α, weight of the chase. 0 trains two adapters side by side; None has one adapter, or none: DPO. The paper's "
        "value is not known to us.",
        ge=0.0,
        le=1.0,
        optional=True,
    )
    ofs_slow_lr_ratio: float = method_field(
        0.3, "Learning rate of the slow adapter over that of the other one. Ours, as above.", gt=0.0, le=1.0
    )
    ofs_chasing_interval: int = method_field(
        20, "Optimizer steps between two decisions on which adapter is chased. Ours, as above.", ge=1
    )
    ofs_margin_clip: float | None = method_field(
        None,
        "Bound on β times the difference of the two margins, beyond which the chase has no gradient. A "
        "re-implementation has 10.",
        gt=0.0,
    )
    gradient_checkpointing: bool = method_field(
        False, "As in TRL, where it is True; not supported with two adapters.", choices=(True, False)
    )

    def validate(self) -> None:
        super().validate()
        if self.ofs_alpha is None:
            return
        if self.gradient_checkpointing:
            raise ValueError(
                "`gradient_checkpointing` must be False, got True: when the backward pass repeats a forward pass, the "
                "other of the two adapters would be active. Set it to False, or `ofs_alpha=None`."
            )
        if self.ddp_find_unused_parameters:
            raise ValueError(
                "`ddp_find_unused_parameters` must be False or None, got True: either adapter is unused in some "
                "forward pass, but none in a whole step."
            )
        if self.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end` must be False, got True: it restores one of the two adapters. At the end of "
                "training the better one is kept anyway."
            )


class OfsDPOTrainer(PreferenceTrainer):
    """
    Trains two LoRA adapters of different learning rates on the same pairs, each pulled on by the other, so that a
    gradient remains once the pairs are fitted.

    With Δ_M the margin of module M (log-ratios of chosen minus rejected) and roles F and S,

    L = L_DPO(F) + L_DPO(S) + α · L_FS(F, sg S) − α · L_FS(sg F, S),  L_FS = mean −log σ(β(Δ_F − Δ_S))

    where sg detaches: F widens its lead, S closes the gap. The two chase terms cancel in value but not in gradient.
    The trained adapter, `default`, is the faster module; the second, `slow`, starts as its copy, at
    `ofs_slow_lr_ratio` of its rate. Every `ofs_chasing_interval` steps the module with the lower mean base loss over
    the interval takes role F; rates stay with the modules. Signs, detaching and the exchange of roles follow a
    re-implementation that cites the paper's equations; the authors released no code.

    L_DPO and Δ are what the stages of all methods make of them, for both modules; extra terms of other methods act on
    `default` alone. Gradients are clipped together, so that even with α = 0 the two are independent only where
    `max_grad_norm` does not bind. L_S has no lower bound: keep α small or set `ofs_margin_clip`, and watch
    `rewards/*`. Evaluation, and what samples, is `default`.

    Checkpoints hold `default`, and `slow` in a folder of its name. At the end of [`train`] the module with the lower
    base loss of the last interval becomes `default`, which is what `save_model` writes as the model, and the other
    `slow` beside it; `ofs/served_slow` is 1 where they were exchanged. For a stream of domains train on each, then
    combine what was saved with [`~papertrl.adapters.combine_domains`] (COFS-DPO).

    Logged: `loss/pair` and `loss/slow_<loss_type>` (base losses), `loss/ofs_chase`, `ofs/margin_gap` (β(Δ_F − Δ_S)),
    `ofs/role` (1 where `slow` has role F), `ofs/swaps` (so far) and `ofs/grad_norm_default`, `ofs/grad_norm_slow`
    (before clipping). What other methods log about `slow` goes under `slow/`.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is an [`OfsDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults. Needs `peft_config` (`--use_peft`) or a model with a LoRA adapter.

    Raises:
        `ValueError`: without a LoRA adapter, if the model has another one named `slow`, with images, FSDP or
            DeepSpeed.

    Relations:
        - [`~trl.DPOTrainer`] is `ofs_alpha=None`, at half the cost. Prefer it for data that is seen once.
        - [`HypoDPOTrainer`](hypo.py) bounds the drift that the chase adds to; the two combine.

    Paper: [Online DPO: Online Direct Preference Optimization with Fast-Slow
    Chasing](https://arxiv.org/abs/2406.05534)

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> from papertrl import OfsDPOConfig, OfsDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> dataset = Dataset.from_dict({"prompt": ["1+1="] * 8, "chosen": ["2"] * 8, "rejected": ["3"] * 8})
    >>> args = OfsDPOConfig("/tmp/ofs", max_steps=1, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> trainer = OfsDPOTrainer(
    ...     tiny_model(tokenizer), None, args, train_dataset=dataset, processing_class=tokenizer,
    ...     peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    ... )
    >>> trainer.train()
    {'train_runtime': ..., 'loss/ofs_chase': '0.6931', ...}
    {'ofs/served_slow': '0', ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = OfsDPOConfig
    method = declared("ofs_dpo")
    extends = {
        "extra_terms": {"ofs_alpha": None},
        "optimizer": {"ofs_alpha": None},
        "after_backward": {"ofs_alpha": None},
        "run": {"ofs_alpha": None},
    }

    def __init__(self, model, ref_model=None, args=None, *trl_args, **trl_kwargs):
        args = self.make_config(args, model)
        if args.ofs_alpha is not None:
            # A step uses both adapters, but each of its forward passes leaves one out: DDP would take it for unused
            args.ddp_find_unused_parameters = False
        super().__init__(model, ref_model, args, *trl_args, **trl_kwargs)
        self._module_parameters: dict[str, list[torch.nn.Parameter]] = {}
        self._roles = Roles()
        if self.args.ofs_alpha is None:
            return
        self._check_modules()
        model = self.model
        model.add_adapter("slow", _plain_copy(model.peft_config["default"]))
        if self.args.disable_dropout:
            disable_dropout_in_model(model)
        pairs = [
            (parameter, model.get_parameter(name.replace(".default", ".slow")))
            for name, parameter in model.named_parameters()
            if ".default" in name and parameter.requires_grad
        ]
        for fast, slow in pairs:
            slow.data = fast.data.clone()
        self._module_parameters = dict(zip(MODULES, map(list, zip(*pairs, strict=True)), strict=True))
        for _, slow in pairs:
            # PEFT freezes an adapter that is not the active one
            slow.requires_grad_(True)

    def _check_modules(self) -> None:
        active = f"`ofs_alpha={self.args.ofs_alpha}` trains a second adapter"
        if not is_peft_model(self.model):
            raise ValueError(
                f"{active} beside a LoRA adapter, and there is none. Pass `peft_config=LoraConfig(...)` "
                "(`--use_peft`), or set `ofs_alpha=None`."
            )
        config = self.model.peft_config.get("default")
        if not isinstance(config, LoraConfig):
            raise ValueError(
                f"{active} and needs the first, 'default', to be LoRA; the adapters are "
                f"{ {name: type(c).__name__ for name, c in self.model.peft_config.items()} }."
            )
        if "slow" in self.model.peft_config:
            raise ValueError(f"{active} named 'slow', but the model has one of that name. Delete or rename it.")
        for what, present in {
            "FSDP": self.is_fsdp_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "datasets with images": self.has_images,
        }.items():
            if present:
                raise ValueError(f"{active}, which is not supported with {what}. Set `ofs_alpha=None`.")

    # --- Two adapters -------------------------------------------------------------------------------------------

    def set_up_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        super().set_up_optimizer(optimizer)
        slow = {id(parameter) for parameter in self._module_parameters["slow"]}
        for group in list(optimizer.param_groups):
            moved = [parameter for parameter in group["params"] if id(parameter) in slow]
            if moved:
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in slow]
                rate = self.args.ofs_slow_lr_ratio * group["lr"]
                optimizer.add_param_group({**group, "params": moved, "lr": rate})

    def check_checkpoint(self, folder: Path) -> None:
        super().check_checkpoint(folder)
        if not (folder / "slow" / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(
                f"`resume_from_checkpoint`: '{folder / 'slow'}' has no adapter, so that the run cannot go on as it "
                "was. Resume from another checkpoint, or start anew."
            )

    def after_training(self) -> None:
        super().after_training()
        exchanged = self._roles.better() == 1
        if exchanged:
            for fast, slow in zip(*self._module_parameters.values(), strict=True):
                fast.data, slow.data = slow.data, fast.data
        self.log({"ofs/served_slow": float(exchanged)})

    # --- The chase ----------------------------------------------------------------------------------------------

    def extra_terms(self, model: torch.nn.Module, record: PreferenceRecord) -> list[LossTerm]:
        terms = super().extra_terms(model, record)
        if not self.model.training:
            return terms
        slow_record = self.pair_statistics(model, record, adapter="slow")
        reduced = [mean_of_terms(each.pair_losses, self.accelerator) for each in (record, slow_record)]
        losses = torch.stack(reduced).detach()
        self._roles.decide(self.state.global_step // self.args.ofs_chasing_interval)
        self._roles.observe(self.accelerator.reduce(losses, reduction="mean"))
        margins = (record.margins, slow_record.margins)
        fast, slow = margins[self._roles.fast], margins[1 - self._roles.fast]
        leads, follows = chase(fast, slow, self.beta, self.args.ofs_margin_clip)
        gap = self.beta * (fast - slow).detach()
        self.log_mean("ofs/margin_gap", gap.sum(), gap.new_tensor(len(gap)))
        self.log_metric("ofs/role", float(self._roles.fast))
        self.log_metric("ofs/swaps", float(self._roles.swaps))
        return [
            *terms,
            *(LossTerm(f"slow_{term.name}", term.values, term.mask, term.coef) for term in slow_record.pair_losses),
            LossTerm("ofs_chase", leads, coef=self.args.ofs_alpha),
            LossTerm("ofs_chased", follows, coef=-self.args.ofs_alpha),
        ]

    def after_backward(self) -> None:
        super().after_backward()
        if self.accelerator.sync_gradients:
            for name, parameters in self._module_parameters.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                self.log_metric(f"ofs/grad_norm_{name}", get_total_norm(gradients))

    # --- State --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        return {**super().method_state(), "ofs_dpo": self._roles.state()}

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state(state)
        self._roles = Roles(**state["ofs_dpo"])


@dataclass
class Roles:
    """
    Which of the two modules is chased, from their base losses.

    Args:
        fast (`int`, *optional*, defaults to `0`):
            Number, in `MODULES`, of the one that has role F.
        swaps (`int`), intervals (`int`):
            Exchanges, and decisions on one, so far.
        losses (`torch.Tensor` of shape `(2,)`, *optional*):
            Sum of the modules' base losses in the present interval; on their device, so that only a decision waits.
    """

    fast: int = 0
    swaps: int = 0
    intervals: int = 0
    losses: torch.Tensor | None = None

    def observe(self, losses: torch.Tensor) -> None:
        """Add the base losses `(2,)` of a micro-batch, the same on every rank."""
        self.losses = losses if self.losses is None else self.losses.to(losses) + losses

    def decide(self, intervals: int) -> None:
        """Give role F to the better module once more than the intervals so far have passed; a tie changes nothing."""
        if intervals > self.intervals:
            better = self.better()
            self.swaps += better != self.fast
            self.fast, self.intervals, self.losses = better, intervals, None

    def better(self) -> int:
        """Number of the module with the lower base loss in the present interval, or else in the one before."""
        if self.losses is None:
            return self.fast
        first, second = self.losses.tolist()
        return self.fast if first == second else int(second < first)

    def state(self) -> dict[str, Any]:
        """What makes the same object again."""
        losses = {} if self.losses is None else {"losses": self.losses}
        return {"fast": self.fast, "swaps": self.swaps, "intervals": self.intervals, **losses}


def _plain_copy(config: LoraConfig) -> LoraConfig:
    """The configuration for a copy, whose weights are not initialized from the base model's."""
    config = deepcopy(config)
    config.init_lora_weights = True
    return config
