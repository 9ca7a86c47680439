"""The families of trainers, and all that differs between them: nothing else branches on a family's name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """
    Trainers that share a TRL parent.

    Args:
        name (`str`):
            Folder below `trainers/`, `losses/` and `tests/`.
        suffix (`str`):
            What the names of its classes end with before `Trainer` and `Config`: TRL's name.
        base (`str`):
            Class of the trainer without a method, in `trainers/<name>/base.py`.
        parent (`str`):
            TRL's trainer.
        view (`str`, *optional*):
            Method of a task that turns its problems into training rows. `None` takes the problems as they are.
        online_view (`str`, *optional*):
            The same where completions are sampled in training. Defaults to `view`.
        columns (`tuple[tuple[str, ...], ...]`):
            Sets of columns of which a dataset must have one. Empty where formats are converted instead; see
            `dataset_formats` of the trainer.
        row_check (`str`, *optional*):
            Which of `papertrl.data.rows.CHECKS` its rows must pass. `None` where formats are converted and checked.
        judged (`bool` or `str`):
            Whether completions are sampled and judged in training, or the config field that says so.
        length_field (`str`, *optional*):
            Config field of the longest completion that is sampled in training.
        generates (`bool`):
            Whether the model answers prompts, so that held-out ones can be measured. One that scores answers ranks
            held-out pairs instead.
        model_class (`str`):
            Class of `transformers` that loads the trained model.
        pipeline_tag (`str`):
            What the Hub files the trained model under.
        lora_task_type (`str`):
            PEFT's name for the kind of model.
        embedded (`dict[str, Any]`):
            Settings of the embedded task and tiny model, under which methods learn in a minute or two.
        exact (`dict[str, Any]`):
            Settings under which a trainer makes its parent's passes over its parent's micro-batches, to the bit.
    """

    name: str
    suffix: str
    base: str
    parent: str
    view: str | None = None
    online_view: str | None = None
    columns: tuple[tuple[str, ...], ...] = ()
    row_check: str | None = None
    judged: bool | str = False
    length_field: str | None = None
    generates: bool = True
    model_class: str = "AutoModelForCausalLM"
    pipeline_tag: str = "text-generation"
    lora_task_type: str = "CAUSAL_LM"
    embedded: Mapping[str, Any] = field(default_factory=dict)
    exact: Mapping[str, Any] = field(default_factory=dict)

    @property
    def plain(self) -> str:
        """Name under which a job asks for the trainer without a method."""
        return self.suffix.lower()

    @property
    def module(self) -> str:
        """Module of the base."""
        return f"papertrl.trainers.{self.name}.base"

    def is_judged(self, args: Any) -> bool:
        """Whether, under the config `args`, completions are sampled in training, which somebody judges."""
        return self.judged if isinstance(self.judged, bool) else bool(getattr(args, self.judged))

    def rows(self, task: Any, problems: Any, online: bool = False) -> Any:
        """Training rows of a task's `problems`."""
        view = (self.online_view or self.view) if online else self.view
        return problems if view is None else getattr(task, view)(problems)

    def completion_length(self, args: Any) -> int:
        """Longest completion, in tokens, that is sampled in training under the config `args`; 0 if none is."""
        return getattr(args, self.length_field) if self.is_judged(args) else 0

    def __str__(self) -> str:
        return self.name


POLICY = Family(
    name="policy",
    suffix="GRPO",
    base="PolicyTrainer",
    parent="GRPOTrainer",
    columns=(("prompt",),),
    row_check="prompts",
    judged=True,
    length_field="max_completion_length",
    embedded={
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 20,
        "per_device_train_batch_size": 256,
        "num_generations": 8,
        "max_completion_length": 5,
        "max_steps": 400,
    },
    exact={"fast_rollouts": False, "share_prompts": False, "group_batches": False, "skip_zero_rows": False},
)
PREFERENCE = Family(
    name="preference",
    suffix="DPO",
    base="PreferenceTrainer",
    parent="DPOTrainer",
    view="preference",
    online_view="online",
    judged="online_iterations",
    length_field="online_max_new_tokens",
    embedded={
        "learning_rate": 3e-4,
        "per_device_train_batch_size": 64,
        "max_steps": 200,
        "online_max_new_tokens": 14,
        "online_batch_size": 512,
    },
    exact={"share_prompts": False},
)
SUPERVISED = Family(
    name="supervised",
    suffix="SFT",
    base="SupervisedTrainer",
    parent="SFTTrainer",
    view="supervised",
    columns=(("text",), ("messages",), ("prompt", "completion"), ("input_ids",)),
    row_check="texts",
    embedded={"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 400},
)
REWARD = Family(
    name="reward",
    suffix="Reward",
    base="RewardModelTrainer",
    parent="RewardTrainer",
    view="preference",
    generates=False,
    model_class="AutoModelForSequenceClassification",
    pipeline_tag="text-classification",
    lora_task_type="SEQ_CLS",
    embedded={"learning_rate": 1e-3, "per_device_train_batch_size": 64, "max_steps": 200},
)
FAMILIES = {family.name: family for family in (POLICY, PREFERENCE, SUPERVISED, REWARD)}
