"""Secrets of many forms in many places, and ordinary texts that must stay as they are."""

import io
import json
import logging
import random
import shlex
import string
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from papertrl.cli import main
from papertrl.core.errors import tell
from papertrl.core.secrets import RedactedRecord, names_a_secret, place_of_secret, redact, redact_command
from papertrl.hub.scrubbing import scrub, scrub_command, scrub_text
from papertrl.job.run import _how_to_resume

draw = random.Random(0)


def letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    return "a1B" + "".join(draw.choice(alphabet) for _ in range(count - 3))


# Known by their form
FORMS = {
    "hub": "hf_" + letters(34),
    "oauth": f"hf_oauth_{letters(20)}.{letters(30)}",
    "lowercase": "hf_" + "abcdefgh" * 3,
    "jwt": f"eyJ{letters(20)}.eyJ{letters(40)}.{letters(43)}",
    "gitlab": "glpat-" + letters(20),
    "github": "ghp_" + letters(36),
    "fine-grained": f"github_pat_{letters(22)}_{letters(59)}",
    "google": "AIza" + letters(35),
    "openai": "sk-proj-" + letters(40),
    "anthropic": f"sk-ant-api03-{letters(20)}-{letters(20)}",
    "slack": f"xoxb-{'1234567890' * 2}-{letters(24)}",
    "amazon": "AKIA" + "ABCD1234EFGH5678",
}
# Known by the name before them
VALUES = ("swordfish", "hunter2", "0123456789abcdef0123456789abcdef01234567", "zz", "Tr0ub4dor&3")
NAMES = (
    *("hub_token", "HF_TOKEN", "token", "accessToken", "x-auth-token", "github_token", "telegram_bot_token"),
    *("password", "passwd", "DB_PASSWORD", "passphrase", "secret", "client_secret", "aws_secret_access_key"),
    *(
        "auth",
        "Authorization",
        "proxy-authorization",
        "private_key",
        "privateKey",
        "api_key",
        "apikey",
        "OPENAI_API_KEY",
    ),
    *("WANDB_API_KEY", "credential", "credentials", "cookie", "session", "session_id", "sessionKey", "ssh_key"),
)
PEM = "-----BEGIN {0}PRIVATE KEY-----\n{1}\n{1}\n-----END {0}PRIVATE KEY-----"
PLACES = {
    "alone": "{}",
    "sentence": "I logged in by {}, and it worked.",
    "parentheses": "see ({}).",
    "quoted": "'{}'",
    "log": "2026-01-01 ERROR 401 for {}: refused",
    "markdown": "| token | `{}` |",
    "comment": "x = 1  # {}",
    "query": "https://example.org/a?b={}&c=d",
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, place):
    text = PLACES[place].format(FORMS[form])
    clean = redact(text)
    assert FORMS[form] not in clean and FORMS[form][-8:] not in clean
    before, after = PLACES[place].split("{}")
    assert clean.startswith(before[:8]) and clean.endswith(after[-8:])
    assert redact(clean) == clean and place_of_secret(clean) is None
    assert place_of_secret(text)[0] == 1


