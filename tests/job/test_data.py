import pytest
from datasets import Dataset, DatasetDict

from papertrl.core.errors import JobError
from papertrl.core.family import FAMILIES, POLICY, PREFERENCE, REWARD
from papertrl.job.arguments import JobArguments
from papertrl.job.data import check_reward_columns, dataset_data, task_data, task_of
from papertrl.rewards import checked, exact_match

ROWS = Dataset.from_dict({"prompt": ["1+1=", "1+2=", "2+2="], "answer": ["2", "3", "4"]})


@pytest.fixture(params=["json", "csv", "parquet", "disk", "disk_dict", "folder"])
def path(request, tmp_path):
    kind = request.param
    if kind == "disk":
        ROWS.save_to_disk(tmp_path / "data")
        return tmp_path / "data"
    if kind == "disk_dict":
        DatasetDict({"train": ROWS, "test": ROWS.select([0])}).save_to_disk(tmp_path / "data")
        return tmp_path / "data"
    if kind == "folder":
        (tmp_path / "data").mkdir()
        ROWS.to_json(tmp_path / "data" / "train.json")
        return tmp_path / "data"
    file = tmp_path / f"rows.{kind}"
    getattr(ROWS, f"to_{kind}")(file)
    return file


def test_every_kind_of_local_dataset(path):
    data = dataset_data(POLICY, JobArguments(dataset_name=str(path)), [exact_match])
    assert list(data.train["prompt"]) == list(ROWS["prompt"])
    assert [str(a) for a in data.train["answer"]] == list(ROWS["answer"])
    assert (data.problems is not None) == path.joinpath("dataset_dict.json").exists()


def write(tmp_path, text, name="rows.jsonl"):
    file = tmp_path / name
    file.write_text(text)
    return str(file)


@pytest.mark.parametrize(
    "family, text, parts",
    [
        ("policy", '{"question": "1+1", "answer": "2"}\n', ["`prompt`", "['answer', 'question']"]),
        ("preference", '{"prompt": "a", "chosen": "b"}\n', ["`chosen`, `rejected`", "['chosen', 'prompt']"]),
        ("preference", '{"chosen": "b", "rejected": "b"}\n', ["split 'train': Row 0", "`rejected`: equals `chosen`."]),
        ("preference", '{"prompt": "a", "completions": ["b", "c"], "ranks": [1, 1]}\n', ["no row is left"]),
        ("supervised", '{"prompt": "a"}\n', ["`text`", "`prompt` and `completion`", "['prompt']"]),
        ("policy", "", ["no rows"]),
        ("policy", "no json", ["cannot be loaded"]),
    ],
)
def test_unfit_files_are_refused(family, text, parts, tmp_path):
    with pytest.raises(JobError) as error:
        dataset_data(FAMILIES[family], JobArguments(dataset_name=write(tmp_path, text)), [exact_match], ("pairs",))
    for part in parts:
        assert part in str(error.value)


def test_missing_files_splits_and_hub_ids_are_refused(tmp_path):
    file = write(tmp_path, '{"prompt": "a"}\n')
    for arguments, part in [
        (JobArguments(dataset_name=str(tmp_path / "none.csv")), "there is no file"),
        (JobArguments(dataset_name="nobody/nothing"), "'nobody/nothing' cannot be loaded"),
    ]:
        with pytest.raises(JobError, match=part):
            dataset_data(POLICY, arguments, [exact_match])
    DatasetDict({"validation": ROWS}).save_to_disk(tmp_path / "data")
    with pytest.raises(JobError, match=r"no split 'train'; it has \['validation'\]"):
        dataset_data(POLICY, JobArguments(dataset_name=str(tmp_path / "data")), [exact_match])
    with pytest.raises(JobError, match="drop one"):
        task_of(JobArguments(task="addition", dataset_name=file))


def test_columns_that_rewards_read():
    check_reward_columns([checked(exact_match)], ROWS, "rows")
    with pytest.raises(JobError, match=r"'exact_match' reads the dataset column `answer`.*\['prompt'\]"):
        check_reward_columns([checked(exact_match)], ROWS.select_columns("prompt"), "rows")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", ["policy", "preference", "supervised"])
def test_views_of_a_task(family, chat):
    arguments = JobArguments(task_size=30, held_out_prompts=10)
    data = task_data(task_of(arguments), FAMILIES[family], arguments, seed=0, chat=chat)
    assert len(data.train) == 30 and len(data.problems) == 10
    texts = {"policy": "prompt", "preference": "rejected", "supervised": "completion"}
    assert isinstance(data.train[texts[family]][0], list if chat else str)
    assert isinstance(data.problems["prompt"][0], list if chat else str)
    assert isinstance(data.problems["answer"][0], str)


def test_a_family_that_scores_answers_is_measured_by_pairs():
    arguments = JobArguments(task_size=30, held_out_prompts=10)
    data = task_data(task_of(arguments), REWARD, arguments, seed=0, chat=False)
    assert data.problems is None and data.measure == "pair_accuracy"
    assert data.train.column_names == data.eval.column_names == ["prompt", "chosen", "rejected"]
    assert len(data.train) == 30 and len(data.eval) == 10


def test_empty_task_is_refused():
    with pytest.raises(ValueError, match="`task_size` must be an integer in \\[1, 1000000\\], got 0"):
        JobArguments(task_size=0)
    none_held_out = JobArguments(task_size=5, held_out_prompts=0)
    assert task_data(task_of(none_held_out), POLICY, none_held_out, seed=0, chat=False).problems is None


def chat(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=False)]


@pytest.mark.parametrize(
    "formats, rows, columns",
    [
        (("pairs",), [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]}], ["chosen", "rejected"]),
        (("pairs",), [{"prompt": "p", "completion": c, "label": c == "a"} for c in "ab"], ["chosen", "rejected"]),
        (("pairs",), [{"messages": chat("hi", "hello", "no", "good day")}], ["chosen", "rejected"]),
        (("feedback",), [{"messages": chat("hi", "hello", "no")}], ["rejected", "feedback"]),
        (("rankings", "pairs"), [{"prompt": "p", "completions": ["a", "b"], "relevance": [1, 0]}], ["relevance"]),
        (("prompts",), [{"chosen": "p a", "rejected": "p b"}], ["prompt"]),
    ],
)
def test_preference_data_is_converted_to_what_the_methods_take(formats, rows, columns, tmp_path):
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows)}).save_to_disk(tmp_path / "data")
    arguments = JobArguments(dataset_name=str(tmp_path / "data"))
    data = dataset_data(PREFERENCE, arguments, [exact_match], formats, formats)
    assert {"prompt", *columns} <= set(data.train.column_names)
    assert "prompt" in data.problems.column_names
    assert data.eval.to_list() == data.train.to_list()
    assert dataset_data(PREFERENCE, arguments, [], formats).eval is None


def test_formats_that_preference_trainers_take(tmp_path):
    from papertrl import IrpoDPOConfig, IrpoDPOTrainer, PreferenceConfig, PreferenceTrainer

    options = {"output_dir": str(tmp_path), "bf16": False, "use_cpu": True}
    assert PreferenceTrainer.dataset_formats(PreferenceConfig(**options)) == ("pairs",)
    assert PreferenceTrainer.dataset_formats(PreferenceConfig(**options, online_iterations=1)) == ("prompts",)
    assert IrpoDPOTrainer.dataset_formats(IrpoDPOConfig(**options)) == ("rankings", "pairs")
    assert IrpoDPOTrainer.dataset_formats(IrpoDPOConfig(**options, irpo_weighting="none")) == ("pairs",)
