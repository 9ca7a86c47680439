"""What every trainer checks of what it is given: whole models, rows that can be trained on, and enough of them."""

from typing import Any

from datasets import Dataset

from ..data.converters import check_prompt_is_read
from ..data.rows import CHECKS
from ..models.loading import reward_model, whole_checkpoints


class ChecksInputs:
    """Mixin of [`~papertrl.trainers.slots.FillsSlots`]."""

    def __init__(self, *args: Any, **kwargs: Any):
        # A family that trains a scorer puts a new head on a language model
        with whole_checkpoints(new_head=not self.family.generates):
            super().__init__(*args, **kwargs)

    @staticmethod
    def load_reward_models(reward_funcs: Any, args: Any) -> list[Any] | None:
        """
        Reward functions, with models in place of their names.

        TRL takes the policy's revision for them as well, which is one of another repository.
        """
        if reward_funcs is None:
            return None
        funcs = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        options = (args.trust_remote_code, args.model_init_kwargs)
        return [reward_model(func, *options) if isinstance(func, str) else func for func in funcs]

    def check_rows(self, given: dict[str, Any]) -> None:
        """
        Check the rows of the datasets among the arguments of TRL's constructor; those of a stream are left alone.

        Raises:
            `ValueError`: naming the dataset, the row, the column and what is wrong.
        """
        if given.get("formatting_func") is not None:
            return
        datasets = {"train_dataset": given.get("train_dataset")}
        evaluated = given.get("eval_dataset")
        datasets |= evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}
        for name, dataset in datasets.items():
            if not isinstance(dataset, Dataset):
                continue
            if self.family.row_check is None:
                check_prompt_is_read(dataset)
            elif "prompt" in dataset.column_names or self.family.row_check == "texts":
                CHECKS[self.family.row_check](dataset, f"`{name}`")

    def _prepare_dataset(self, dataset, *args, **kwargs):
        prepared = super()._prepare_dataset(dataset, *args, **kwargs)
        if isinstance(prepared, Dataset) and len(prepared) == 0 < len(dataset):
            raise ValueError(
                f"`max_length` is {self.args.max_length}, and none of the {len(dataset)} rows of the "
                f"{kwargs.get('dataset_name', args[-1])} dataset leaves room for a completion within it. Raise it, or "
                "shorten the prompts."
            )
        return prepared

    # --- How many ------------------------------------------------------------------------------------------------

    def rows_of_a_step(self) -> tuple[int, str]:
        """Fewest rows of a map-style dataset of which an update can be made, and why."""
        args = self.args
        if not args.dataloader_drop_last:
            return 1, "an update"
        processes = 1 if args.accelerator_config.split_batches else self.accelerator.num_processes
        return (
            args.train_batch_size * processes,
            f"`per_device_train_batch_size` {args.per_device_train_batch_size} on {processes} processes, with "
            "`dataloader_drop_last`",
        )

    def check_number_of_rows(self) -> None:
        """
        Check that there are rows for one update.

        Raises:
            `ValueError`: naming how many there are, and how many it takes.
        """
        needed, why = self.rows_of_a_step()
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) < needed:
            raise ValueError(
                f"`train_dataset` has {len(self.train_dataset)} rows, but an update takes {needed} ({why}): nothing "
                "would be trained. Lower what it takes, or give more rows."
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        Train; see [`~transformers.Trainer.train`].

        Raises:
            `ValueError`: if there are too few rows for one update.
        """
        self.check_number_of_rows()
        result = super().train(*args, **kwargs)
        if self.state.global_step == 0 < self.state.max_steps:
            raise ValueError(
                "`train_dataset` ended before the first update, so that nothing was trained. It needs "
                f"{self.rows_of_a_step()[0]} rows or more."
            )
        return result
