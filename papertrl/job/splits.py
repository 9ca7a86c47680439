"""Where a job's rows come from: splits of a file, a folder or a dataset of the Hub."""

import random
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns

from ..core.errors import JobError
from ..data.files import FILE_TYPES, cause_of, file_type, looks_like_a_file, near_file, read_files
from .arguments import JobArguments

TEST = JobArguments.dataset_test_split
# Of the draw of held-out rows: runs of different seeds hold out the same
SEED = 0

Splits = dict[str, Dataset | IterableDataset]


def chosen_splits(arguments: JobArguments) -> Splits:
    """
    Rows to train on, as `train`, and, where there are any, rows to hold out, as `test`.

    Raises:
        [`JobError`]: if the dataset cannot be loaded, lacks a split that is named, or has one to hold out where
            `held_out_share` asks for another.
    """
    name, train, test = arguments.dataset_name, arguments.dataset_train_split, arguments.dataset_test_split
    share = arguments.held_out_share
    splits = load_splits(arguments)
    for flag, split in (("dataset_train_split", train), ("dataset_test_split", test)):
        # Without having named it, one takes what there is
        if split not in splits and (flag == "dataset_train_split" or split != TEST):
            raise JobError(
                f"Dataset '{name}' has no split '{split}'; it has {sorted(splits)}. Set `--{flag}` to one of these"
                + (", or use `--held_out_share`." if flag == "dataset_test_split" else ".")
            )
    if train == test:
        raise JobError(
            f"`dataset_test_split` is '{test}', the rows that are trained on: nothing would be held out. Name another "
            "split, or use `--held_out_share`."
        )
    chosen = {"train": splits[train]} | ({"test": splits[test]} if test in splits else {})
    if not share:
        return chosen
    if "test" in chosen:
        raise JobError(
            f"`held_out_share` is {share}, but dataset '{name}' has a split '{test}' to hold out. Leave one of them "
            "out; `--dataset_test_split` names the split."
        )
    if not isinstance(chosen["train"], Dataset):
        raise JobError(
            "`held_out_share` draws rows of the whole dataset, which `dataset_streaming` does not know. Load it "
            "without streaming."
        )
    return held_out(chosen["train"], share)


def held_out(dataset: Dataset, share: float) -> Splits:
    """
    The dataset in two, whose rows share no prompt; the same for every run.

    Raises:
        [`JobError`]: if either would have no rows.
    """
    prompts = map(repr, dataset["prompt"]) if "prompt" in dataset.column_names else range(len(dataset))
    rows: dict[str | int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    drawn = list(rows.values())
    random.Random(SEED).shuffle(drawn)
    test: list[int] = []
    for group in drawn:
        if len(test) + len(group) / 2 >= share * len(dataset):
            break
        test += group
    train = sorted(set(range(len(dataset))) - set(test))
    if not train or not test:
        raise JobError(
            f"`held_out_share` of {share} leaves {len(train)} rows to train on and {len(test)} to hold out, of "
            f"{len(dataset)} rows with {len(drawn)} different prompts. Choose another, or more rows."
        )
    return {"train": dataset.select(train), "test": dataset.select(sorted(test))}


def load_splits(arguments: JobArguments) -> Splits | DatasetDict | IterableDatasetDict:
    """
    All splits of the dataset that `arguments` name. A single file has one, `train`.

    Raises:
        [`JobError`]: if it cannot be loaded; the message says what is read, or which line of which file is wrong.
    """
    name = arguments.dataset_name
    path = Path(name).expanduser()
    try:
        if path.is_file():
            return {"train": read_files([path], arguments.dataset_streaming)}
        if path.is_dir():
            return _folder(path, arguments)
        if looks_like_a_file(name):
            raise JobError(
                f"`dataset_name`: there is no file or folder '{name}'. {near_file(path)}Files that are read: "
                f"{FILE_TYPES}."
            )
        return load_dataset(name, name=arguments.dataset_config, streaming=arguments.dataset_streaming)
    except JobError:
        raise
    except ValueError as error:
        if path.exists():
            raise JobError(f"Dataset '{name}' cannot be loaded: {error}") from error
        raise _not_loaded(name, error) from error
    except Exception as error:
        raise _not_loaded(name, error) from error


def _not_loaded(name: str, error: Exception) -> JobError:
    here = Path(name).expanduser().exists()
    where = "" if here else "there is no such file or folder here, and of the Hub: "
    return JobError(
        f"Dataset '{name}' cannot be loaded: {where}{cause_of(error)}. Give a Hub id that is reachable, a local "
        f"folder, or a file: {FILE_TYPES}."
    )


def _folder(path: Path, arguments: JobArguments) -> Splits | DatasetDict | IterableDatasetDict:
    if (path / "dataset_dict.json").exists():
        return DatasetDict.load_from_disk(str(path))
    if (path / "state.json").exists():
        return {"train": Dataset.load_from_disk(str(path))}
    # A card may say which files make which split
    card = path / "README.md"
    described = (
        card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    )
    try:
        files = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except EmptyDatasetError:
        files = {}
    ours = {split: [file for file in map(Path, names) if file_type(file)] for split, names in files.items()}
    ours = {split: sorted(names) for split, names in ours.items() if names}
    if not files or (not ours and all(Path(name).suffix == ".txt" for names in files.values() for name in names)):
        raise JobError(f"`dataset_name`: folder '{path}' holds no files that are read; those are {FILE_TYPES}.")
    if described or not ours or arguments.dataset_config is not None:
        return load_dataset(str(path), name=arguments.dataset_config, streaming=arguments.dataset_streaming)
    return {split: read_files(names, arguments.dataset_streaming) for split, names in ours.items()}
