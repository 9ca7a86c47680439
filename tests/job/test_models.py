"""Flags of the model reach everything that loads one; what holds no model, or part of one, is refused."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
)

from papertrl.core.errors import JobError
from papertrl.evaluation.models import load_model
from papertrl.job.arguments import choose, parse
from papertrl.job.data import JobData
from papertrl.job.judges import judges_of, named_judges
from papertrl.job.models import check_model_flags, local_model, start_model
from papertrl.job.run import make_trainer
from papertrl.models.loading import reward_model, whole_checkpoints

QUIET = ["--report_to", "none", "--bf16", "False", "--gradient_checkpointing", "False", "--use_cpu", "True"]
ROWS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "x", "completion": str(i + 1)} for i in range(8)]


@pytest.fixture(scope="module")
def scorer(tiny_path, tmp_path_factory):
    path = tmp_path_factory.mktemp("scorer")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=1)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(path)
    return str(path)


def job_of(tmp_path, *flags):
    return parse(choose([*QUIET, "--output_dir", str(tmp_path / "run"), *map(str, flags)]))


@pytest.fixture
def loads(monkeypatch):
    """What every `from_pretrained` is asked for: class, name and keyword arguments."""
    seen = []

    def recording(owner):
        given = owner.__dict__["from_pretrained"]

        def from_pretrained(cls, name, *args, **kwargs):
            seen.append((owner.__name__, str(name), kwargs))
            return given.__get__(None, cls)(name, *args, **kwargs)

        monkeypatch.setattr(owner, "from_pretrained", classmethod(from_pretrained))

    for owner in (AutoConfig, AutoTokenizer, PreTrainedModel):
        recording(owner)
    for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        # Takes the flag out of what it passes on
        given = auto.from_pretrained

        def from_pretrained(name, *args, given=given, auto=auto, **kwargs):
            seen.append((auto.__name__, str(name), kwargs))
            return given(name, *args, **kwargs)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    return seen


def built(job, tmp_path):
    rewards, judge = named_judges(job)
    name, tokenizer = start_model(job, None, tmp_path, PartialState())
    data = JobData(Dataset.from_list(ROWS), None, None, rewards, "reward")
    return make_trainer(job, data, judges_of(job, data, rewards, judge), name, tokenizer, tmp_path, TrainerCallback())[
        0
    ]


FAMILIES = {
    "grpo": ["--beta", "0.1", "--reward_model"],
    "dpo": ["--online_iterations", "1", "--reward_model"],
    "sft": [],
    "reward": [],
    "asft": [],
    "rlg": ["--rlg_train", "True", "--reward_model"],
}


@pytest.mark.parametrize("method", FAMILIES)
def test_flags_of_the_model_reach_every_loader(method, tiny_path, scorer, tmp_path, loads):
    flags = [*FAMILIES[method], scorer] if FAMILIES[method] else []
    flags += ["--trust_remote_code", "--model_revision", "v7", "--dtype", "bfloat16", "--attn_implementation", "eager"]
    job = job_of(tmp_path, "--method", method, "--model_name_or_path", tiny_path, "--dataset_name", "rows", *flags)
    trainer = built(job, tmp_path)
    assert {trainer.model.dtype, trainer.model.config._attn_implementation} == {torch.bfloat16, "eager"}
    own = [(owner, kwargs) for owner, name, kwargs in loads if name == tiny_path]
    # TRL looks into the config for the class of the model, and transformers into it once more
    loading = [kwargs for owner, kwargs in own if "output_loading_info" not in kwargs and owner != "AutoConfig"]
    assert loading and all(kwargs.get("revision") in ("v7", None) for kwargs in loading)
    tokenizers = [kwargs for owner, kwargs in own if owner == "AutoTokenizer"]
    models = [kwargs for owner, kwargs in own if owner == "PreTrainedModel"]
    assert tokenizers and all(k["trust_remote_code"] and k["revision"] == "v7" for k in tokenizers)
    # An automatic class puts it into the config
    chosen = [k.get("attn_implementation") or k["config"]._attn_implementation for k in models]
    assert set(chosen) == {"eager"}
    assert all(kwargs["dtype"] == torch.bfloat16 for kwargs in models)
    judged = [(owner, kwargs) for owner, name, kwargs in loads if name == scorer and owner != "PreTrainedModel"]
    assert bool(judged) == bool(FAMILIES[method])
    for owner, kwargs in judged:
        if owner != "AutoConfig" or "trust_remote_code" in kwargs:
            assert kwargs["trust_remote_code"] is True
        assert kwargs.get("revision") in (None, "main")


def test_code_of_repositories_does_not_run_by_default(tiny_path, scorer, tmp_path, loads):
    flags = ["--method", "grpo", "--model_name_or_path", tiny_path, "--dataset_name", "x", "--reward_model", scorer]
    job = job_of(tmp_path, *flags)
    built(job, tmp_path)
    assert loads and not any(kwargs.get("trust_remote_code") for _, _, kwargs in loads)


LORA = {"lora_r": 3, "lora_alpha": 5, "lora_dropout": 0.25, "use_rslora": True, "use_dora": True}
LORA |= {"lora_target_modules": "q_proj", "lora_modules_to_save": "lm_head"}


@pytest.mark.parametrize("method", ["grpo", "dpo", "sft", "reward"])
def test_flags_of_adapters_reach_the_adapter(method, tiny_path, tmp_path):
    flags = [text for name, value in LORA.items() for text in (f"--{name}", value)]
    if method == "reward":
        flags[flags.index("lm_head")] = "score"
    flags += ["--reward_funcs", "exact_match"] if method == "grpo" else []
    job = job_of(
        tmp_path, "--method", method, "--model_name_or_path", tiny_path, "--dataset_name", "x", "--use_peft", *flags
    )
    check_model_flags(job)
    config = built(job, tmp_path).model.peft_config["default"]
    found = [config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora]
    assert found == list(LORA.values())[:5]
    assert config.target_modules == {"q_proj"}
    assert {"reward": "score"}.get(method, "lm_head") in config.modules_to_save


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--lora_r", 4], "`lora_r` is 4, which has no effect without `--use_peft`"),
        (["--lora_target_modules", "q_proj"], "`lora_target_modules`"),
        (["--use_dora"], "`use_dora`"),
        (["--bnb_4bit_quant_type", "fp4"], "`bnb_4bit_quant_type`.*`--load_in_4bit`"),
        (["--use_bnb_nested_quant"], "`use_bnb_nested_quant`"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(flags, part, tmp_path):
    with pytest.raises(JobError, match=part):
        check_model_flags(job_of(tmp_path, "--model_name_or_path", "m", "--dataset_name", "x", *flags))


@pytest.mark.parametrize("flags, told", [([], True), (["--task", "sorting"], False), (["--dataset_name", "x"], False)])
def test_a_model_of_ones_own_is_not_trained_on_sums_silently(flags, told, tmp_path, capsys):
    check_model_flags(job_of(tmp_path, "--method", "sft", "--model_name_or_path", "mine", *flags))
    assert ("'mine' is trained on two-digit sums" in capsys.readouterr().err) == told


# --- Folders and files ------------------------------------------------------------------------------------------


def test_what_is_no_model(tiny_path, tmp_path, monkeypatch):
    def refused(name, *parts):
        with pytest.raises(JobError) as error:
            local_model(str(name))
        for part in parts:
            assert part in str(error.value)

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no model", "nor anything else")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "holds an adapter")
    (tmp_path / "above" / "model").mkdir(parents=True)
    (tmp_path / "above" / "model" / "config.json").write_text("{}")
    refused(tmp_path / "above", "holds no model", "but model", f"Did you mean '{tmp_path / 'above' / 'model'}'?")
    refused(tmp_path / "above" / "model", "no weights")
    (tmp_path / "m.gguf").write_text("")
    refused(tmp_path / "m.gguf", "is a file", "--gguf_file m.gguf")
    monkeypatch.setenv("HOME", str(Path(tiny_path).parent))
    assert local_model(f"~/{Path(tiny_path).name}") == tiny_path
    assert local_model("someone/something") == "someone/something"


# --- Weights that are not there ---------------------------------------------------------------------------------


def lacking(path, tmp_path, key):
    model = AutoModelForCausalLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "lacking")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "lacking")
    file = tmp_path / "lacking" / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if key not in name}, file, {"format": "pt"})
    return str(tmp_path / "lacking")


def test_a_language_model_is_no_reward_model(tiny_path, scorer):
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .*score\.weight.*papertrl train --method reward"):
        reward_model(tiny_path)
    assert reward_model(scorer).config.num_labels == 1
    given = PreTrainedModel.from_pretrained
    with whole_checkpoints(new_head=True):
        AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=1)
    assert PreTrainedModel.from_pretrained == given


@pytest.mark.parametrize("method", ["grpo", "dpo", "sft", "reward"])
def test_incomplete_checkpoints_are_refused_by_every_family(method, tiny_path, tmp_path):
    name = lacking(tiny_path, tmp_path, "layers.1.mlp.down_proj")
    flags = ["--reward_funcs", "exact_match"] if method == "grpo" else []
    job = job_of(tmp_path, "--method", method, "--model_name_or_path", name, "--dataset_name", "x", *flags)
    with pytest.raises(ValueError, match=r"lacks 1 of the weights .*layers\.1\.mlp\.down_proj.*incomplete"):
        built(job, tmp_path)
    if method == "sft":
        with pytest.raises(JobError, match="down_proj"):
            load_model(name)


def test_incomplete_adapters_are_refused_and_a_head_that_one_brings_counts(tiny_path, tmp_path):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_path, num_labels=1)
    options = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    adapted = get_peft_model(base, LoraConfig(**options, modules_to_save=["score"]))
    adapted.save_pretrained(tmp_path / "scorer")
    scored = reward_model(str(tmp_path / "scorer"))
    heads = [model.score.modules_to_save["default"].weight for model in (base, scored)]
    assert torch.equal(*heads)

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_path), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": tiny_path}))
    load_model(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.0" not in k}, file)
    with pytest.raises(JobError, match="missing adapter keys"):
        load_model(str(tmp_path / "adapter"))
