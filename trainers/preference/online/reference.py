"""The reference of the online loop, which may move when an iteration begins."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from ...reference import REFERENCE_ADAPTER, keep_adapter


class MovingReference:
    """
    Moves a trainer's reference as `online_reference` says, saves and restores it.

    Args:
        trainer ([`~papertrl.PreferenceTrainer`]):
            Holds the reference: `ref_model`, or the adapter named `"ref"`.

    Raises:
        `ValueError`: if the reference is to move and cannot; the message says what stands in the way.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.kind: str = trainer.args.online_reference
        # That for which the reference is right
        self.iteration = 0
        if self.kind != "initial":
            self._check()

    def _check(self) -> None:
        trainer = self.trainer
        adapter = is_peft_model(trainer.model)
        refused = {
            "FSDP": trainer.is_fsdp_enabled,
            "DeepSpeed": trainer.is_deepspeed_enabled,
            "an adapter (its average is not that of the models)": adapter and self.kind == "ema",
            "an adapter and a `ref_model`": adapter and trainer.ref_model is not None,
        }
        for what, present in refused.items():
            if present:
                raise ValueError(
                    f"`online_reference='{self.kind}'` changes the reference between iterations, which is not "
                    f"supported with {what}. Set `online_reference='initial'`."
                )
        if adapter:
            keep_adapter(trainer.model)

    def enter(self, iteration: int) -> None:
        """Make the reference right for an iteration that begins now."""
        if iteration > self.iteration:
            self.move()
            self.iteration = iteration

    @torch.no_grad()
    def move(self) -> None:
        """Let the reference follow the policy as it is now."""
        if self.kind == "initial":
            return
        policy = self._unwrapped(self.trainer.model_wrapped)
        if self.trainer.ref_model is None:
            weights = get_peft_model_state_dict(policy, adapter_name=policy.active_adapter)
            self.set_weights({name: value.clone() for name, value in weights.items()})
            return
        weight = 1.0 if self.kind == "previous" else 1.0 - self.trainer.args.online_reference_decay
        theirs = self._unwrapped(self.trainer.ref_model)
        for target, source in zip(theirs.parameters(), policy.parameters(), strict=True):
            target.lerp_(source.to(target), weight)

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters of the reference, by name."""
        if self.trainer.ref_model is None:
            policy = self._unwrapped(self.trainer.model)
            return dict(get_peft_model_state_dict(policy, adapter_name=REFERENCE_ADAPTER))
        return dict(self._unwrapped(self.trainer.ref_model).named_parameters())

    @torch.no_grad()
    def set_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Give the reference what [`weights`] returned."""
        if self.trainer.ref_model is None:
            set_peft_model_state_dict(self._unwrapped(self.trainer.model), weights, adapter_name=REFERENCE_ADAPTER)
            return
        for name, parameter in self._unwrapped(self.trainer.ref_model).named_parameters():
            parameter.copy_(weights[name])

    def _unwrapped(self, model: torch.nn.Module) -> torch.nn.Module:
        return self.trainer.accelerator.unwrap_model(model)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing of a reference that stays."""
        if self.kind == "initial":
            return {}
        weights = {name: value.detach().cpu() for name, value in self.weights().items()}
        return {"online_reference": {"iteration": self.iteration, "weights": weights}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what [`state`] returned."""
        if "online_reference" in state:
            self.iteration = state["online_reference"]["iteration"]
            self.set_weights(state["online_reference"]["weights"])
