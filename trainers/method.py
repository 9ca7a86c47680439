"""What a method declares about itself, how methods combine, and what every family base shares."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from trl.trainer.utils import get_config_model_id

from ..core.configuration import merge_configs
from ..core.state import load_state, save_state
from .description import create_card
from .publishing import create_trainer_repo, publish_checkpoint, publish_trainer


@dataclass(frozen=True)
class Method:
    """
    Declaration of one paper's method, set as `method` on its trainer.

    Args:
        name (`str`):
            Short name: that of the method's files and of `--method`.
        summary (`str`):
            What the method does, in one line.
        extends (`tuple[str, ...]`):
            Stages that the method extends through `super()`. Any number of methods may extend a stage.
        replaces (`dict[str, dict[str, Any]]`):
            Stages that the method decides alone, each with the config values under which it leaves the stage to
            others. At most one of the methods combined in a trainer may replace a stage.
        neutral (`dict[str, Any]`):
            Config values under which the trainer equals its TRL parent.
        signal (`str`):
            Logged metric that is positive when the mechanism acts.
    """

    name: str
    summary: str
    extends: tuple[str, ...] = ()
    replaces: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    signal: str = ""

    def decides(self, stage: str, args: Any) -> bool:
        """Whether the method replaces `stage` under the config `args`."""
        if stage not in self.replaces:
            return False
        given_up = self.replaces[stage]
        return not given_up or any(getattr(args, name) != value for name, value in given_up.items())


class MethodTrainer:
    """
    Mixin of the family bases: adopts the config, combines methods, saves and restores their state, logs.

    Subclasses combine by inheritance. `__init_subclass__` collects the methods in the class's bases and merges
    configs, tags and citations unless the class body sets them. The constructor refuses two methods that, under the
    given config, replace one stage.
    """

    family: ClassVar[str]
    trl_suffix: ClassVar[str]
    stages: ClassVar[tuple[str, ...]]
    method: ClassVar[Method | None] = None
    methods: ClassVar[tuple[Method, ...]] = ()
    config_class: ClassVar[type]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        owners = [base for base in cls.__mro__ if isinstance(base.__dict__.get("method"), Method)]
        cls.methods = tuple(owner.method for owner in owners)
        for m in cls.methods:
            unknown = [stage for stage in (*m.extends, *m.replaces) if stage not in cls.stages]
            if unknown:
                raise TypeError(
                    f"Method '{m.name}' names stages {unknown}, but the {cls.family} stages are {cls.stages}."
                )
        if len(owners) > 1:
            papers = [owner._paper for owner in owners]
            inherited = {
                "config_class": lambda: merge_configs(
                    cls.__name__.removesuffix("Trainer") + "Config", tuple(owner.config_class for owner in owners)
                ),
                "_name": lambda: " + ".join(owner._name for owner in owners),
                "_tag_names": lambda: list(dict.fromkeys(tag for owner in owners for tag in owner._tag_names)),
                "_paper": lambda: {
                    "title": papers[0]["title"],
                    "id": papers[0]["id"],
                    "citation": "\n\n".join(paper["citation"] for paper in papers),
                },
            }
            for name, make in inherited.items():
                if name not in cls.__dict__:
                    setattr(cls, name, make())

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
        args = cls.config_class.adopt(args)
        cls.refuse_clashes(args)
        return args

    @classmethod
    def refuse_clashes(cls, args: Any) -> None:
        """
        Check that no two methods of this class replace the same stage under the config `args`.

        Raises:
            `ValueError`: naming both methods, the stage, and the settings that resolve the clash.
        """
        for i, first in enumerate(cls.methods):
            for second in cls.methods[i + 1 :]:
                for stage in first.replaces.keys() & second.replaces.keys():
                    if first.decides(stage, args) and second.decides(stage, args):
                        ways = " or ".join(
                            " and ".join(f"{name}={value!r}" for name, value in m.replaces[stage].items())
                            + f" ('{m.name}' then leaves the stage alone)"
                            for m in (first, second)
                            if m.replaces[stage]
                        )
                        raise ValueError(
                            f"Methods '{first.name}' and '{second.name}' do not combine as they are: both replace the "
                            f"stage '{stage}'. Leave one of them out{f', or set {ways}' if ways else ''}."
                        )

    def replaced_by(self, stage: str) -> str | None:
        """Name of the method that, under the trainer's config, decides `stage` alone; `None` if there is none."""
        return next((m.name for m in self.methods if m.decides(stage, self.args)), None)

    @classmethod
    def needed_columns(cls, args: Any) -> list[str]:
        """
        Dataset columns that the methods need, under the config `args`, beside those of the TRL parent. Extend through
        `super()`.
        """
        return []

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
        for values in self._metrics["train" if self.model.training else "eval"].values():
            values[:] = [v.item() if isinstance(v, torch.Tensor) else v for v in values]
        super().log(logs, start_time)

    # --- Card and Hub -------------------------------------------------------------------------------------------

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
            create_card(self, dataset_name, tags)

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

    # --- State --------------------------------------------------------------------------------------------------

    def method_state(self) -> dict[str, Any]:
        """State that is the same on every rank, by method name: plain values and tensors. Extend through `super()`."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Restore what [`method_state`] returned. Extend through `super()`."""

    def rank_state(self) -> dict[str, Any]:
        """State of this rank alone. Extend through `super()`."""
        return {"metrics": {name: [float(v) for v in values] for name, values in self._metrics["train"].items()}}

    def load_rank_state(self, state: dict[str, Any]) -> None:
        """Restore what [`rank_state`] returned. Extend through `super()`."""
        self._metrics["train"].update({name: list(values) for name, values in state["metrics"].items()})

    def _save_checkpoint(self, model, trial):
        # Before TRL's part, whose last file marks a checkpoint as complete and which may push the folder to the Hub
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            save_state(folder / "papertrl", {"methods": [m.name for m in self.methods], "state": self.method_state()})
        self.accelerator.wait_for_everyone()
        save_state(folder / f"papertrl_rank{self.accelerator.process_index}", self.rank_state())
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.load_method_state(load_state(Path(checkpoint) / "papertrl")["state"])
            rank_file = Path(checkpoint) / f"papertrl_rank{self.accelerator.process_index}"
            if rank_file.with_suffix(".json").exists():
                self.load_rank_state(load_state(rank_file))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train, or go on from a checkpoint; see [`~transformers.Trainer.train`].

        With `True`, the last *complete* checkpoint of `args.output_dir` is taken.

        Raises:
            `ValueError`: if the checkpoint does not exist, is damaged, or was written by other methods.
        """
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            check_checkpoint(resume_from_checkpoint, [m.name for m in self.methods])
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)


def last_complete_checkpoint(output_dir: str) -> Path:
    """
    The newest checkpoint below `output_dir` that was written to its end.

    Raises:
        `ValueError`: if there is none.
    """
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if (p / "trainer_state.json").exists()]
    if not folders:
        raise ValueError(f"`resume_from_checkpoint`: no complete checkpoint below '{output_dir}'.")
    return max(folders, key=lambda p: int(p.name.rsplit("-", 1)[1]))


def check_checkpoint(folder: str | Path, methods: list[str]) -> None:
    """
    Check that a checkpoint can be resumed by `methods`, without loading its tensors.

    Raises:
        `ValueError`: naming the folder and what is missing, damaged or different.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`resume_from_checkpoint`: '{folder}' is not a folder.")
    try:
        json.loads((folder / "trainer_state.json").read_text())
        written_by = json.loads((folder / "papertrl.json").read_text())["methods"]
        for file in folder.rglob("*.safetensors"):
            with safe_open(file, "pt") as tensors:
                tensors.keys()
        for name in ("optimizer.pt", "scheduler.pt"):
            if (folder / name).exists():
                torch.load(folder / name, weights_only=True, map_location="meta")
    except Exception as error:
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' is damaged or no papertrl checkpoint ({error}). Resume from "
            f"another '{PREFIX_CHECKPOINT_DIR}-*' folder, or start anew without `resume_from_checkpoint`."
        ) from error
    if sorted(written_by) != sorted(methods):
        raise ValueError(
            f"`resume_from_checkpoint`: '{folder}' was written by methods {written_by}, but this trainer runs "
            f"{methods}. Resume with the same methods."
        )


