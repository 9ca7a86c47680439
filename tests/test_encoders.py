import logging
import subprocess
import sys
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.models.encoders import count_characters, encode, load_encoder


@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_characters_are_counted_but_for_white_space(texts):
    vectors = count_characters(texts)
    for text, vector in zip(texts, vectors, strict=True):
        counts = [0] * 1024
        for character in text:
            if not character.isspace():
                counts[ord(character) % 1024] += 1
        assert vector.tolist() == counts


def test_encode_asks_for_each_text_once_and_answers_in_order():
    asked = []

    def encoder(texts):
        asked.append(texts)
        return torch.tensor([[len(text), 1] for text in texts], requires_grad=False)

    vectors = encode(encoder, ["a", "bcd", "a", ""])
    assert asked == [["a", "bcd", ""]]
    assert vectors.tolist() == [[1, 1], [3, 1], [1, 1], [0, 1]] and vectors.dtype == torch.float32


@pytest.mark.parametrize("answer", [[1.0, 2.0], [[1.0, 2.0]], [[[1.0]], [[2.0]]]])
def test_encode_refuses_anything_but_a_vector_per_text(answer):
    with pytest.raises(ValueError, match=r"one vector per text, of shape \(2, D\), got"):
        encode(lambda texts: answer, ["a", "b"])


def test_wordllama_knows_meaning_without_network():
    pytest.importorskip("wordllama")
    code = (
        "import logging, socket\n"
        "def refuse(*args, **kwargs): raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from papertrl.models.encoders import encode\n"
        "import torch.nn.functional as F\n"
        "cat, kitten, bond, empty = encode('wordllama', ['A cat sits.', 'A kitten sits down.', 'Bond markets', ''])\n"
        "print(*(float(F.cosine_similarity(cat, other, dim=0)) for other in (kitten, bond, empty)))\n"
        "print(logging.root.handlers, logging.root.level)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"HOME": "/nonexistent"})
    assert ran.returncode == 0, ran.stderr
    near, far, empty = map(float, ran.stdout.splitlines()[0].split())
    assert near > far + 0.3 and empty == 0
    assert ran.stdout.splitlines()[1] == f"[] {logging.WARNING}"


def test_missing_packages_and_models_are_named(monkeypatch):
    load_encoder.cache_clear()
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ValueError, match="`pip install wordllama`"):
        load_encoder("wordllama")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*pip install sentence-transformers"):
        load_encoder("nobody/nothing")


def test_models_of_sentence_transformers(monkeypatch):
    class SentenceTransformer:
        def __init__(self, name):
            if name != "there":
                raise OSError(f"no model\n  {name}")

        def encode(self, texts, convert_to_tensor, show_progress_bar):
            assert convert_to_tensor and not show_progress_bar
            return torch.tensor([[float(len(text))] for text in texts])

    load_encoder.cache_clear()
    module = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    assert encode("there", ["ab", "c"]).tolist() == [[2.0], [1.0]]
    with pytest.raises(ValueError, match=r"'away'.*can be loaded: no model away"):
        load_encoder("away")
    load_encoder.cache_clear()
