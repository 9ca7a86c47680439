"""The two models behind the page: finding, loading, prompting, and streaming from them."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

try:
    # A rendered Space brings its own copy
    from papertrl_guidance import Voice, guided_logprobs, guided_tokens, kl_divergence
except ModuleNotFoundError:
    from papertrl.samplers.decoding.guidance import Voice, guided_logprobs, guided_tokens, kl_divergence

START_MODEL = "start_model"
# Weights, configuration, tokenizer, reports; neither optimizer state nor checkpoints
WANTED = ["*.safetensors", "*.json", "*.jsonl", "*.md", "*.jinja", "*.model", "*.txt", f"{START_MODEL}/*"]
UNWANTED = ["checkpoint-*/*", "*/checkpoint-*/*", "onnx/*", "*.onnx"]
# So that one visitor's prompt does not keep everybody else waiting
LONGEST_CONTEXT = 4096
CHARACTERS_PER_TOKEN = 16
# What a prompt may be sent as; beyond it, a visitor would only fill the machine's memory
LONGEST_PROMPT = 250_000
FRAME = 0.05


class Unavailable(Exception):
    """A model cannot be tried; the text says why."""


@dataclass
class Side:
    """
    One of the two models.

    Args:
        name (`str`):
            What people call it: a Hub id or the name of a folder.
        voice (`Voice`):
            Where next tokens come from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        limit (`int`):
            Positions it can read.
        ends (`frozenset[int]`):
            Tokens that end an answer.
    """

    name: str
    voice: Voice
    tokenizer: PreTrainedTokenizerBase
    limit: int
    ends: frozenset[int]

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return self.tokenizer.chat_template is not None

    def encode(self, text: str, chat: bool, max_new_tokens: int) -> tuple[list[int], int]:
        """Tokens of a prompt that leave room for the answer, and how many were cut off on the left."""
        room = self.limit - max_new_tokens
        kept = text[-CHARACTERS_PER_TOKEN * self.limit :]
        if not (chat and self.chats):
            ids = self.tokenizer(kept)["input_ids"] or [self.tokenizer.eos_token_id]
            # A cut text no longer shows how many tokens were lost, only that some were
            return ids[-room:], max(len(ids) - room, int(len(kept) < len(text)))
        room -= len(self._dialog("")) + 8
        words = self.tokenizer(kept, add_special_tokens=False)["input_ids"]
        cut = max(len(words) - room, 0)
        if cut:
            kept = self.tokenizer.decode(words[cut:])
        return self._dialog(kept)[-(self.limit - max_new_tokens) :], max(cut, int(len(text) > len(kept) and not cut))

    def _dialog(self, text: str) -> list[int]:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True
        )["input_ids"]


@dataclass(eq=False)
class Engine:
    """
    Both models.

    Args:
        folder (`Path`):
            Where the trained model and the reports of its run are.
        trained ([`Side`]):
            The trained model.
        base ([`Side`], *optional*):
            The model it was trained from.
        no_base (`str`):
            Why there is no base model.
        no_guidance (`str`):
            Why the two cannot be mixed.
    """

    folder: Path
    trained: Side
    base: Side | None = None
    no_base: str = ""
    no_guidance: str = ""


# --- Finding and loading --------------------------------------------------------------------------------------------


def locate(model: str) -> Path:
    """
    Folder of a local model, or of the Hub's snapshot of it.

    Raises:
        [`Unavailable`]: if there is none.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        if model.count("/") > 1 or model.startswith((".", "/", "~")):
            raise Unavailable(f"There is no folder '{model}'.")
        try:
            path = Path(snapshot_download(model, allow_patterns=WANTED, ignore_patterns=UNWANTED))
        except Exception as error:
            raise Unavailable(f"'{model}' is no local folder, and {_hub_reason(error)}.") from error
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise Unavailable(f"'{model}' holds no model: neither config.json nor adapter_config.json.")
    return path


