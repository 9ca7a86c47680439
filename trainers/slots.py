"""Where a trainer carries components: every slot is called here, for all families."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import set_seed
from trl.trainer.utils import create_model_from_path

from ..core.slots import Component, Components
from ..models.loading import whole_checkpoints
from .inputs import ChecksInputs
from .user_stages import UserStage, check_user_stages

# Functions of stages whose base calls components, with their hook
HOOKS = {
    "choose_prompts": "choose",
    "logits_processors": "logits_processors",
    "old_pass_needs": "needs",
    "collect_statistics": "see_rollouts",
    "prepare_objective": "prepared",
    "observe_batch": "observe",
    "contributing_rows": "computes_all_rows",
    "after_backward": "after_backward",
    "before_update": "before_update",
}


class FillsSlots(ChecksInputs):
    """
    Mixin of [`~papertrl.trainers.method.MethodTrainer`]: fills the slots, and calls them around TRL's steps.

    *data*, *reward* and *model* act before TRL's constructor, *optimizer* and *observer* after it, *schedule* around
    the gradient; *prompts* before each optimizer step, where the family does not ask for rows itself. *decoding* acts
    where the policy family samples.
    """

    components: ClassVar[tuple[type[Component], ...]] = ()
    # Class of the model and further arguments with which TRL loads one that is given by name
    architecture: ClassVar[Any] = None
    architecture_kwargs: ClassVar[Mapping[str, Any]] = {}
    # Set before TRL's constructor runs, which calls stages
    slots: Components
    user_stages: dict[str, UserStage]
    # Of the micro-batches of an optimizer step that are still to come, over all ranks
    _chosen_rows: list[list[int]]

    # --- Construction ---------------------------------------------------------------------------------------------

    def trl_arguments(
        self, parent: type, model: Any, *args: Any, stages: Mapping[str, Callable | str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """
        Arguments of TRL's constructor by name: config adopted, columns checked, slots filled.

        The one place where the slots *data*, *reward* and *model* act.

        Args:
            parent (`type`):
                TRL's trainer.
            model, *args, **kwargs:
                As the user passed them.
            stages (`dict[str, Callable]`, *optional*):
                The user's functions for stages, by the stage's function.
        """
        given = dict(inspect.signature(parent.__init__).bind(self, model, *args, **kwargs).arguments)
        del given["self"]
        config = given["args"] = self.make_config(given.get("args"), model)
        self.user_stages = check_user_stages(type(self), config, stages)
        # Stages run inside of TRL's constructor, before it sets this
        self.args = config
        self.slots = Components(c for c in (component(config) for component in self.components) if c.on)
        self._refuse_hidden_components()
        for component in self.slots.of("data"):
            given["train_dataset"] = component.rows(given.get("train_dataset"))
        self.check_columns(given.get("train_dataset"), config)
        self.check_rows(given)
        rewards = [reward for component in self.slots.of("reward") for reward in component.reward_funcs()]
        if rewards and not self.family.judged:
            raise ValueError(
                f"Component '{self.slots.of('reward')[0].method.name}' adds a reward, but the family {self.family} "
                "samples nothing to judge. Leave it out."
            )
        if rewards:
            given["reward_funcs"] = [*as_list(given.get("reward_funcs")), *rewards]
        if self.slots.of("model") and isinstance(model, str):
            given["model"] = self._load_model(model, config, given.pop("quantization_config", None))
        for component in self.slots.of("model"):
            given["model"] = component.prepare(given["model"])
        return given

    @classmethod
    def _load_model(cls, name: str, args: Any, quantization_config: Any) -> torch.nn.Module:
        kwargs = dict(args.model_init_kwargs or {}) | dict(cls.architecture_kwargs)
        if quantization_config is not None:
            kwargs["quantization_config"] = quantization_config
        if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
            kwargs["device_map"] = None
        kwargs.setdefault("trust_remote_code", args.trust_remote_code)
        set_seed(args.seed)
        with whole_checkpoints(new_head=not cls.family.generates):
            return create_model_from_path(name, cls.architecture, **kwargs)

    def attach_slots(self) -> None:
        """Let the components see the finished trainer; the last call of a family base's constructor."""
        self._check_chooser()
        optimizers = self.slots.of("optimizer")
        if optimizers and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            raise ValueError(
                f"`optimizers`: component '{optimizers[0].method.name}' brings an optimizer, and one is passed too. "
                "Leave one of them out."
            )
        for component in optimizers:
            self.optimizer_cls_and_kwargs = component.optimizer_cls_and_kwargs(self.args, self.model)
        for component in self.slots:
            component.attach(self)
            for callback in component.callbacks():
                self.add_callback(callback)

    def _refuse_hidden_components(self) -> None:
        """Check that nobody takes the place of the base in a stage where components act."""
        for function, hook in HOOKS.items():
            acting = [c for c in self.slots if getattr(type(c), hook) is not getattr(Component, hook)]
            user = self.user_stages.get(function)
            if acting and user is not None and not user.extends:
                raise ValueError(
                    f"`stages['{function}']`: component '{acting[0].method.name}' acts in this stage, in whose place "
                    f"'{user.name}' would be. Take a parameter `default`, or leave one of the two out."
                )
        chooser = self.slots.prompts()
        if chooser is not None and "choose_prompts" in self.stages and self.replaced_by("choose_prompts"):
            raise ValueError(
                f"Component '{chooser.method.name}' and method '{self.replaced_by('choose_prompts')}' both choose "
                "prompts. Leave one of them out."
            )

    def _check_chooser(self) -> None:
        chooser = self.slots.prompts()
        if chooser is not None and not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"Component '{chooser.method.name}' chooses rows and needs a map-style `train_dataset`, got "
                f"`{type(self.train_dataset).__name__}`. Load the dataset without streaming."
            )
        if chooser is not None and getattr(self.args, "packing", False):
            raise ValueError(
                f"`packing` must be False with component '{chooser.method.name}', which chooses rows, got True: a "
                "packed row holds several."
            )

    def coupled_micro_batches(self) -> str | None:
        """Why micro-batches of one update depend on each other, and what to do, or `None` if they do not."""
        return None

    # --- Rows -----------------------------------------------------------------------------------------------------

    def keyed_generator(self, *key: int) -> torch.Generator:
        """CPU generator for this optimizer step and `key`: the same on every rank and after a resume."""
        number = self.args.seed
        for part in (self.state.global_step, *key):
            number = (number * 1_000_003 + part + 1) % 2**62
        return torch.Generator().manual_seed(number)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.chooses_rows:
            return batches, num_items
        # Chosen right before the step, so that all that was observed of earlier ones has arrived; the loader's rows
        # only count
        size, rank = self.args.per_device_train_batch_size, self.accelerator.process_index
        batch = size * self.accelerator.num_processes
        rows = self.slots.prompts().choose(batch * len(batches), 0, self.keyed_generator(0))
        self._chosen_rows = [rows[start : start + batch] for start in range(0, len(rows), batch)]
        batches = [
            self.data_collator(self.train_dataset.__getitems__(part[rank * size : (rank + 1) * size]))
            for part in self._chosen_rows
        ]
        return batches, self._get_num_items_in_batch(batches, device)

    @property
    def chooses_rows(self) -> bool:
        """Whether the slot *prompts* chooses the rows of optimizer steps."""
        return self.slots.prompts() is not None and not self.choosing_itself()

    def observe_rows(self, losses: torch.Tensor) -> None:
        """
        Tell the slot *prompts* what came of the rows that it chose for a micro-batch.

        Args:
            losses (`torch.Tensor` of shape `(rows,)`):
                Loss of each row of this rank, in order.
        """
        if self.chooses_rows and self.model.training:
            self.slots.prompts().observe(self._chosen_rows.pop(0), self.accelerator.gather(losses.detach()))

    def choosing_itself(self) -> bool:
        """Whether the family asks the slot *prompts* itself, before it samples."""
        return False

    # --- Updates ------------------------------------------------------------------------------------------------

    def after_backward(self) -> None:
        """Stage *after backward*: the gradient of one more micro-batch of this rank has been added."""
        for component in self.slots:
            component.after_backward()

    def before_update(self, grad_norm: torch.Tensor) -> None:
        """
        Stage *before update*: the gradient is complete and clipped; learning rates and gradients may be changed.

        The scheduler sets learning rates anew after the step. Parameters whose `grad` is `None` are left alone by the
        optimizer, its state included.

        Args:
            grad_norm (`torch.Tensor` or `float`):
                Norm before clipping.
        """
        for component in self.slots:
            component.before_update(grad_norm)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.after_backward()
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        # Called once per update, between clipping and the optimizer's step
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.before_update(grad_norm)
        return grad_norm


def as_list(value: Any) -> list[Any]:
    """A value, several, or none, as a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
