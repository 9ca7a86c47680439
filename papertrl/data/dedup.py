"""Near-duplicates among training rows, for the slot *data*."""

import hashlib
import random
from collections import defaultdict
from typing import Any

from datasets import Dataset

from ..core.configuration import ComponentConfig, method_config, method_field
from ..core.declaration import declared
from ..core.slots import Component

HASHES = 128
# Rows that agree in one band of their signature are compared: at 4 of 32, likely from a similarity of 0.4 on
BAND = 4
PRIME = (1 << 61) - 1


@method_config
class DedupConfig(ComponentConfig):
    """Configuration of [`Dedup`]."""

    dedup_similarity: float | None = method_field(
        0.8, "Jaccard index of n-grams from which on two rows are duplicates. `None` keeps all rows.", gt=0, le=1
    )
    dedup_ngram: int = method_field(5, "Words of an n-gram; a shorter text is one n-gram.", ge=1)
    dedup_column: str | None = method_field(
        None,
        "Column that is compared, text or messages. `None` takes `text`, `messages` or `prompt`, whichever is there.",
    )


class Dedup(Component):
    """
    NearDup: rows whose n-grams overlap with those of an earlier row are dropped before tokenization.

    Candidates are found by MinHash (arXiv:2107.06499, Sec. 4.2) and compared by the exact Jaccard index of their sets
    of n-grams. The paper also asks for a small edit distance, and removes repeated substrings by suffix arrays; both
    are left out. Of duplicates the first row stays, so that the order of the data decides.

    In a bare TRL trainer: `train_dataset=Dedup().rows(dataset)`.

    Relations:
        Looks at texts, not at what a model says of them.

    Paper: [Deduplicating Training Data Makes Language Models Better](https://huggingface.co/papers/2107.06499).

    Raises:
        `ValueError`: if the dataset streams, or lacks the column.

    Example:

    ```python
    >>> from datasets import Dataset
    >>> from papertrl import Dedup
    >>> rows = Dataset.from_dict({"text": ["a b c d e f", "g h i j k l", "a b c d e f"]})
    >>> Dedup(dedup_similarity=0.8).rows(rows)["text"]
    Column(['a b c d e f', 'g h i j k l'])

    ```
    """

    method = declared("dedup")
    config_class = DedupConfig

    def rows(self, dataset: Any) -> Any:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"`train_dataset` must be a map-style `Dataset` for 'dedup', got `{type(dataset).__name__}`: all rows "
                "are compared. Load it without streaming, or set `dedup_similarity=None`."
            )
        grams = [self._ngrams(value) for value in dataset[self._column(dataset)]]
        kept = self._first_of_kind(grams)
        self._dropped = 1 - len(kept) / max(1, len(grams))
        return dataset.select(kept) if len(kept) < len(grams) else dataset

    def before_update(self, grad_norm: Any) -> None:
        self.log_metric("dedup/dropped_share", self._dropped)

    def _column(self, dataset: Dataset) -> str:
        wanted = [self.config.dedup_column] if self.config.dedup_column else ["text", "messages", "prompt"]
        found = next((name for name in wanted if name in dataset.column_names), None)
        if found is None:
            raise ValueError(f"`dedup_column` must be one of the columns {dataset.column_names}, got {wanted}.")
        return found

    def _ngrams(self, value: Any) -> frozenset[str]:
        text = value if isinstance(value, str) else " ".join(str(message.get("content", "")) for message in value)
        words, n = text.split(), self.config.dedup_ngram
        return frozenset(" ".join(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))

    def _first_of_kind(self, grams: list[frozenset[str]]) -> list[int]:
        """Numbers of the rows that repeat no earlier one that is kept."""
        draw = random.Random(0)
        permutations = [(draw.randrange(1, PRIME), draw.randrange(PRIME)) for _ in range(HASHES)]
        buckets: dict[tuple, list[int]] = defaultdict(list)
        kept = []
        for row, mine in enumerate(grams):
            hashes = [int.from_bytes(hashlib.blake2b(g.encode(), digest_size=7).digest()) for g in mine]
            signature = [min((a * h + b) % PRIME for h in hashes) for a, b in permutations]
            bands = [(i, *signature[i : i + BAND]) for i in range(0, HASHES, BAND)]
            near = {other for band in bands for other in buckets[band]}
            if any(_jaccard(mine, grams[other]) >= self.config.dedup_similarity for other in near):
                continue
            kept.append(row)
            for band in bands:
                buckets[band].append(row)
        return kept


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)
