"""Secrets in whatever is written, printed or published: recognized by form, by the name before them, and in URLs."""

import json
import logging
import re
import traceback
from collections.abc import Callable
from typing import Any

# Secrets that are known by their form, wherever they stand
TOKEN = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY[A-Z ]*-----"
    r"(?:(?:(?!-----)[\s\S])*+-----END [A-Z ]*-----|(?:(?:\s|\\[nr])*[A-Za-z0-9+/=]{12,})*)"
    r"|(?<![A-Za-z0-9])(?:"
    r"hf_(?:oauth|jwt)_(?=[\w.-]*[0-9A-Z]|[a-z]{16})[\w.-]{7,}\w"
    r"|hf_(?:(?=[a-z]*[0-9A-Z])[A-Za-z0-9]{8,}|[a-z]{16,}(?![A-Za-z_]))|api_org_[A-Za-z0-9]{8,}"
    r"|sk-(?=[\w-]*[0-9A-Z]|[a-z]{16})[\w-]{16,}|[sr]k_(?:live|test)_[A-Za-z0-9]{8,}|gsk_[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|gl(?:pat|oas|dt|rt|cbt|ptt|ft|soat)-[\w-]{8,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{20,}|ya29\.[\w-]{16,}|xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{10,}"
    r"|npm_[A-Za-z0-9]{20,}|pypi-[\w-]{20,}|nvapi-[\w-]{16,}|r8_[A-Za-z0-9]{20,}"
    r"|eyJ[\w-]{6,}\.[\w-]{6,}\.[\w-]*)"
)
_SECRET_NAME = re.compile(
    r"passw(?:or)?d|passphrase|secrets?(?![a-z])|credential|api_?key|private_?key"
    r"|(?:^|_)(?:auth|authorization|authentication|bearer|pwd|jwt|cookies?|session(?:_?(?:id|key))?"
    r"|(?:access|secret|signing|encryption|ssh|account|master|wandb|deploy|hf)_?keys?"
    r"|(?:hf|hub|api|access|auth|refresh|oauth)_?tokens)(?:_|$)"
)
# Of a model or of a count, unless they hold a text that is no special token
_TOKEN_NAME = re.compile(r"token\d*$")
_MODEL_TOKEN = re.compile(
    r"(?:pad|eos|bos|unk|sep|cls|mask|num|image|video|audio|boi|eoi|start|end|stop|prefix|suffix|middle|eot|eom"
    r"|decoder_start|forced|escape|think|special|per|next|last|first|each|single|feedback)_token\d*$"
)
_SPECIAL = re.compile(r"\s*[<\[{|$*]|\\u|[^\x00-\x7f]|\s*$")
_NO_VALUE = re.compile(
    r"(?:none|null|true|false|nan|str|int|bool|bytes|any|optional|required|\.+"
    r"|to|or|and|is|if|in|by|with|the|must|needs|for|as)$",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"[-+]?[\d.]{1,12}(?:e[-+]?\d+)?$")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")

_WORDS = "token|secret|passw|passphrase|credential|auth|bearer|pwd|jwt|cookie|session|key"
# `name: value`, `name=value`, `"name": "value"` also within a JSON text, `--name value`
_ASSIGNED = re.compile(
    rf"(?P<name>(?<![\w.%-])(?P<flag>--)?(?=[A-Za-z_])(?=[\w.-]*?(?i:{_WORDS}))[\w.-]++)"
    r"(?P<between>(?P<closed>\\*[\"'])?\s{0,3}(?:=>|[:=])\s{0,3}|(?<=\w)\s+)"
    r"(?:(?P<quote>\\*[\"'])(?P<quoted>[^\n]*?)(?P=quote)"
    r"|(?P<bare>(?i:(?:bearer|basic|token|digest|bot)\s+)?[^\s\"'`,;&|<>(){}\[\]\\]+))"
)
_COOKIE = re.compile(r"(?i)(\b(?:set-)?cookie\b\\*[\"']?\s*[:=]\s*\\*[\"']?)[\w.-]+=[^\n\"'\\]*")
_BEARER = re.compile(r"\b(Bearer\s+)(?=[\w.~+/-]*\d)[\w.~+/=-]{8,}")
_CODE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+$")
_URL = re.compile(r"\b[A-Za-z][\w+.-]*://[^\s\"'`<>\\]+")
_USER = re.compile(r"(://)(?!git@)[^/?#]+@")
_PARAMETER = re.compile(r"([?&#;])([\w.%-]+)=([^&#;]+)")
_SIGNED = re.compile(r"(?:^|_)(?:sig|signature|key|code)$|^x_(?:amz|goog)_|^awsaccesskeyid$")


