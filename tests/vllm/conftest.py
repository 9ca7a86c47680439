import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="session")
def policy_path(policy_path, tmp_path_factory):
    """The policy of all tests with one head for two: vLLM on the CPU has no attention heads of 16 numbers."""
    path = str(shutil.copytree(policy_path, tmp_path_factory.mktemp("vllm") / "policy"))
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
    AutoModelForCausalLM.from_pretrained(path, **heads).save_pretrained(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def loadable_weights():
    """
    Linear layers of vLLM on the CPU keep their weights, and can be loaded anew.

    vLLM packs them after the first load and deletes the originals, so that `sync_weights` of TRL ends in
    "'Parameter' object has no attribute 'weight_loader'". On other devices nothing calls this function.
    """
    from vllm.model_executor.layers import utils

    def unpacked(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "dispatch_cpu_unquantized_gemm", unpacked)
        yield


@pytest.fixture(autouse=True)
def freed_engines(monkeypatch):
    """vLLM keeps the memory of an engine until it is shut down, which TRL leaves to the end of the process."""
    from trl.generation.vllm_generation import VLLMGeneration

    engines, start = [], VLLMGeneration._init_vllm

    def started(self):
        start(self)
        engines.append(self.llm.llm_engine.engine_core)

    monkeypatch.setattr(VLLMGeneration, "_init_vllm", started)
    yield
    for engine in engines:
        engine.shutdown()
