import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Shape annotations of the maths are checked in every test
_hook = install_import_hook("papertrl.losses", "beartype.beartype")

import pytest
import torch
from datasets import disable_progress_bars
from hypothesis import settings

from papertrl.models.tiny import tiny_model, tiny_tokenizer

settings.register_profile("papertrl", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("papertrl")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory, tokenizer):
    """Folder of a tiny random causal LM with its tokenizer, as `from_pretrained` reads it."""
    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tiny_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory, tokenizer):
    """
    Folder of a tiny causal LM for rollouts: its distribution is uneven, and letters end a completion.

    A random model would hardly ever emit the one end token, and all of its completions would be truncated.
    """
    path = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    model = tiny_model(tokenizer, hidden_size=32, num_layers=2, num_heads=2)
    model.get_output_embeddings().weight.data *= 4
    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLM"))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *letters]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def quick_collections():
    """Trainers collect garbage several times per run: leave what the imports made out of it."""
    disable_progress_bars()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