def compose(*trainers: type, name: str | None = None) -> type:
    """
    Trainer class that combines several methods of one family.

    The order in which stages run is fixed by the family base. Within a stage the methods act in the order given here;
    where two configs set different defaults for one TRL field, the first wins.

    Args:
        trainers (trainer classes):
            At least one, all of one family.
        name (`str`, *optional*):
            Name of the class. Defaults to the methods' names run together.

    Raises:
        `TypeError`: if there are none, they are of different families, one is listed twice, or has no method.

    Example:

    ```python
    >>> from papertrl import DlerGRPOTrainer, LpRegGRPOTrainer, compose
    >>> compose(LpRegGRPOTrainer, DlerGRPOTrainer).__name__
    'LpRegDlerGRPOTrainer'
    ```
    """
    if not trainers:
        raise TypeError("`compose` needs at least one trainer.")
    bases = [t.__name__ for t in trainers if not t.methods]
    if bases and len(trainers) > 1:
        raise TypeError(f"`compose`: {bases} have no method; leave them out, every other trainer builds on its base.")
    if len(set(trainers)) != len(trainers):
        raise TypeError(f"`compose`: a method is listed twice in {[t.__name__ for t in trainers]}.")
    families = {t.__name__: t.family for t in trainers}
    if len(set(families.values())) > 1:
        raise TypeError(f"`compose`: methods of different families do not combine, got {families}.")
    if len(trainers) == 1:
        return trainers[0]
    if name is None:
        suffix = trainers[0].trl_suffix
        name = "".join(t.__name__.removesuffix(suffix) for t in trainers) + suffix
    return type(name, trainers, {"__module__": __name__, "__doc__": f"Combination of {', '.join(families)}."})
