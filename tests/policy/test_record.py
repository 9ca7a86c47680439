"""The records that stages pass on: their contract, and that nothing is lost on the way through TRL's batch."""

import dataclasses

import pytest
import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from papertrl.trainers.policy.record import Generation, RolloutRecord, ScoredBatch, Source


def scored(**changes):
    fields = {
        "rewards": torch.tensor([[1.0, 0.0], [torch.nan, 2.0], [0.5, torch.nan], [0.0, 0.0]]),
        "source_names": ["a", "b"],
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "prompt_indices": torch.full((4,), -1),
        "lengths": torch.tensor([3, 2, 1, 3]),
        "truncated": torch.tensor([True, False, False, True]),
        "usable": torch.ones(4, dtype=torch.bool),
        "local": slice(2, 4),
        "sampled_rewards": torch.zeros(4, 2),
        "raw_rewards": torch.zeros(4, 2),
        "source": torch.full((4,), Source.POLICY),
        "off_prompt": torch.zeros(4, dtype=torch.bool),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
    }
    return ScoredBatch(**(fields | changes))


def output(**extra):
    """What TRL returns for the two rows of the second of two ranks."""
    return {
        "prompt_ids": torch.tensor([[0, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[0, 1], [1, 1]]),
        "completion_ids": torch.tensor([[8, 0, 0], [9, 10, 11]]),
        "completion_mask": torch.tensor([[1, 0, 0], [1, 1, 1]]),
        "advantages": torch.tensor([9.0, 9.0]),
        "num_items_in_batch": torch.tensor(7),
        **extra,
    }


def test_a_record_takes_its_own_rows_of_the_batch():
    record = RolloutRecord.from_generation(output(), scored())
    assert record.advantages.tolist() == [0.0, 0.0]
    assert record.group_ids.tolist() == [1, 1]
    assert record.lengths.tolist() == [1, 3] and record.truncated.tolist() == [False, True]
    assert record.source.tolist() == [Source.POLICY] * 2
    assert record.num_rows_in_batch == 4
    assert record.row_weight.tolist() == [1.0, 1.0]
    record.validate(values=True)


def test_the_loss_mask_is_a_mask_of_its_own():
    record = RolloutRecord.from_generation(output(), scored())
    record.loss_mask[1, 0] = 0
    assert record.completion_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    tools = torch.tensor([[1, 1, 1], [1, 0, 1]])
    record = RolloutRecord.from_generation(output(tool_mask=tools), scored())
    assert record.loss_mask.tolist() == [[1, 0, 0], [1, 0, 1]]


def test_round_trip_through_the_flat_batch():
    record = RolloutRecord.from_generation(output(old_per_token_logps=torch.randn(2, 3)), scored())
    record.statistics["x/values"] = torch.randn(2, 3)
    record.multimodal["num_images"] = [1, 0]
    again = RolloutRecord.from_batch(record.as_batch())
    for field in dataclasses.fields(record):
        before, after = getattr(record, field.name), getattr(again, field.name)
        if isinstance(before, torch.Tensor):
            torch.testing.assert_close(after, before, equal_nan=True)
        elif field.name == "statistics":
            assert before.keys() == after.keys() and torch.equal(before["x/values"], after["x/values"])
        else:
            assert before == after


def test_rows_stay_whole_through_shuffle_and_split():
    record = RolloutRecord.from_generation(output(), scored())
    record.advantages = torch.tensor([0.5, -0.5])
    record.statistics["x/first"] = record.completion_ids[:, 0].float()
    record.row_weight = torch.tensor([0.25, 0.75])
    torch.manual_seed(3)
    seen = {}
    for part in split_tensor_dict(shuffle_sequence_dict(record.as_batch()), 2):
        small = RolloutRecord.from_batch(part)
        small.validate(values=True)
        assert small.num_rows_in_batch == 4 and small.num_items_in_batch == 7
        assert small.statistics["x/first"].item() == small.completion_ids[0, 0]
        seen[small.lengths.item()] = (small.row_weight.item(), small.advantages.item(), small.loss_mask.sum().item())
    assert seen == {1: (0.25, 0.5, 1), 3: (0.75, -0.5, 3)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_mask", torch.ones(2, 2), r"`loss_mask` has shape \(2, 2\), expected \(2, 3\)"),
        ("advantages", torch.ones(2, 1), r"`advantages` has shape \(2, 1\), expected \(2,\) or \(2, 3\)"),
        ("row_weight", torch.ones(3), r"`row_weight` has shape \(3,\)"),
        ("row_weight", torch.ones(2, requires_grad=True), "`row_weight` carries gradient"),
        ("old_per_token_logps", torch.ones(2, 4), "`old_per_token_logps` has shape"),
        ("statistics", {"m/x": torch.ones(3)}, r"`statistics\['m/x'\]` has shape \(3,\)"),
    ],
)
def test_shapes_are_always_checked(name, value, message):
    record = dataclasses.replace(RolloutRecord.from_generation(output(), scored()), **{name: value})
    with pytest.raises(ValueError, match=message):
        record.validate()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss_mask", torch.tensor([[1, 1, 0], [1, 1, 1]]), "`loss_mask` is 1 where `completion_mask` is 0"),
        ("advantages", torch.tensor([torch.nan, 0.0]), "`advantages` has values that are not finite"),
        ("row_weight", torch.tensor([-1.0, 1.0]), "`row_weight` has negative values"),
        ("num_items_in_batch", torch.tensor(torch.inf), "`num_items_in_batch` has values that are not finite"),
    ],
)
def test_values_are_checked_on_demand(name, value, message):
    record = dataclasses.replace(RolloutRecord.from_generation(output(), scored()), **{name: value})
    record.validate()
    with pytest.raises(ValueError, match=message):
        record.validate(values=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rewards", torch.ones(4)),
        ("lengths", torch.ones(3)),
        ("advantages", torch.ones(4, 2)),
        ("usable", torch.ones(5)),
    ],
)
def test_scored_batches_are_checked(name, value):
    scored().validate()
    with pytest.raises(ValueError, match=f"`{name}` has shape"):
        scored(**{name: value}).validate()