def load(model: str, base_model: str | None = None, run: dict[str, Any] | None = None) -> Engine:
    """
    Load a model or adapter, and its base.

    Args:
        model (`str`):
            Folder or Hub id.
        base_model (`str`, *optional*):
            Folder or Hub id. Defaults to the run's start model, else to what run, adapter or card name.
        run (`dict`, *optional*):
            What is known of the run beside what the folder says.

    Raises:
        [`Unavailable`]: if the model cannot be loaded. A missing base only leaves that side out.
    """
    folder = locate(model)
    name = model if not Path(model).exists() else folder.resolve().name
    adapter = _json(folder / "adapter_config.json")
    base_id = base_model or _base_of(folder, adapter, run)
    shown = "start model" if base_id == str(folder / START_MODEL) else base_id
    lock = threading.Lock()
    try:
        tokenizer = _tokenizer(folder, base_id)
        if adapter and not list(folder.glob("model*.safetensors")):
            if base_id is None:
                raise Unavailable(f"'{model}' is an adapter that names no base model; give `--base_model`.")
            network = PeftModel.from_pretrained(_network(base_id), folder).eval()
            trained = _side(name, Voice(network, lock=lock), tokenizer)
            return Engine(folder, trained, _side(shown, Voice(network, True, lock), tokenizer))
        trained = _side(name, Voice(_network(folder), lock=lock), tokenizer)
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"'{model}' cannot be loaded: {_first(error)}.") from error
    if base_id is None:
        missing = "No base model is known: neither the run, the adapter nor the card names one. Give `--base_model`."
        return Engine(folder, trained, None, missing, missing)
    try:
        base = _side(shown, Voice(_network(base_id), lock=threading.Lock()), _tokenizer(base_id, None))
    except Exception as error:
        missing = f"The base model '{shown}' cannot be loaded: {_first(error)}."
        return Engine(folder, trained, None, missing, missing)
    alike = base.tokenizer.get_vocab() == tokenizer.get_vocab()
    return Engine(
        folder,
        trained,
        base,
        "",
        "" if alike else "The two models have different vocabularies, which cannot be mixed.",
    )


def _base_of(folder: Path, adapter: dict[str, Any], run: dict[str, Any] | None) -> str | None:
    if (folder / START_MODEL / "config.json").is_file():
        return str(folder / START_MODEL)
    named = [(_json(folder / "run.json") or run or {}).get("base_model"), adapter.get("base_model_name_or_path")]
    try:
        card = ModelCard.load(folder / "README.md").data.base_model
        named.append(card[0] if isinstance(card, list) and card else card)
    except Exception:  # no card, or one that cannot be read
        pass
    return next((name for name in named if isinstance(name, str) and name), None)


def _network(name: str | Path) -> torch.nn.Module:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()


def _tokenizer(name: str | Path, otherwise: str | None) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        if otherwise is None:
            raise
        return AutoTokenizer.from_pretrained(otherwise)


def _side(name: str, voice: Voice, tokenizer: PreTrainedTokenizerBase) -> Side:
    config = voice.model.config
    ends = voice.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    known = frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)
    positions = config.get_text_config().max_position_embeddings or LONGEST_CONTEXT
    return Side(name, voice, tokenizer, min(positions, LONGEST_CONTEXT), known)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _hub_reason(error: BaseException) -> str:
    if isinstance(error, GatedRepoError):
        return "access to it on the Hub has to be granted first"
    if isinstance(error, RepositoryNotFoundError):
        return "the Hub has no such model, or it is private"
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return "the Hub cannot be reached from here, nor was the model downloaded before"
    return f"the Hub did not give it: {_first(error)}"


def _first(error: BaseException) -> str:
    return " ".join(str(error).split())[:240].rstrip(".") or type(error).__name__


# --- Answering ------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """How answers are drawn; see `guided_tokens`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


