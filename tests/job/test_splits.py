"""Where a job's rows come from, and what is said of a name that leads nowhere."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from papertrl.core.errors import JobError
from papertrl.job.arguments import JobArguments
from papertrl.job.data import task_of
from papertrl.job.splits import chosen_splits

ROWS = [{"prompt": f"{i % 10}+1=", "answer": str(i)} for i in range(40)]


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def splits(name, **settings):
    return chosen_splits(JobArguments(dataset_name=str(name), **settings))


def test_held_out_rows_share_no_prompt_and_are_the_same_in_every_run(file):
    first = splits(file, held_out_share=0.25)
    assert (len(first["train"]), len(first["test"])) == (32, 8)
    assert not set(first["train"]["prompt"]) & set(first["test"]["prompt"])
    assert sorted(map(int, [*first["train"]["answer"], *first["test"]["answer"]])) == list(range(40))
    assert first["test"].to_list() == splits(file, held_out_share=0.25)["test"].to_list()
    assert splits(file).keys() == {"train"}


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"held_out_share": 1.0}, r"`held_out_share` must be a number in \[0, 1\), got 1.0"),
        ({"held_out_share": -0.5}, "got -0.5"),
        ({"held_out_share": 0.001}, "leaves 40 rows to train on and 0 to hold out"),
        ({"held_out_share": 0.5, "dataset_streaming": True}, "`dataset_streaming`"),
        ({"dataset_train_split": "trian"}, r"no split 'trian'; it has \['train'\].*--dataset_train_split"),
        ({"dataset_test_split": "tset"}, r"no split 'tset'; it has \['train'\].*--held_out_share"),
        ({"dataset_test_split": "train"}, "`dataset_test_split` is 'train'"),
    ],
)
def test_splits_that_cannot_be(file, settings, part):
    with pytest.raises((JobError, ValueError), match=part):
        splits(file, **settings)


def test_a_split_to_hold_out_and_a_share_are_refused(tmp_path):
    rows = Dataset.from_list(ROWS)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "data")
    with pytest.raises(JobError, match="has a split 'test' to hold out"):
        splits(tmp_path / "data", held_out_share=0.1)


def test_folders_of_files(file, tmp_path):
    for name, text in (("data/train.csv", "prompt\n007\n"), ("data/validation-1.tsv", "prompt\nNone\n")):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = splits(tmp_path / "set", dataset_test_split="validation")
    assert [list(rows) for rows in found.values()] == [[{"prompt": "007"}], [{"prompt": "None"}]]
    streamed = splits(tmp_path / "set", dataset_streaming=True)["train"]
    assert isinstance(streamed, IterableDataset) and list(streamed) == [{"prompt": "007"}]
    (tmp_path / "none").mkdir()
    with pytest.raises(JobError, match=r"holds no files that are read; those are \.json"):
        splits(tmp_path / "none")


@pytest.mark.parametrize(
    "name, parts",
    [
        ("pair.jsonl", ["no file or folder 'pair.jsonl'", "Did you mean 'pairs.jsonl'?"]),
        ("pairs.jsnl", ["no file or folder", "Did you mean 'pairs.jsonl'?"]),
        ("./pairs", ["no file or folder", "Did you mean 'pairs.jsonl'?"]),
        ("~/no_such_folder_at_all/x.csv", ["no file or folder", "There is no folder"]),
        ("notes.txt", [".txt' is of no type that is read", ".jsonl, .ndjson, .csv"]),
    ],
)
def test_a_local_name_is_not_sent_to_the_hub(file, name, parts, monkeypatch):
    monkeypatch.setattr("papertrl.job.splits.load_dataset", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    file.with_name("notes.txt").write_text("a")
    with pytest.raises(JobError) as error:
        splits(name)
    for part in parts:
        assert part in str(error.value)


def test_home_is_found(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    assert len(splits("~/pairs.jsonl")["train"]) == 40


@pytest.mark.parametrize(
    "settings, part",
    [
        ({"task_size": 1_000_000_000}, r"`task_size` must be an integer in \[1, 1000000\], got 1000000000"),
        ({"held_out_prompts": 10**12}, "`held_out_prompts`"),
        ({"held_out_prompts": -5}, "`held_out_prompts` must be .*, got -5"),
        ({"held_out_share": 0.1}, "`held_out_share` is for datasets"),
    ],
)
def test_settings_of_a_task(settings, part):
    with pytest.raises((JobError, ValueError), match=part):
        task_of(JobArguments(**settings))