@pytest.mark.parametrize("kind", ["", "RSA ", "OPENSSH ", "EC ", "ENCRYPTED "])
def test_private_keys(kind):
    block = PEM.format(kind, letters(64))
    for text in (block, json.dumps(block), block[: len(block) // 2]):
        assert letters(64)[:5] not in redact(text).replace("<token>", "")
        assert redact(f"before {text} after").endswith(" after")
    assert redact("-----BEGIN CERTIFICATE-----\nabc\n") == "-----BEGIN CERTIFICATE-----\nabc\n"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", VALUES)
def test_names(name, value):
    assert scrub({"a": [{name: value, "b": 1}]}) == {"a": [{"b": 1}]}
    nested = json.dumps({"outer": json.dumps({name: value, "steps": 3})})
    for text in (
        json.dumps({name: value, "steps": 3}),
        nested,
        str({"kwargs": {name: value}, "steps": 3}),
        yaml.safe_dump({name: value, "steps": 3}),
        f"{name}='{value}' steps",
        f'f({name.replace("-", "_")}="{value}", steps=3)',
        f"export {name.upper()}={value}\nsteps",
        f"papertrl train --{name} {shlex.quote(value)} --steps 3",
        f"papertrl train --{name}={value} --steps 3",
    ):
        clean = redact(text)
        assert "<secret>" in clean and clean.count(value) == (name + "steps").count(value) * text.count(name), text
        assert "steps" in clean and redact(clean) == clean


@pytest.mark.parametrize(
    ("address", "clean"),
    [
        ("https://anna:pa%20ss@host.org/x", "https://<secret>@host.org/x"),
        ("https://anna:p@ss@host.org:8080", "https://<secret>@host.org:8080"),
        ("postgresql://anna:pw@db/x?sslmode=require", "postgresql://<secret>@db/x?sslmode=require"),
        ("https://oauth2@host.org/x.git", "https://<secret>@host.org/x.git"),
        ("http://h/a?token=abc&page=2", "http://h/a?token=<secret>&page=2"),
        ("http://h/a?page=2&access_token=abc#top", "http://h/a?page=2&access_token=<secret>#top"),
        ("http://h/#access_token=abc&x=1", "http://h/#access_token=<secret>&x=1"),
        (
            "https://b.s3/k?X-Amz-Date=1&X-Amz-Signature=ab",
            "https://b.s3/k?X-Amz-Date=<secret>&X-Amz-Signature=<secret>",
        ),
        ("https://b/k?sv=2&sig=a%2Bb", "https://b/k?sv=2&sig=<secret>"),
        ("https://b/k?Expires=1&Signature=ab&Key-Pair-Id=K", "https://b/k?Expires=1&Signature=<secret>&Key-Pair-Id=K"),
    ],
)
def test_addresses(address, clean):
    assert redact(f"from {address} then") == f"from {clean} then"
    assert scrub({"data_files": [address]}) == {"data_files": [clean]}


def test_headers():
    assert redact("Authorization: Bearer abc.def-1") == "Authorization: <secret>"
    assert redact('{"Authorization": "Basic YTpi"}') == '{"Authorization": "<secret>"}'
    assert redact("> Cookie: a=b; c=d\n> Host: x") == "> Cookie: <secret>\n> Host: x"
    assert redact("curl -H 'Bearer abc123def'") == "curl -H 'Bearer <secret>'"


ORDINARY = (
    *("tokenizer: my-tokenizer", "eos_token: </s>", "max_tokens: 512", "token_type_ids", "author: Anna", "hf_home"),
    *("hf_datasets_cache", "hf_transfer", "key_value: 3", "learning_rate: 1.0e-05", "mean_token_accuracy: 0.5"),
    '{"eos_token": "<|im_end|>", "pad_token": "[PAD]", "image_token": "<image>", "tokens": ["a", "b"]}',
    '{"token": 0.25, "per_token": 3, "use_auth_token": true, "token": null, "session": 4}',
    "sha256: " + "0123456789abcdef" * 4,
    "commit 3678e7e0d1c2b3a4f5e6d7c8b9a0f1e2d3c4b5a6",
    "The secret: be kind. Token by token, the password is never shown; basic arithmetic.",
    "Her session: a recap of what authors do. A cookie: flour and sugar.",
    'token = tokenizer.decode(ids)\nmodel = load(name, token=token, api_key=os.environ["X"], password=getpass())',
    "def f(token: str, password: str | None = None, auth: Auth = None): ...",
    "{{ bos_token }}{% set eos_token = '</s>' %}{{ eos_token }}",
    "https://huggingface.co/papers/2510.03222?page=2#abstract and git+ssh://git@github.com/a/b.git",
    "The task-specific-reward-of-2024-06 is risk-adjusted, desk-rejected-2024-06-01.",
    "hf_oauth: true\nhf_oauth_scopes:\n- read-repos\nhf_oauth_expiration_minutes: 480",
    "Log in by `hf auth login`, or set HF_TOKEN to a token; `--token` is for scripts, --hub_token or the login.",
    "f(x) = 3:4, a@b.org, 12:30, 6/2, A/B, I/O, 1e-3, sk-learn, key: C major",
    "@article{k, author = {A}, title = {Keys and tokens: a study of secrets}}",
)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_stay(text):
    assert scrub_text(text) == text and place_of_secret(text) is None


def test_ordinary_fields_stay():
    fields = {
        "tokenizer": "x",
        "eos_token": "</s>",
        "max_tokens": 3,
        "author": "A",
        "hf_home": 1,
        "key": "k",
        "keys": 2,
    }
    fields |= {
        "key_value": 1,
        "token_type_ids": [1],
        "session": 4,
        "stc_token": "<stc>",
        "hub_token": None,
        "auth": False,
    }
    assert scrub(fields) == fields
    assert not names_a_secret("authors") and not names_a_secret("monkey") and names_a_secret("wandb_key")


@given(st.text(string.printable, max_size=200))
def test_scrubbing_again_changes_nothing(text):
    assert redact(redact(text)) == redact(text)
    if place_of_secret(text) is None:
        assert redact(text) == text


@given(st.text("abc :=\"'\\{}token-/?&@\n", max_size=60), st.sampled_from(sorted(FORMS)))
def test_forms_anywhere(text, form):
    assert FORMS[form] not in redact(f"{text} {FORMS[form]} {text}")


class TestCommands:
    command = (
        "train",
        "--hub_token",
        "abc",
        "--model_init_kwargs",
        '{"token": "abc", "cfg": {"auth": ["abc"]}, "n": 1}',
    )

    def test_what_is_published(self):
        published = scrub_command([*self.command, "--hub-token=abc", "--output_dir", "/x/y"], ("output_dir",))
        assert published == ["train", "--model_init_kwargs", '{"token": "<secret>", "cfg": {}, "n": 1}']

    def test_the_hint_after_a_signal(self, tmp_path):
        hint = _how_to_resume(15, 3, tmp_path, [*self.command, "--env=https://a:abc@h/", "--method", "dpo"])
        assert "abc" not in hint and "--hub_token '<secret>'" in hint and str(tmp_path) in hint
        assert "--method dpo" in hint and "https://<secret>@h/" in hint

    def test_equal_signs(self):
        assert redact_command(["--hub_token=abc", "--seed=1"]) == ["--hub_token=<secret>", "--seed=1"]


class TestPrinted:
    def test_messages(self, capsys):
        tell(f"Cannot load 'https://a:pw@host' with token={FORMS['hub']}.")
        assert capsys.readouterr().err == "papertrl: Cannot load 'https://<secret>@host' with token=<token>.\n"

    def test_errors_and_tracebacks(self, capsys, monkeypatch):
        def fail(argv):
            raise ValueError(f"refused {FORMS['gitlab']}")

        monkeypatch.setattr("papertrl.hub.publishing.main", fail)
        assert main(["publish", "x", "--debug"]) == 1
        error = capsys.readouterr().err
        assert FORMS["gitlab"] not in error and "Traceback" in error and error.count("refused <token>") == 2

    def test_logs(self):
        stream = io.StringIO()
        logger = SimpleNamespace(handler=logging.StreamHandler(stream))
        try:
            raise RuntimeError(FORMS["github"])
        except RuntimeError as error:
            caught = (type(error), error, error.__traceback__)
        logger.handler.handle(RedactedRecord("x", 40, "f", 1, "with %s", ({"password": "swordfish"},), caught))
        assert "swordfish" not in stream.getvalue() and FORMS["github"] not in stream.getvalue()
        assert "with {'password': '<secret>'}" in stream.getvalue() and "RuntimeError: <token>" in stream.getvalue()