def names_a_secret(name: str, value: Any = "...") -> bool:
    """
    Whether a field of this name holds a secret, as `hub_token` does and `eos_token` does not.

    Args:
        name (`str`):
            Of a field, flag, environment variable or header.
        value (`Any`, *optional*):
            What it holds: a number, a switch or a special token such as `<image>` under `token` is no secret.
    """
    name = _CAMEL.sub("_", name).replace("-", "_").replace(".", "_").lower()
    if value is None or isinstance(value, bool) or value in ("", "<secret>"):
        return False
    if _SECRET_NAME.search(name):
        return not (name.endswith(("_path", "_file")) or ("session" in name and isinstance(value, (int, float))))
    if not _TOKEN_NAME.search(name) or _MODEL_TOKEN.search(name):
        return False
    return isinstance(value, list) or (isinstance(value, str) and not _SPECIAL.match(value))


def redact(text: str) -> str:
    """
    A text without secrets: those known by their form, those that a name before them gives away, and those in URLs.

    Args:
        text (`str`):
            Of any kind: a log line, a traceback, JSON, YAML, Markdown.
    """
    text = _URL.sub(_redact_url, text)
    text = TOKEN.sub("<token>", text)
    text = _COOKIE.sub(r"\1<secret>", text)
    text = _ASSIGNED.sub(_redact_assigned, text)
    return _BEARER.sub(r"\1<secret>", text)


def place_of_secret(text: str, names: bool = True) -> tuple[int, int] | None:
    """
    Line and column, counted from 1, of the first secret in a text; `None` if it holds none.

    Args:
        text (`str`):
            Content of a file.
        names (`bool`, *optional*, defaults to `True`):
            Whether names before values count. In a vocabulary, where "password" is a word, they do not.
    """
    clean = redact(text) if names else TOKEN.sub("<token>", text)
    if clean == text:
        return None
    start = next((i for i, (a, b) in enumerate(zip(clean, text, strict=False)) if a != b), len(clean))
    return text.count("\n", 0, start) + 1, start - text.rfind("\n", 0, start)


def _redact_assigned(match: re.Match) -> str:
    name, between = match["name"], match["between"]
    value = match["quoted"] if match["quote"] else match["bare"]
    if not between.strip() and (match["flag"] is None or value.startswith("-")):
        return match[0]
    if not names_a_secret(name, value) or (match["quote"] is None and _is_ordinary(match, value)):
        return match[0]
    quote = match["quote"] or ""
    return f"{name}{between}{quote}<secret>{quote}"


def _is_ordinary(match: re.Match, value: str) -> bool:
    """Whether an unquoted value is code or prose: a number, another name, a call, a word in a sentence."""
    name = match["name"].lower()
    after = match.string[match.end() : match.end() + 1]
    counted = _NUMBER.match(value) and ("session" in name or _TOKEN_NAME.search(name))
    if counted or _NO_VALUE.match(value) or _CODE.match(value) or after in ("(", "["):
        return True
    if match["flag"] or match["closed"]:
        return False
    if "=" in match["between"] and (value.lower().endswith(name) or name.endswith(value.lower())):
        return True
    # A word: as in a file of settings, or in a sentence
    line = match.string[: match.start()].rpartition("\n")[2]
    setting = after in ("", "\n", "}", ",") and not line.strip(" \t-{#")
    return value.isalpha() and not (setting or match["between"] == "=" or match["name"].isupper())


def _redact_url(match: re.Match) -> str:
    def parameter(found: re.Match) -> str:
        name = found[2].replace("-", "_").lower()
        secret = names_a_secret(found[2], found[3]) or _SIGNED.search(name)
        return f"{found[1]}{found[2]}=<secret>" if secret else found[0]

    return _PARAMETER.sub(parameter, _USER.sub(r"\1<secret>@", match[0], count=1))


def without_secrets(value: Any, clean: Callable[[str], str]) -> Any:
    """Copy of a JSON-like value without the entries whose key names a secret, and with its texts cleaned."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not names_a_secret(str(key), item)}
        return {without_secrets(key, clean): without_secrets(item, clean) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(item, clean) for item in value]
    return clean(value) if isinstance(value, str) else value


def redact_command(arguments: list[str]) -> list[str]:
    """A command line's arguments with `<secret>` in place of each, to be filled in by whoever gives it again."""
    redacted, secret = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if argument.startswith("--"):
            secret = names_a_secret(name[2:])
            argument = f"{name}=<secret>" if secret and value else argument
        elif secret:
            argument = "<secret>"
        redacted.append(clean_argument(argument, redact))
    return redacted


def clean_argument(argument: str, clean: Callable[[str], str]) -> str:
    """An argument of a command line, cleaned; JSON in it loses what its keys name a secret."""
    argument = clean(argument)
    start = re.match(r"(?:--[\w-]+=)?(?=[{\[])", argument)
    try:
        value = json.loads(argument[start.end() :]) if start else None
    except json.JSONDecodeError:
        value = None
    kept = without_secrets(value, clean)
    return argument if kept == value else start[0] + json.dumps(kept)


class RedactedRecord(logging.LogRecord):
    """A log record without secrets, in its message and in its traceback: `logging.setLogRecordFactory` takes it."""

    def getMessage(self) -> str:
        """The message, with its arguments filled in."""
        if self.exc_info and not self.exc_text:
            self.exc_text = redact("".join(traceback.format_exception(*self.exc_info)).rstrip())
        return redact(super().getMessage())
