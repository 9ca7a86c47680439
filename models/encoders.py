"""Frozen encoders of texts: vectors whose cosine says how near two texts are."""

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Texts → vectors (texts, dimensions), as a tensor, an array or nested lists
Encoder = Callable[[list[str]], Any]

CHARACTER_DIMENSIONS = 1024


@cache
def load_encoder(name: str) -> Encoder:
    """
    Encoder of the given name.

    Args:
        name (`str`):
            `"characters"`, which counts characters; `"wordllama"`, means of token embeddings that the package of this
            name brings along, 16 MB, on the CPU and without network; or the id or path of a model of
            sentence-transformers.

    Raises:
        `ValueError`: if the encoder's package is not installed, or there is no such model; the message says what to
            install or to set.
    """
    if name == "characters":
        return count_characters
    return _load_wordllama() if name == "wordllama" else _load_sentence_transformer(name)


def count_characters(texts: list[str]) -> torch.Tensor:
    """Number of times that each character is in the text; white space does not count."""
    codes = [[ord(c) % CHARACTER_DIMENSIONS for c in text if not c.isspace()] for text in texts]
    return torch.stack([torch.tensor(row, dtype=torch.long).bincount(minlength=CHARACTER_DIMENSIONS) for row in codes])


def encode(encoder: str | Encoder, texts: list[str]) -> torch.Tensor:
    """
    Vectors of the texts; a text that occurs several times is encoded once.

    Args:
        encoder (`str` or `Callable`):
            Name for [`load_encoder`], or texts → vectors.
        texts (`list[str]`):
            N texts.

    Returns:
        `torch.Tensor` of shape `(N, D)`: float32, on the CPU.

    Raises:
        `ValueError`: if the encoder returns anything but one vector per text.
    """
    distinct = list(dict.fromkeys(texts))
    vectors = torch.as_tensor((load_encoder(encoder) if isinstance(encoder, str) else encoder)(distinct))
    if vectors.ndim != 2 or len(vectors) != len(distinct):
        raise ValueError(
            f"The encoder must return one vector per text, of shape ({len(distinct)}, D), got {tuple(vectors.shape)}."
        )
    places = {text: i for i, text in enumerate(distinct)}
    return vectors.detach().float().cpu()[[places[text] for text in texts]]


def _load_wordllama() -> Encoder:
    handlers, level = list(logging.root.handlers), logging.root.level
    try:
        import wordllama
    except ImportError as error:
        raise ValueError(
            "The encoder 'wordllama' needs the package of this name: `pip install wordllama`. Or take "
            "'characters', which needs none, or the id of a model of sentence-transformers."
        ) from error
    # Importing it sets up the root logger
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    # It looks for the tokenizer that it brings along in the wrong folder, but in the right one of a cache
    model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    return model.embed


def _load_sentence_transformer(name: str) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ValueError(
            f"The encoder '{name}' is none of 'characters' and 'wordllama', and models of sentence-transformers need "
            "that package: `pip install sentence-transformers`."
        ) from error
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The encoder '{name}' is none of 'characters' and 'wordllama', and no model of sentence-transformers "
            f"that can be loaded: {' '.join(str(error).split())[:200]}"
        ) from error

    def embed(texts: list[str]) -> torch.Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    return embed
