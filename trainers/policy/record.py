"""The records that policy stages pass on. Their contract is stated and checked here, once."""

from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any

import torch

# Model inputs of multimodal rows, which TRL names at the top level of its batch
MULTIMODAL_KEYS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)

# Fields whose columns are the tokens of completions, as far as they have two dimensions
_BY_TOKEN = {
    "completion_ids",
    "completion_mask",
    "loss_mask",
    "advantages",
    "old_per_token_logps",
    "ref_per_token_logps",
    "sampling_per_token_logps",
    "importance_sampling_ratio",
}


class Source(IntEnum):
    """Where a row's completion comes from."""

    POLICY = 0
    HINTED = 1
    DEMONSTRATION = 2
    REPLAY = 3


@dataclass
class Generation:
    """
    Completions of this rank before they become tensors: one entry per row in every list.

    Fields are those that TRL's `_generate` returns, next to the dataset rows (`inputs`) and the prompts they belong
    to. `log_extra` holds the columns that reward functions logged for these rows. `sampled_prompt_ids` are the prompts
    that rows were sampled under, where for some row that is not the one of `prompt_ids`. `source` is each row's
    [`Source`], for rollouts that know better than that all come from the policy.
    """

    inputs: list[dict[str, Any]]
    prompts: list[Any]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    tool_mask: list[list[int]] | None
    completions: list[Any]
    sampling_logps: list[list[float]] | None
    extra_fields: dict[str, Any]
    images: list[Any] | None
    tool_images: list[Any]
    log_extra: dict[str, list[Any]] = field(default_factory=dict)
    sampled_prompt_ids: list[list[int]] | None = None
    source: list[int] | None = None

    @classmethod
    def from_trl(cls, inputs: list[dict[str, Any]], prompts: list[Any], generated: tuple) -> "Generation":
        """From what TRL's `_generate` returned for `prompts`; fields of a rollout function join the dataset rows."""
        prompt_ids, completion_ids, tool_mask, completions, logps, extra, images, tool_images = generated
        inputs = [
            {**row, **{k: v[i] if isinstance(v, list) else v for k, v in extra.items()}}
            for i, row in enumerate(inputs)
        ]
        return cls(
            inputs, prompts, prompt_ids, completion_ids, tool_mask, completions, logps, extra, images, tool_images
        )

    def as_trl(self) -> tuple:
        """In the order in which TRL's `_generate` returns it."""
        return (
            self.prompt_ids,
            self.completion_ids,
            self.tool_mask,
            self.completions,
            self.sampling_logps,
            self.extra_fields,
            self.images,
            self.tool_images,
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per row, for moving rows between places and ranks."""
        lists = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), list)}
        # The source is part of the scored batch
        lists = {name: values for name, values in lists.items() if values and name != "source"}
        return [
            {name: values[i] for name, values in lists.items()}
            | {"log_extra": {name: values[i] for name, values in self.log_extra.items()}}
            for i in range(len(self.prompts))
        ]

    @classmethod
    def from_rows(cls, rows: list[dict[str, Any]]) -> "Generation":
        """Inverse of [`rows`], for text rows without fields that only a rollout function knows."""

        def column(name):
            return [row[name] for row in rows] if name in rows[0] else None

        names = dict.fromkeys(name for row in rows for name in row["log_extra"])
        sampled = None
        if any("sampled_prompt_ids" in row for row in rows):
            sampled = [row.get("sampled_prompt_ids", row["prompt_ids"]) for row in rows]
        return cls(
            **{name: column(name) for name in ("inputs", "prompts", "prompt_ids", "completion_ids", "completions")},
            tool_mask=column("tool_mask"),
            sampling_logps=column("sampling_logps"),
            extra_fields={},
            images=None,
            tool_images=[],
            log_extra={name: [row["log_extra"].get(name) for row in rows] for name in names},
            sampled_prompt_ids=sampled,
        )


@dataclass
class ScoredBatch:
    """
    What reward stages see of a generation batch: all rows of all ranks, in rank order; the same on every rank.

    Args:
        rewards (`torch.Tensor` of shape `(rows, sources)`, float32):
            Unsummed rewards; NaN where a source does not apply to a row.
        raw_rewards (`torch.Tensor` of shape `(rows, sources)`, float32):
            What the reward functions returned for these rows, before the score stage.
        source_names (`list[str]`):
            Names of the reward functions, in column order.
        group_ids (`torch.Tensor` of shape `(rows,)`, int64):
            Rows of one prompt share an id; ids count from 0 within the generation batch.
        prompt_indices (`torch.Tensor` of shape `(rows,)`, int64):
            Row of the training dataset, -1 where the data loader chose it.
        lengths (`torch.Tensor` of shape `(rows,)`, int64):
            Tokens of the completion, the end token included.
        truncated (`torch.Tensor` of shape `(rows,)`, bool):
            Whether the completion ended without an end token.
        source (`torch.Tensor` of shape `(rows,)`, int64):
            [`Source`] of the completion.
        off_prompt (`torch.Tensor` of shape `(rows,)`, bool):
            Whether the completion was sampled under another prompt than the one it is scored under.
        usable (`torch.Tensor` of shape `(rows,)`, bool):
            False on rows that fill a place after every refill failed: their advantage is 0.
        local (`slice`):
            This rank's rows.
        sampled_rewards (`torch.Tensor` of shape `(sampled, sources)`, float32):
            What the reward functions returned for the prompts as they were chosen: before the score stage, and before
            groups were filtered and refilled. Feedback on the choice of prompts reads these.
        statistics (`dict[str, torch.Tensor]`):
            What methods computed per row in `collect_statistics`, gathered: `(rows,)` each.
        advantages (`torch.Tensor` of shape `(rows,)`, float32, *optional*):
            Set after the advantage stages.
    """

    rewards: torch.Tensor
    source_names: list[str]
    group_ids: torch.Tensor
    prompt_indices: torch.Tensor
    lengths: torch.Tensor
    truncated: torch.Tensor
    usable: torch.Tensor
    local: slice
    sampled_rewards: torch.Tensor
    raw_rewards: torch.Tensor
    source: torch.Tensor
    off_prompt: torch.Tensor
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    advantages: torch.Tensor | None = None

    def first(self, count: int) -> "ScoredBatch":
        """The first `count` rows, of which this rank holds none."""
        kept = {
            f.name: value[:count] if isinstance(value := getattr(self, f.name), torch.Tensor) else value
            for f in fields(self)
        }
        return ScoredBatch(**kept | {"local": slice(0, 0)})

    def validate(self) -> None:
        """
        Check shapes and dtypes.

        Raises:
            `ValueError`: naming the field, its shape or dtype, and what is expected.
        """
        rows = self.rewards.shape[0]
        for name in ("group_ids", "prompt_indices", "lengths", "truncated", "usable", "source", "off_prompt"):
            _expect(name, getattr(self, name), (rows,))
        for name in ("rewards", "raw_rewards"):
            _expect(name, getattr(self, name), (rows, len(self.source_names)))
        for name, value in self.statistics.items():
            _expect(f"statistics['{name}']", value, (rows,))
        if self.advantages is not None:
            _expect("advantages", self.advantages, (rows,))


@dataclass
class RolloutRecord:
    """
    This rank's rows of a generation batch, or a micro-batch of them, as tensors on the training device.

    Args:
        prompt_ids, prompt_mask (`torch.Tensor` of shape `(batch, prompt_length)`, int64):
            Prompt under which the completion is *scored*, padded on the left.
        completion_ids, completion_mask (`torch.Tensor` of shape `(batch, time)`, int64):
            Completion, padded on the right. `completion_mask` is the attention mask and nothing else.
        loss_mask (`torch.Tensor` of shape `(batch, time)`, int64):
            1 on tokens of the loss. A subset of `completion_mask`; never used for attention.
        row_weight (`torch.Tensor` of shape `(batch,)`, float32):
            Factor of the row's loss; rows with weight 0 count as not there.
        advantages (`torch.Tensor` of shape `(batch,)` or `(batch, time)`, float32):
            Without gradient; 0 on rows nobody scored.
        rewards (`torch.Tensor` of shape `(batch, sources)`, float32):
            Raw rewards, NaN where a source does not apply.
        group_ids (`torch.Tensor` of shape `(batch,)`, int64):
            Group within the generation batch.
        source (`torch.Tensor` of shape `(batch,)`, int64):
            [`Source`] of the completion.
        lengths (`torch.Tensor` of shape `(batch,)`, int64), truncated (`torch.Tensor` of shape `(batch,)`, bool):
            See [`ScoredBatch`].
        num_items_in_batch, num_rows_in_batch (0-d `torch.Tensor`):
            Loss tokens, and rows of non-zero weight, of the whole generation batch on all ranks.
        sampled_prompt_ids, sampled_prompt_mask (`torch.Tensor` of shape `(batch, sampled_length)`, *optional*):
            Prompt under which the completion was *sampled*, where that is another one.
        old_per_token_logps, ref_per_token_logps, sampling_per_token_logps, importance_sampling_ratio
            (`torch.Tensor` of shape `(batch, time)`, *optional*): as in TRL; log-probs in nats, without gradient,
            under the prompt of `prompt_ids`. The ratio may be `(batch, 1)`.
        statistics (`dict[str, torch.Tensor]`):
            What methods computed in the old pass: `(batch, time)` or `(batch,)` each, without gradient.
        pass_ids (`torch.Tensor` of shape `(batch,)`, int64, *optional*):
            Which pass over the model computes the row, counted from 0, where a micro-batch takes several.
        multimodal (`dict`):
            Model inputs of multimodal rows.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    loss_mask: torch.Tensor
    row_weight: torch.Tensor
    advantages: torch.Tensor
    rewards: torch.Tensor
    group_ids: torch.Tensor
    source: torch.Tensor
    lengths: torch.Tensor
    truncated: torch.Tensor
    num_items_in_batch: torch.Tensor
    num_rows_in_batch: torch.Tensor
    sampled_prompt_ids: torch.Tensor | None = None
    sampled_prompt_mask: torch.Tensor | None = None
    old_per_token_logps: torch.Tensor | None = None
    ref_per_token_logps: torch.Tensor | None = None
    sampling_per_token_logps: torch.Tensor | None = None
    importance_sampling_ratio: torch.Tensor | None = None
    statistics: dict[str, torch.Tensor] = field(default_factory=dict)
    pass_ids: torch.Tensor | None = None
    multimodal: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_generation(cls, output: dict[str, Any], scored: ScoredBatch) -> "RolloutRecord":
        """From what TRL's `_generate_and_score_completions` returned and its scored batch; advantages are still 0."""
        local = scored.local
        completion_mask = output["completion_mask"]
        rows = completion_mask.shape[0]
        names = {f.name for f in fields(cls)} & output.keys()
        return cls(
            **{name: output[name] for name in names - {"advantages"}},
            advantages=torch.zeros(rows, device=completion_mask.device),
            loss_mask=completion_mask * output["tool_mask"] if "tool_mask" in output else completion_mask.clone(),
            row_weight=torch.ones(rows, device=completion_mask.device),
            rewards=scored.rewards[local],
            group_ids=scored.group_ids[local],
            source=scored.source[local],
            lengths=scored.lengths[local],
            truncated=scored.truncated[local],
            num_rows_in_batch=torch.tensor(float(scored.rewards.shape[0]), device=completion_mask.device),
            multimodal={key: output[key] for key in MULTIMODAL_KEYS if key in output},
        )

    @classmethod
    def from_batch(cls, batch: dict[str, Any]) -> "RolloutRecord":
        """From the flat dictionary that TRL shuffles and splits; inverse of [`as_batch`]."""
        plain = {f.name for f in fields(cls)} - {"statistics", "multimodal"}
        return cls(
            **{name: batch[name] for name in plain & batch.keys()},
            statistics={k.removeprefix("statistics/"): v for k, v in batch.items() if k.startswith("statistics/")},
            multimodal={key: batch[key] for key in MULTIMODAL_KEYS if key in batch},
        )

    def as_batch(self) -> dict[str, Any]:
        """Flat dictionary of tensors, which TRL shuffles by rows and splits into micro-batches."""
        batch = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("statistics", "multimodal")}
        batch = {name: value for name, value in batch.items() if value is not None}
        return batch | {f"statistics/{k}": v for k, v in self.statistics.items()} | self.multimodal

    def take(self, rows: torch.Tensor) -> "RolloutRecord":
        """The rows of which `rows` are the numbers, of text."""
        rows = rows.to(self.completion_ids.device)
        return self.from_batch(
            {name: value[rows] if value.dim() else value for name, value in self.as_batch().items()}
        )

    def passes(self, multiple_of: int | None = None) -> list["RolloutRecord"]:
        """
        The rows of each pass, in order, without the columns that are padding in all of them.

        Args:
            multiple_of (`int`, *optional*):
                What completions stay padded to.
        """
        if self.pass_ids is None:
            return [self]
        count = int(self.pass_ids.max()) + 1
        return [self.take((self.pass_ids == i).nonzero().squeeze(1)).trimmed(multiple_of) for i in range(count)]

    def trimmed(self, multiple_of: int | None = None) -> "RolloutRecord":
        """Without the columns at the end of completions that are padding in all rows."""
        time = rounded(max(1, int(ends(self.completion_mask).max())), multiple_of)
        by_token = {f"statistics/{name}" for name, value in self.statistics.items() if value.dim() == 2} | _BY_TOKEN
        return self.from_batch(
            {k: v[:, :time] if k in by_token and v.dim() == 2 else v for k, v in self.as_batch().items()}
        )

    def live_tokens(self) -> torch.Tensor:
        """Number of tokens of the loss in rows that have weight."""
        return (self.loss_mask * (self.row_weight > 0).unsqueeze(1)).sum()

    def validate(self, values: bool = False) -> None:
        """
        Check the contract: shapes always, values on demand since that waits for the device.

        Args:
            values (`bool`, *optional*, defaults to `False`):
                Also check that masks nest, that numbers are finite and that padding carries no loss.

        Raises:
            `ValueError`: naming the field, what it holds and what is expected.
        """
        rows, time = self.completion_ids.shape
        for name in ("completion_mask", "loss_mask"):
            _expect(name, getattr(self, name), (rows, time))
        for name in ("row_weight", "group_ids", "source", "lengths", "truncated"):
            _expect(name, getattr(self, name), (rows,))
        _expect("prompt_mask", self.prompt_mask, tuple(self.prompt_ids.shape))
        _expect("advantages", self.advantages, (rows,), (rows, time))
        for name in ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps"):
            if getattr(self, name) is not None:
                _expect(name, getattr(self, name), (rows, time))
        for name, value in self.statistics.items():
            _expect(f"statistics['{name}']", value, (rows,), (rows, time))
        if not values:
            return
        if bool((self.loss_mask > self.completion_mask).any()):
            raise ValueError("`loss_mask` is 1 where `completion_mask` is 0: padding would enter the loss.")
        for name in ("row_weight", "advantages", "num_items_in_batch", "num_rows_in_batch"):
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"`{name}` has values that are not finite.")
        if bool((self.row_weight < 0).any()):
            raise ValueError("`row_weight` has negative values; a row weight is at least 0.")


def _expect(name: str, value: torch.Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(value.shape) not in shapes:
        raise ValueError(f"`{name}` has shape {tuple(value.shape)}, expected {' or '.join(map(str, shapes))}.")
    if value.requires_grad:
        raise ValueError(f"`{name}` carries gradient; a record holds data only.")


def ends(mask: torch.Tensor) -> torch.Tensor:
    """Columns of each row up to the last one that is not 0."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def rounded(length: int, multiple_of: int | None) -> int:
    """`length`, or the next multiple."""
    return length if multiple_of is None else -(-length // multiple_of) * multiple_of
