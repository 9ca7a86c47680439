"""Sem-DPO: pairs whose chosen completion means something else than the prompt count less."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from ...core.configuration import method_config, method_field
from ...core.declaration import declared
from ...data.messages import last_text
from ...losses.preference.sem_dpo import semantic_distance, semantic_weights
from ...models.encoders import Encoder, encode, load_encoder
from .base import PreferenceConfig, PreferenceTrainer
from .record import PreferenceRecord


@method_config
class SemDPOConfig(PreferenceConfig):
    """Configuration of [`SemDPOTrainer`]."""

    sem_alpha: float = method_field(
        1.0,
        "α: a pair at distance d counts exp(-α·d) as much; 0 is DPO. The paper's value is not known to us; try 0.5 to "
        "5.",
        ge=0.0,
    )
    sem_encoder: str = method_field(
        "wordllama",
        "Frozen encoder of texts: `wordllama` (`pip install wordllama`, no network), `characters`, which counts "
        "them, or the id of a model of sentence-transformers. The paper has CLIP's, for prompts of images. Not used "
        "for datasets with a column `sem_distance`, nor with the trainer's argument `sem_encoder`.",
    )
    sem_normalize: bool = method_field(
        False,
        "Whether to divide the weights by their mean over the micro-batch on all processes. The paper does not; "
        "without, a large α is also a smaller learning rate.",
    )

    def validate(self) -> None:
        super().validate()
        if self.sem_alpha == 0:
            return
        if self.use_weighting:
            raise ValueError(
                f"`use_weighting` must be False with `sem_alpha={self.sem_alpha}`, got True: both multiply each "
                "pair's loss. Set `use_weighting=False` or `sem_alpha=0`."
            )
        sorting = [name for name in self.loss_type if name in ("aot", "aot_unpaired")]
        if sorting:
            raise ValueError(
                f"`sem_alpha={self.sem_alpha}` weighs pairs, which `loss_type` {sorting} takes apart. Choose another "
                "loss, or set `sem_alpha=0`."
            )


class SemDPOTrainer(PreferenceTrainer):
    """
    Prefers the chosen completion the less, the farther it strays from what the prompt means: for prompt rewriting and
    whatever else must say the same in other words.

    L = mean of W · ℓ,  W = exp(−α · d(x, y_w)),  d(x, y_w) = 1 − cos(e(x), e(y_w))

    with e a frozen encoder of texts, x the user's last turn without template and system prompt, y_w the chosen
    completion without special tokens. ℓ is any of TRL's losses of a pair. W has no gradient.

    The distances are computed once, when the dataset is prepared. A dataset that has a column `sem_distance` keeps it.
    A text that the encoder maps to nothing is at distance 1.

    Args:
        model, ref_model, args, ...:
            As for [`~trl.DPOTrainer`]; `args` is a [`SemDPOConfig`], or a [`~trl.DPOConfig`] to take the method's
            defaults.
        sem_encoder (`Callable`, *optional*):
            Texts → vectors `(texts, dimensions)`, in place of the one that `args.sem_encoder` names.

    Raises:
        `ValueError`: if the encoder's package is missing, a distance is not in [0, 2], a prompt of messages has none
            of the user, or the dataset holds images.

    Relations:
        - `use_weighting` of [`~trl.DPOTrainer`] (WPO) weighs pairs by how likely the policy is to produce them. Both
          multiply, and are refused together.
        - [`RpoDPOTrainer`](rpo.py) keeps the chosen completions likely, whatever they mean; the two combine.

    Paper: [Sem-DPO: Mitigating Semantic Inconsistency in Preference Optimization for Prompt
    Engineering](https://arxiv.org/abs/2507.20133)

    Example:

    ```python
    >>> from copy import deepcopy
    >>> from datasets import Dataset
    >>> from papertrl import SemDPOConfig, SemDPOTrainer
    >>> from papertrl.models.tiny import tiny_model, tiny_tokenizer

    >>> tokenizer = tiny_tokenizer()
    >>> model = tiny_model(tokenizer)
    >>> dataset = Dataset.from_dict({"prompt": ["cat:"] * 8, "chosen": ["a cat!"] * 8, "rejected": ["cat"] * 8})
    >>> args = SemDPOConfig(
    ...     "/tmp/sem_dpo", sem_encoder="characters", max_steps=1, bf16=False, use_cpu=True, report_to="none",
    ...     disable_tqdm=True,
    ... )
    >>> trainer = SemDPOTrainer(model, deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
    >>> trainer.train()
    {'train_runtime': ..., 'sem_dpo/distance': '0.2441', 'sem_dpo/weight': '0.7834', ...}
    TrainOutput(global_step=1, ...)

    ```
    """

    config_class = SemDPOConfig
    method = declared("sem_dpo")
    extends = {
        "prepare": {"sem_alpha": 0.0},
        "collate": {"sem_alpha": 0.0},
        "pair_weights": {"sem_alpha": 0.0},
    }

    def __init__(self, model, ref_model=None, args=None, *trl_args, sem_encoder: Encoder | None = None, **trl_kwargs):
        self._sem_encoder = sem_encoder
        super().__init__(model, ref_model, args, *trl_args, **trl_kwargs)

    def carried(self) -> list[str]:
        return [*super().carried(), "sem_distance"]

    def prepare(self, dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        dataset = super().prepare(dataset, name)
        if "sem_distance" in get_dataset_column_names(dataset):
            return dataset.map(check_distances, with_indices=True, batched=True, fn_kwargs={"name": name})
        encoder = self._sem_encoder or self.args.sem_encoder
        if isinstance(encoder, str):
            load_encoder(encoder)
        special = sorted(self.tokenizer.all_special_tokens, key=len, reverse=True)
        return dataset.map(add_distances, batched=True, fn_kwargs={"encoder": encoder, "special_tokens": special})

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        distances = torch.tensor([row["sem_distance"] for row in examples])
        return {**super().collate(examples), "sem_distance": distances}

    def pair_weights(self, record: PreferenceRecord) -> torch.Tensor | None:
        weights = super().pair_weights(record)
        distances = record.extras["sem_distance"]
        own = semantic_weights(distances, self.args.sem_alpha)
        everywhere = self.accelerator.gather(torch.stack([own, distances], dim=1))
        mean, distance = everywhere.mean(0)
        self.log_metric("sem_dpo/distance", distance)
        self.log_metric("sem_dpo/weight", mean)
        self.log_metric("sem_dpo/weight_min", everywhere[:, 0].min())
        if self.args.sem_normalize:
            own = own / mean.clamp(min=torch.finfo(own.dtype).tiny)
        return own if weights is None else weights * own


def add_distances(batch: dict[str, list], encoder: str | Encoder, special_tokens: list[str]) -> dict[str, list[float]]:
    """Distances between prompts and chosen completions of a batch of rows, each text or messages."""

    def text(value: str | list[dict[str, Any]], role: str) -> str:
        value = value if isinstance(value, str) else last_text(value, role)
        for token in special_tokens:
            value = value.replace(token, "")
        return value.strip()

    prompts = [text(prompt, "user") for prompt in batch["prompt"]]
    chosen = [text(completion, "assistant") for completion in batch["chosen"]]
    vectors = encode(encoder, prompts + chosen)
    return {"sem_distance": semantic_distance(*vectors.chunk(2)).tolist()}


def check_distances(batch: dict[str, list], indices: list[int], name: str) -> dict[str, list]:
    """
    The batch as it is.

    Raises:
        `ValueError`: if a distance is not in [0, 2]; the message names row and value.
    """
    for index, distance in zip(indices, batch["sem_distance"], strict=True):
        if not isinstance(distance, (int, float)) or not 0 <= distance <= 2:
            raise ValueError(
                f"Row {index} of the dataset '{name}': `sem_distance` must be a number in [0, 2], got {distance!r}."
            )
    return {}