@dataclass
class Answer:
    """
    An answer as far as it has come.

    Args:
        ids (`list[int]`):
            Its tokens.
        text (`str`):
            Its text.
        seconds (`float`):
            Time spent on this answer alone.
        cut (`int`):
            Prompt tokens that did not fit.
        finished (`bool`):
            Whether it is complete.
        divergences (`list[tuple[float, float]]`):
            Per token, nats from base and trained model, where both were asked.
    """

    ids: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    cut: int = 0
    finished: bool = False
    divergences: list[tuple[float, float]] = field(default_factory=list)


def stream(engine: Engine, side: Side, text: str, scale: float, settings: Settings) -> Iterator[Answer]:
    """Stream one answer; `side` decides how the prompt is written in tokens."""
    length = min(int(settings.max_new_tokens), side.limit - 1)
    ids, cut = side.encode(text, settings.chat, length)
    answer = Answer(cut=cut)
    tokens = guided_tokens(
        engine.base and engine.base.voice,
        engine.trained.voice,
        ids,
        scale,
        max_new_tokens=length,
        eos_token_ids=side.ends,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=int(settings.seed),
    )
    # Something to show while the prompt is read
    yield answer
    while not answer.finished:
        began = time.perf_counter()
        step = next(tokens, None)
        answer.seconds += time.perf_counter() - began
        if step is None:
            answer.finished = True
        else:
            answer.ids.append(step.token)
            if step.kl_base is not None:
                answer.divergences.append((step.kl_base, step.kl_trained))
            # Half a character is left out until its other half arrives
            answer.text = side.tokenizer.decode(answer.ids, skip_special_tokens=True).rstrip("\ufffd")
        yield answer


def together(streams: list[Iterator[Answer]]) -> Iterator[list[Answer]]:
    """Take turns, one token each, and show the state some twenty times a second."""
    answers = [next(each) for each in streams]
    shown = time.perf_counter()
    yield answers
    while not all(answer.finished for answer in answers):
        for i, each in enumerate(streams):
            answers[i] = next(each, answers[i])
        if time.perf_counter() - shown > FRAME:
            shown = time.perf_counter()
            yield answers
    yield answers


@dataclass
class Parting:
    """Where the two models differ most: the answer before that place, and their scores of the next token."""

    prefix: str
    base: torch.Tensor
    trained: torch.Tensor


def parting(engine: Engine, text: str, chat: bool, steps: int = 12) -> Parting:
    """Follow the trained model's likeliest answer to the token at which it is furthest from the base model."""
    return _parting(engine, tuple(engine.trained.encode(text, chat, steps)[0]), steps)


# By tokens, of which a prompt has a bounded number, and not by the text that a visitor sent
@lru_cache(maxsize=64)
def _parting(engine: Engine, ids: tuple[int, ...], steps: int) -> Parting:
    side = engine.trained
    sequence = torch.tensor([ids], device=side.voice.model.device)
    readers = engine.base.voice.begin(), side.voice.begin()
    best, found = -1.0, None
    for _ in range(steps):
        base, trained = (reader.logits(sequence)[0].float().log_softmax(-1) for reader in readers)
        distance = float(kl_divergence(trained, base))
        if found is None or distance > best:
            prefix = side.tokenizer.decode(sequence[0, len(ids) :], skip_special_tokens=True)
            best, found = distance, Parting(prefix, base, trained)
        token = trained.argmax()
        if int(token) in side.ends:
            break
        sequence = torch.cat([sequence, token.view(1, 1)], dim=1)
    return found


def next_tokens(
    engine: Engine, place: Parting, scale: float, count: int = 4, least: float = 0.001
) -> list[tuple[str, list[float]]]:
    """Likely tokens at a place, each with its probability under base, trained, and guided distribution."""
    rows = [guided_logprobs(place.base, place.trained, w).exp() for w in (0, 1, scale)]
    top = {token: None for row in rows for token in row.topk(min(count, len(row))).indices.tolist()}
    heights = {token: max(float(row[token]) for row in rows) for token in top}
    chosen = sorted((token for token in top if heights[token] >= least), key=lambda token: -heights[token])
    decode = engine.trained.tokenizer.decode
    return [(decode([token]), [float(row[token]) for row in rows]) for token in chosen[: 2 * count]]
