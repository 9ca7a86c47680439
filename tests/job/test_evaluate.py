"""`papertrl evaluate`: real runs, adapters, several models, what is kept, and what is refused."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from papertrl import cli
from papertrl.core.errors import JobError
from papertrl.evaluation import Answered, completion_logps, load_model, measures, sampling, table
from papertrl.evaluation.models import short_names
from papertrl.evaluation.sampling import answer_options, complete, in_batches
from papertrl.job import evaluate as evaluate


def run(*argv):
    return cli.main(["evaluate", *map(str, argv)])


def numbers(folder):
    return json.loads((folder / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def model(tiny_path):
    return load_model(tiny_path)


def test_a_run_is_evaluated_on_its_own_task_and_the_card_shows_it(small_run, tmp_path, capsys):
    from papertrl.hub.cards import evaluation_table

    assert run(small_run, "--num_prompts", 16) == 0
    result = numbers(small_run)
    (measured,) = result["models"].values()
    assert {"accuracy", "response_length", "distinct-2", "kl_to_base"} <= set(measured)
    assert all(m["low"] <= m["value"] <= m["high"] for m in measured.values())
    prompts = result["dataset"].pop("prompts")
    assert result["dataset"] == {"name": "addition", "kwargs": {"digits": 1}, "seed": 0}
    # Sums of one digit repeat among 16 draws; copies are no evidence of their own
    assert 1 < prompts < 16
    assert "accuracy" in capsys.readouterr().out
    assert evaluation_table(small_run, "me/run")["this"]["accuracy"] == measured["accuracy"]["value"]


def test_a_run_and_its_evaluation_agree(small_run, tmp_path, capsys):
    """On the same prompts, ends and lengths; a number of prompts or a seed of one's own asks others."""
    assert run(small_run, "--output_dir", tmp_path) == 0
    told = json.loads((small_run / "run.json").read_text())
    result = numbers(tmp_path)
    assert result["dataset"] == {"name": "addition", "kwargs": {"digits": 1}, "seed": 42, "prompts": 8}
    assert result["models"][small_run.name]["accuracy"]["value"] == told["scores"]["after"]
    assert f"The run measured accuracy {told['scores']['after']:.3f} on these prompts" in capsys.readouterr().out
    assert run(small_run, "--data_seed", 1, "--output_dir", tmp_path) == 0
    assert numbers(tmp_path)["dataset"]["prompts"] > 8 and "The run measured" not in capsys.readouterr().out


def test_a_stop_string_of_training_ends_answers_of_any_backend(model, monkeypatch):
    prompts = model.tokenizer(["1+1=", "12+34="])["input_ids"]
    free = complete(model, prompts, 1, 8, 0.0, 1.0, 0)
    stop = model.tokenizer.decode(free[0][0][2])
    options = answer_options({"generation_kwargs": {"stop_strings": [stop], "temperature": 9.0}})
    assert options == {"stop_strings": [stop]}
    fast = complete(model, prompts, 1, 8, 0.0, 1.0, 0, options=options)
    assert 0 < len(fast[0][0]) <= 3 and model.tokenizer.decode(fast[0][0]).endswith(stop)
    monkeypatch.setattr(sampling, "supported", lambda *args: "no")
    assert complete(model, prompts, 1, 8, 0.0, 1.0, 0, options=options) == fast


def test_several_models_samples_and_kept_completions(small_run, tmp_path, monkeypatch):
    start = small_run / "start_model"
    flags = [start, small_run, "--num_prompts", 8, "--num_samples", 2, "--seeds", 0, 1, "--output_dir", tmp_path]
    assert run(*flags) == 0
    result = numbers(tmp_path)
    assert {"pass@1", "pass@4", "mean@4", "win_rate", "length_controlled_win_rate"} <= set(
        result["models"][small_run.name]
    )
    assert set(result["differences"]) == {small_run.name}
    monkeypatch.setattr(evaluate, "load_model", lambda name: pytest.fail("loaded again"))
    assert run(*flags, "--metrics", "exact_match", "--reward_funcs", "last_number_match") == 0
    again = numbers(tmp_path)["models"][small_run.name]
    assert again["exact_match"]["value"] == pytest.approx(result["models"][small_run.name]["accuracy"]["value"])