@pytest.mark.parametrize("optional", [True, False])
def test_generations_travel_as_rows(optional):
    generation = Generation(
        inputs=[{"prompt": "a", "x": 1}, {"prompt": "b", "x": 2}],
        prompts=["a", "b"],
        prompt_ids=[[1], [2, 3]],
        completion_ids=[[4, 5], [6]],
        tool_mask=[[1, 0], [1]] if optional else None,
        completions=["cd", "e"],
        sampling_logps=[[-0.5, -1.0], [-2.0]] if optional else None,
        extra_fields={},
        images=None,
        tool_images=[],
        log_extra={"note": ["first", "second"]} if optional else {},
    )
    assert Generation.from_rows(generation.rows()) == generation
    swapped = Generation.from_rows(generation.rows()[::-1])
    assert swapped.prompts == ["b", "a"] and swapped.inputs[0]["x"] == 2


def test_rows_of_rounds_that_logged_different_columns_combine():
    def one(name, log_extra):
        lists = {"prompts": [name], "prompt_ids": [[1]], "completion_ids": [[2]], "completions": [name]}
        return Generation(
            inputs=[{"prompt": name}], tool_mask=None, sampling_logps=None, extra_fields={}, images=None,
            tool_images=[], log_extra=log_extra, **lists,
        )  # fmt: skip

    merged = Generation.from_rows(one("a", {}).rows() + one("b", {"note": ["x"]}).rows())
    assert merged.log_extra == {"note": [None, "x"]}


def test_extra_fields_of_a_rollout_join_the_dataset_rows():
    generated = ([[1], [2]], [[3], [4]], None, ["c", "d"], None, {"score": [7, 8], "who": "env"}, None, [])
    generation = Generation.from_trl([{"prompt": "a"}, {"prompt": "b"}], ["a", "b"], generated)
    assert generation.inputs == [{"prompt": "a", "score": 7, "who": "env"}, {"prompt": "b", "score": 8, "who": "env"}]
    assert generation.as_trl() == generated
