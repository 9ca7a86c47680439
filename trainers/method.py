"""What every trainer of the library shares, whatever its family: config, methods, slots, metrics, state, card."""

import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from torch.distributed.fsdp import StateDictType
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from trl.trainer.utils import get_config_model_id

from ..core.configuration import differing_text, field_default, merge_configs
from ..core.declaration import Method
from ..core.errors import paragraph
from ..core.family import Family
from ..core.slots import Component, refuse_shared_slots
from ..core.stages import Link, Staged, is_off, remedy, ways_off
from .description import create_card
from .finite import StopsWhereNotFinite
from .publishing import create_trainer_repo, publish_checkpoint, publish_trainer
from .resuming import Resumes
from .slots import FillsSlots

logger = get_logger(__name__)


class MethodTrainer(FillsSlots, StopsWhereNotFinite, Resumes, Staged):
    """
    Mixin of the family bases: adopts the config, combines methods, fills slots, saves and restores state, logs.

    Subclasses combine by inheritance. `__init_subclass__` collects the methods and components in the class's bases
    and merges configs, tags and citations unless the class body sets them. The constructor refuses two methods that,
    under the given config, replace one stage or fill one slot.
    """

    family: ClassVar[Family]
    config_class: ClassVar[type]
    hooks = (
        "refuse_clashes",
        "method_state",
        "load_method_state",
        "rank_state",
        "load_rank_state",
        "share_rank_states",
        "layout",
        "_name",
        "_tag_names",
        "_paper",
    )
    stages = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        listed = [component for base in cls.__mro__ for component in base.__dict__.get("components", ())]
        odd = [c for c in listed if not (isinstance(c, type) and issubclass(c, Component))]
        if odd:
            raise TypeError(f"`{cls.__name__}.components` must be component classes, got {odd}.")
        cls.components = tuple(dict.fromkeys(listed))
        strange = [c.method.name for c in cls.components if c.method.family not in (None, cls.family.name)]
        if strange:
            raise TypeError(f"Components {strange} do not serve the family {cls.family}, as their declarations say.")
        owners = cls.owners()
        for method in cls.methods:
            if method.kind != "objective" or method.family != cls.family.name:
                raise TypeError(
                    f"Method '{method.name}' is declared as {method.kind} of {method.family}, but is the `method` of "
                    f"a trainer of the family {cls.family}."
                )
        if len(set(cls.methods)) < len(cls.methods):
            raise TypeError(f"`{cls.__name__}` has a method twice: {[m.name for m in cls.methods]}.")
        # What a method carries is a part of it, and no method beside it
        carried = {component for owner in owners for component in owner.__dict__["components"]}
        cls.methods += tuple(component.method for component in cls.components if component not in carried)
        if not cls.methods:
            return
        configs = tuple(owner.__dict__.get("config_class", owner.config_class) for owner in owners)
        plain = [base.config_class for base in cls.__mro__ if {"stages", "config_class"} <= base.__dict__.keys()]
        made = {
            "config_class": lambda: merge_configs(
                cls.__name__.removesuffix("Trainer") + "Config",
                (*(configs or plain[:1]), *(c.config_class for c in cls.components)),
            ),
            "_name": lambda: " + ".join(m.title for m in cls.methods),
            "_tag_names": lambda: list(
                dict.fromkeys(["trl", "papertrl", cls.family.plain, *(tag for m in cls.methods for tag in m.tags)])
            ),
            "_paper": lambda: _paper_of((*cls.methods, *(c.method for c in cls.components))),
        }
        for name, make in made.items():
            if name not in cls.__dict__ or (name == "config_class" and cls.components):
                setattr(cls, name, make())
        if cls in owners:
            cls._check_settings()

    @classmethod
    def _check_settings(cls) -> None:
        """Check that the settings under which stages are off are fields of the config."""
        known = {f.name for f in fields(cls.config_class)}
        strange = [name for name in cls.method.neutral if name not in known]
        if strange:
            raise TypeError(
                f"The declaration of method '{cls.method.name}' has the neutral settings {strange}, but "
                f"`{cls.config_class.__name__}` has no such field."
            )
        for stage, off in {**cls.extends, **cls.replaces}.items():
            unknown = [name for way in ways_off(off) for name in way if name not in known]
            if unknown:
                raise TypeError(
                    f"Method '{cls.method.name}' says that its stage '{stage}' is off under {unknown}, but "
                    f"`{cls.config_class.__name__}` has no such field."
                )

    @classmethod
    def make_config(cls, args: Any, model: Any) -> Any:
        """
        Config of this class for the `args` a user passed.

        Args:
            args (config or `None`):
                A config of this trainer, of its TRL parent (the method's fields then take their defaults), or `None`.
            model (`str` or `~transformers.PreTrainedModel`):
                Names the output directory when `args` is `None`, as TRL does.
        """
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = cls.config_class(f"{model_name.split('/')[-1]}-{cls.__name__.removesuffix('Trainer')}")
        given = args
        args = cls.config_class.adopt(args)
        if args is not given:
            cls._warn_of_what_is_off(args)
        for name, defaults in cls.config_class.differing_defaults.items():
            default = field_default(cls.config_class.__dataclass_fields__[name])
            if getattr(args, name) == default:
                logger.warning(f"`{name}` is {default!r}. {differing_text(defaults)} Set it to decide.")
        cls._warn_of_what_does_nothing(args)
        cls.refuse_clashes(args)
        refuse_shared_slots(cls.components, args)
        return args

    @classmethod
    def _warn_of_what_is_off(cls, args: Any) -> None:
        """Tell of stages that a method would act in by default, but for values of TRL's own config."""
        defaults = SimpleNamespace(**{f.name: field_default(f) for f in fields(cls.config_class)})
        for owner in cls.owners():
            for stage, off in {**owner.__dict__.get("extends", {}), **owner.__dict__.get("replaces", {})}.items():
                if is_off(off, args) and not is_off(off, defaults):
                    logger.warning(
                        f"'{owner.method.name}' leaves the stage '{stage}' alone with {remedy(off)}, which the config "
                        f"passed has. Pass a `{cls.config_class.__name__}` for the method's own defaults."
                    )

    @classmethod
    def _warn_of_what_does_nothing(cls, args: Any) -> None:
        """Tell of methods that are named and off, and of settings without effect on this machine."""
        for owner in cls.owners():
            stages = {**owner.__dict__.get("extends", {}), **owner.__dict__.get("replaces", {})}
            if stages and all(is_off(off, args) for off in stages.values()):
                ways = " or ".join(dict.fromkeys(map(remedy, stages.values())))
                logger.warning(f"'{owner.method.name}' does nothing: it is off with {ways}. Set another value.")
        for component in cls.components:
            if not component(args).on:
                ways = ", ".join(f"{name}={value!r}" for name, value in component.method.neutral.items())
                logger.warning(f"'{component.method.name}' does nothing: it is off with {ways}. Set another value.")
        for name in ("fp16", "fp16_full_eval"):
            if getattr(args, name) and args.device.type == "cpu":
                logger.warning(f"`{name}` must be False on the CPU, where it has no effect, got True.")

    def attach_slots(self) -> None:
        super().attach_slots()
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        length = self.family.completion_length(self.args)
        if context and length and length >= context:
            logger.warning(
                f"`{self.family.length_field}` should be below {context}, the `max_position_embeddings` of the model, "
                f"so that the prompt has room as well, got {length}. Longer rollouts are computed at positions that "
                "the model has never seen, or fail."
            )

    @classmethod
    def needs_scores(cls, args: Any) -> bool:
        """Whether, under the config `args`, there must be somebody who judges completions."""
        return cls.family.is_judged(args)

    @classmethod
    def dataset_formats(cls, args: Any) -> tuple[str, ...]:
        """
        Formats of [`~papertrl.data.FORMATS`] that the training dataset may have under the config `args`, the best
        first: a job converts to them. None where the family's columns are taken as they are.
        """
        return ()

    @classmethod
    def needed_columns(cls, args: Any) -> list[str]:
        """
        Dataset columns that the methods need, under the config `args`, beside those of the TRL parent. Extend through
        `super()`.
        """
        return []

    # --- Stages and columns ---------------------------------------------------------------------------------------

    def _user_links(self, stage: str, function: str) -> tuple[list[Link], list[Link]]:
        user = self.user_stages.get(function)
        if user is None:
            return [], []
        signature = inspect.signature(getattr(type(self), function))

        def run(trainer, *args, **kwargs):
            bound = signature.bind(trainer, *args, **kwargs)
            bound.apply_defaults()
            given = dict(list(bound.arguments.items())[1:])
            default = trainer._run(function, type(trainer), args, kwargs) if user.extends else None
            return user(trainer, given, default)

        link = Link(user, run)
        return ([link], []) if user.extends else ([], [link])

    def acting_in(self, *stages: str) -> list[str]:
        """Methods, the user's functions and classes without a method that act in one of these stages at present."""
        classes, owners = type(self).__mro__, self.owners()
        base = next(i for i, cls in enumerate(classes) if "stages" in cls.__dict__)
        functions = {function for stage in stages for function in self.stages[stage]}
        names = [name for stage in stages for name in self.names_acting(stage, self.args)]
        names += [user.name for function, user in self.user_stages.items() if function in functions]
        names += [
            cls.__name__ for cls in classes[:base] if cls not in owners and not functions.isdisjoint(cls.__dict__)
        ]
        return list(dict.fromkeys(names))

    def check_columns(self, dataset: Any, args: Any) -> None:
        """
        Check that `dataset` has the columns that the methods need under the config `args`, and keeps them.

        Raises:
            `ValueError`: if it is empty, or lacks a column; the message names the column and those present.
        """
        needed = self.needed_columns(args)
        if needed and args.remove_unused_columns:
            raise ValueError(
                f"`remove_unused_columns` must be False, got True: it would drop the columns {needed}, which "
                f"{[m.name for m in self.methods]} need."
            )
        if dataset is None:
            return
        names = getattr(dataset, "column_names", None)
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise ValueError("`train_dataset` is empty: it has no rows to train on.")
        for column in needed:
            if names is not None and column not in names:
                raise ValueError(
                    f"Methods {[m.name for m in self.methods]} need the dataset column '{column}', but the columns "
                    f"are {sorted(names)}."
                )

    # --- Metrics ------------------------------------------------------------------------------------------------

    def log_metric(self, name: str, value: torch.Tensor | float) -> None:
        """
        Record one value of metric `name`, averaged until the next log.

        A tensor stays on its device until the log is written, so that recording does not wait for it.
        """
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(value.detach() if isinstance(value, torch.Tensor) else value)

    def log_mean(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Record the mean over all ranks of something that sums to `total` over `count` items on this one."""
        self.log_means({name: (total, count)})

    def log_means(self, sums: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """[`log_mean`] of several metrics, of which each has its total and its count, in one reduction."""
        local = torch.stack([torch.stack([part.detach().float() for part in parts]) for parts in sums.values()])
        for name, (total, count) in zip(sums, self.accelerator.reduce(local, reduction="sum"), strict=True):
            self.log_metric(name, total / count.clamp(min=1.0))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train and self.nothing_left:
            return
        for values in self._metrics["train" if self.model.training else "eval"].values():
            values[:] = [v.item() if isinstance(v, torch.Tensor) else v for v in values]
        super().log(logs, start_time)

    # --- Model, card and Hub ------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> Any:
        """
        Save the model; see [`~transformers.Trainer.save_model`]. Weights that are not finite are refused.

        Under FSDP the model is written as a whole, outside of checkpoints also with `SHARDED_STATE_DICT`, with which
        transformers writes none.
        """
        folder = Path(output_dir or self.args.output_dir)
        if not self.is_fsdp_enabled or folder.name == f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}":
            return super().save_model(output_dir, _internal_call)
        plugin = self.accelerator.state.fsdp_plugin
        kept, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            return super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = kept

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """
        Write the model card, and `run.json` that it is made from, into the output directory.

        Args:
            model_name (`str`, *optional*):
                Taken for TRL's sake; the card is headed by the name of the output directory or, once published, of
                the repository.
            dataset_name (`str`, *optional*):
                Dataset trained on.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        if self.is_world_process_zero():
            try:
                create_card(self, dataset_name, tags)
            except Exception as error:
                # TRL writes one before each checkpoint, which it must not cost
                logger.warning(f"The model card could not be written: {paragraph(error)}")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository to publish to, where it does not exist; see [`~transformers.Trainer`]."""
        if self.is_world_process_zero():
            self.hub_model_id = create_trainer_repo(self.args, token, private)
            self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        Save model and card, and publish them as `papertrl publish` does; see [`~transformers.Trainer.push_to_hub`].

        `blocking` has no effect: the call returns when the commit is made.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self.create_model_card(**kwargs)
            return publish_trainer(self, commit_message, token, revision or self.args.hub_revision, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # TRL's would send the whole output directory, whatever lies in it, and optimizer state with some strategies
        if self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            publish_checkpoint(self, Path(checkpoint_folder))


def _paper_of(methods: tuple[Method, ...]) -> dict[str, str] | None:
    papers = [method.paper for method in methods if method.paper is not None]
    if not papers:
        return None
    citations = dict.fromkeys(paper.citation for paper in papers)
    return {"title": papers[0].title, "id": papers[0].id, "citation": "\n\n".join(citations)}
