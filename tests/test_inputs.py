"""What trainers refuse before they train: rows of which nothing can be learned, and too few of them."""

import pytest
from datasets import Dataset, IterableDataset

from papertrl import (
    PolicyConfig,
    PolicyTrainer,
    PreferenceConfig,
    PreferenceTrainer,
    RewardModelConfig,
    RewardModelTrainer,
    SupervisedConfig,
    SupervisedTrainer,
)
from papertrl.core.errors import JobError
from papertrl.core.family import FAMILIES
from papertrl.data import check_prompts, to_format
from papertrl.job.arguments import JobArguments
from papertrl.job.data import dataset_data
from papertrl.rewards import exact_match

QUIET = {"report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "use_cpu": True}
QUIET |= {"save_strategy": "no", "max_steps": 1}
ASK = {"role": "user", "content": "1+1="}


def policy(path, tmp_path, rows, **options):
    args = PolicyConfig(str(tmp_path), **QUIET, **options)
    return PolicyTrainer(path, lambda completions, **kwargs: [0.0] * len(completions), args, train_dataset=rows)


@pytest.mark.parametrize(
    "prompt, part",
    [
        (None, "is missing"),
        (" \n", "is empty"),
        ([], "is empty"),
        ([{"role": "user", "content": None}], "message 0, of the user, has no content"),
        ([ASK, {"role": "narrator", "content": "a"}], "message 1 has the role 'narrator'"),
        ([{"role": "system", "content": "a"}], "ends with a message of the system"),
        ([{"role": "user", "content": " "}], "is empty"),
    ],
)
def test_prompts_that_nobody_can_answer(prompt, part, tmp_path, tiny_path):
    good = [ASK] if isinstance(prompt, list) else "1+1="
    rows = Dataset.from_list([{"prompt": good}, {"prompt": prompt}])
    with pytest.raises(ValueError, match=f"`train_dataset`: Row 1 .*`prompt`: .*{part}"):
        policy(tiny_path, tmp_path, rows)
    rows.to_json(tmp_path / "rows.jsonl")
    with pytest.raises(JobError, match=f"split 'train': Row 1 .*`prompt`: .*{part}"):
        dataset_data(FAMILIES["policy"], JobArguments(dataset_name=str(tmp_path / "rows.jsonl")), [exact_match])
    streamed = check_prompts(IterableDataset.from_generator(lambda: iter(rows)))
    with pytest.raises(ValueError, match="Row 1"):
        list(streamed)


@pytest.mark.parametrize(
    "row, part",
    [
        ({"text": None}, "`text`: is missing"),
        ({"prompt": "a", "completion": ""}, "`completion`: is empty"),
        ({"prompt": [ASK], "completion": "2"}, "`completion`: is text, but the prompt is messages"),
        ({"messages": [{"role": "user", "content": None}]}, "`messages`: message 0, of the user, has no content"),
    ],
)
def test_texts_that_teach_nothing(row, part, tmp_path, tiny_path):
    args = SupervisedConfig(str(tmp_path), **QUIET)
    with pytest.raises(ValueError, match=f"`train_dataset`: Row 0 .*{part}"):
        SupervisedTrainer(tiny_path, args, train_dataset=Dataset.from_list([row]))


@pytest.mark.parametrize("column", ["question", "Instruction", "query"])
def test_questions_beside_pairs_are_asked_about(column, tmp_path, tiny_path):
    rows = Dataset.from_list([{column: "1+1=", "chosen": "2", "rejected": "3"}])
    with pytest.raises(ValueError, match=f"Column `{column}` would not be read.*Rename it"):
        to_format(rows, ("pairs",))
    with pytest.raises(ValueError, match=f"Column `{column}` would not be read"):
        PreferenceTrainer(tiny_path, args=PreferenceConfig(str(tmp_path), **QUIET), train_dataset=rows)
    whole = Dataset.from_list([{column: "1+1=", "chosen": "1+1=2", "rejected": "1+1=3"}])
    assert to_format(whole, ("pairs",)).to_list() == whole.to_list()


def test_text_prompts_beside_conversations():
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    whole = {side: [ASK, *messages] for side, messages in answers.items()}
    for sides in (answers, whole):
        found = to_format(Dataset.from_list([{"prompt": "1+1=", **sides}]), ("pairs",))
        assert found.to_list() == [{"prompt": [ASK], **answers}]
    with pytest.raises(ValueError, match=r"Row 0 .*Drop the column `prompt`"):
        to_format(Dataset.from_list([{"prompt": "another", **whole}]), ("pairs",))


# --- How many ---------------------------------------------------------------------------------------------------


def test_fewer_prompts_than_an_update_needs(tmp_path, tiny_path):
    options = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    trainer = policy(tiny_path, tmp_path, Dataset.from_dict({"prompt": ["1+1="]}), **options)
    with pytest.raises(ValueError, match=r"`train_dataset` has 1 rows, but an update takes 2 .*`num_generations` 2"):
        trainer.train()
    stream = IterableDataset.from_generator(lambda: iter([]))
    trainer.train_dataset = stream
    trainer.check_number_of_rows()


def test_fewer_rows_than_a_full_batch(tmp_path, tiny_path):
    args = SupervisedConfig(str(tmp_path), **QUIET, per_device_train_batch_size=4, dataloader_drop_last=True)
    trainer = SupervisedTrainer(tiny_path, args, train_dataset=Dataset.from_dict({"text": ["1+1=2"] * 3}))
    with pytest.raises(ValueError, match=r"has 3 rows, but an update takes 4 .*`dataloader_drop_last`"):
        trainer.train()
    args.dataloader_drop_last = False
    trainer.check_number_of_rows()


@pytest.mark.parametrize("family", ["preference", "supervised", "reward"])
def test_nothing_left_within_the_longest_length(family, tmp_path, tiny_path):
    trainers = {
        "preference": (PreferenceTrainer, PreferenceConfig),
        "supervised": (SupervisedTrainer, SupervisedConfig),
        "reward": (RewardModelTrainer, RewardModelConfig),
    }
    cls, config = trainers[family]
    row = {"prompt": "1+1+1+1+1=", "completion": "5"}
    if family != "supervised":
        row = {"prompt": row["prompt"], "chosen": "5", "rejected": "4"}
    args = config(str(tmp_path), **QUIET, max_length=6)
    with pytest.raises(ValueError, match="`max_length` is 6, and none of the 2 rows of the train dataset"):
        cls(tiny_path, args=args, train_dataset=Dataset.from_list([row] * 2))