def test_an_adapter_is_loaded_with_its_base_and_diverges_from_it(tiny_path, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_path)
    adapted = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", "v_proj"]))
    adapter, output = tmp_path / "adapter", tmp_path / "out"
    adapted.save_pretrained(adapter)
    AutoTokenizer.from_pretrained(tiny_path).save_pretrained(adapter)
    assert run(adapter, "--num_prompts", 8, "--num_samples", 4, "--output_dir", output) == 0
    assert numbers(output)["models"]["adapter"]["kl_to_base"]["value"] > 0


def test_greedy_completions_do_not_depend_on_the_batch_size(model):
    texts = [f"{i:02}+{7 * i % 100:02}=" * (1 + i % 3) for i in range(10)]
    prompts = model.tokenizer(texts)["input_ids"]
    one, many = (complete(model, prompts, 1, 6, 0.0, 1.0, 0, size) for size in (1, 10))
    assert one == many


def test_a_replaced_generate_answers_and_the_log_says_so(model, monkeypatch, caplog):
    prompts = model.tokenizer(["1+1=", "12+34="])["input_ids"]
    looped, calls, generate = complete(model, prompts, 1, 6, 0.0, 1.0, 0), [], model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **kwargs: (calls.append(1), generate(**kwargs))[1])
    sampling.warn_of_generate.cache_clear()
    for _ in range(2):
        assert complete(model, prompts, 1, 6, 0.0, 1.0, 0) == looped
    assert len(calls) == 2 and caplog.text.count("has its own `generate`") == 1


def test_stop_strings_of_the_model_end_completions_in_the_loop_and_in_generate(model, monkeypatch):
    prompts = model.tokenizer([f"{i}+{i}=" for i in range(12)])["input_ids"]
    free = complete(model, prompts, 1, 12, 0.0, 1.0, 0)
    stop = model.tokenizer.decode(free[0][0])[2]
    monkeypatch.setattr(model.model.generation_config, "stop_strings", [stop])
    looped = complete(model, prompts, 1, 12, 0.0, 1.0, 0)
    monkeypatch.setattr(model.model, "generate", model.model.generate)
    assert complete(model, prompts, 1, 12, 0.0, 1.0, 0) == looped != free
    for (row,), (whole,) in zip(looped, free, strict=True):
        text = model.tokenizer.decode(row)
        assert row == whole[: len(row)] and stop not in text[:-1] and (row == whole or text.endswith(stop))


def test_completion_logps_are_those_of_one_row_at_a_time(model):
    prompts = model.tokenizer(["1+1=", "12+34="])["input_ids"]
    completions = [[5, 6, 7], [8]]
    for prompt, completion, logps in zip(
        prompts, completions, completion_logps(model.model, prompts, completions), strict=True
    ):
        with torch.no_grad():
            each = model.model(input_ids=torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        expected = [each[len(prompt) - 1 + i, token].item() for i, token in enumerate(completion)]
        assert logps == pytest.approx(expected, abs=1e-5)


def test_the_batch_size_is_halved_until_it_fits():
    sizes = []

    def call(batch):
        sizes.append(len(batch))
        if len(batch) > 50:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return batch

    assert in_batches(list(range(300)), call, None) == list(range(300))
    assert sizes[:4] == [256, 128, 64, 32]
    with pytest.raises(JobError, match="batch of 64"):
        in_batches(list(range(300)), call, 64)
    with pytest.raises(RuntimeError, match="something else"):
        in_batches([1], lambda batch: (_ for _ in ()).throw(RuntimeError("something else")), None)


def test_differences_are_paired_by_prompt():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    scores = [[[float(value)] for value in hard], [[float(value) + 0.01] for value in hard]]
    both = {
        name: measures(Answered([["a"]] * 200, {"reward": each}, [[1]] * 200), [], [1], None)
        for name, each in zip("ab", scores, strict=True)
    }
    result = table(both, 200, seed=0)
    wide = result["models"]["a"]["reward"]
    narrow = result["differences"]["b"]["reward"]
    assert wide["high"] - wide["low"] > 0.05
    assert narrow["high"] - narrow["low"] < 1e-6
    assert narrow["value"] == pytest.approx(0.01)


def test_a_dataset_with_rewards(tiny_path, tmp_path):
    file = tmp_path / "data.jsonl"
    Dataset.from_dict({"prompt": ["1+1=", "2+2="], "answer": ["2", "4"]}).to_json(file)
    assert run(tiny_path, "--dataset_name", file, "--max_new_tokens", 3, "--output_dir", tmp_path / "out") == 0
    assert numbers(tmp_path / "out")["dataset"]["prompts"] == 2


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--metrics", "pass_at_kk"], "Did you mean 'pass_at_k'"),
        (["--num_samples", 2, "--k", 3], "`--k` must be in [1, 2]"),
        (["--num_samples", 2, "--temperature", 0], "decodes greedily"),
        (["--metrics", "pass_at_k"], "needs samples"),
        (["--metrics", "win_rate"], "name two models"),
        (["--seeds", 1, 1], "`--seeds` must differ"),
        (["--temperature", "nan"], "must be a number of at least 0"),
        (["--num_prompts", 0], "`--num_prompts` must be at least 1, got 0"),
        (["--task", "additon"], "Did you mean 'addition'"),
        (["--task_kwargs", "{"], "not JSON"),
    ],
)
def test_wrong_flags_are_refused_before_a_model_is_loaded(flags, text, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "load_model", lambda name: pytest.fail("loaded"))
    assert run("some-model", *flags, "--output_dir", tmp_path / "out") != 0
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "text"),
    [({"question": "a"}, "lacks the column `prompt`"), ({"prompt": "a"}, "no column `answer`")],
)
def test_a_dataset_without_what_is_read_is_refused(row, text, capsys, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert run("some-model", "--dataset_name", file, "--output_dir", tmp_path / "out") == 1
    assert text in capsys.readouterr().err


def test_a_missing_model_is_named(capsys, tmp_path):
    assert run(tmp_path / "nothing", "--output_dir", tmp_path / "out") == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_a_reward_that_does_not_apply_to_a_row_leaves_it_out():
    answered = Answered([["a"], ["b"], ["c"]], {"r": [[1.0], [None], [0.0]]}, [[1]] * 3)
    opponent = Answered([["a"], ["b"], ["c"]], {"r": [[0.0], [1.0], [None]]}, [[1]] * 3)
    statistics = measures(answered, ["pass_at_k", "mean_at_k", "win_rate"], [1], None, opponent)
    values = {name: statistic(np.arange(3)) for name, statistic in statistics.items()}
    assert values["r"] == values["pass@1"] == values["mean@1"] == 0.5
    assert values["win_rate"] == 1.0


def test_the_base_is_the_one_asked_for(small_run, tiny_path, tmp_path):
    flags = [tiny_path, "--num_prompts", 4, "--output_dir", tmp_path]
    assert run(*flags, "--base_model", small_run) == 0
    (measured,) = numbers(tmp_path)["models"].values()
    assert measured["kl_to_base"]["value"] != 0
    assert run(*flags) == 0
    (measured,) = numbers(tmp_path)["models"].values()
    assert "kl_to_base" not in measured


@pytest.mark.parametrize(("length", "punishment"), [([], 0.0), (["--max_new_tokens", 3], -1.0)])
def test_length_rewards_know_the_length(small_run, tmp_path, length, punishment):
    flags = ["--num_prompts", 8, "--reward_funcs", "get_soft_overlong_punishment", "--output_dir", tmp_path]
    assert run(small_run, *flags, *length) == 0
    measured = numbers(tmp_path)["models"][small_run.name]
    # Two digits and the end fill three tokens; of the run's five they are not too long
    assert measured["response_length"]["value"] == 3
    assert measured["soft_overlong_punishment_reward"]["value"] == punishment


def test_models_whose_folders_are_called_alike_keep_their_own_columns(tmp_path):
    for parent in ("a", "b"):
        (tmp_path / parent / "model").mkdir(parents=True)
    names = short_names([str(tmp_path / "a" / "model"), str(tmp_path / "b" / "model"), "me/model"])
    assert list(names.values()) == ["a/model", "b/model", "me/model"]


def test_a_new_run_in_a_folder_does_not_inherit_the_old_ones_evaluation(tmp_path):
    from tests.job.conftest import flags

    output = tmp_path / "run"
    train = ["train", *flags(max_steps=1, start_model_steps=5), "--output_dir", str(output)]
    assert cli.main(train) == 0
    assert run(output, "--num_prompts", 4) == 0
    assert cli.main([*train, "--overwrite_output_dir"]) == 0
    assert not [path for path in output.iterdir() if path.name.startswith("evaluation")]
