import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papertrl.tasks import AdditionTask, load_task
from papertrl.tasks.addition import slip, split_of, without_carry


def operands(prompt):
    return [int(part) for part in prompt.removesuffix("=").split("+")]


def test_addition_is_right_and_reproducible():
    task = AdditionTask(digits=2)
    problems = task.generate(200, seed=3)
    for row in problems:
        a, b = row["prompt"].removesuffix("=").split("+")
        assert row["answer"] == str(int(a) + int(b)).zfill(3) != row["wrong_answer"]
        assert len(a) == len(b) == 2 and len(row["wrong_answer"]) == 3
    assert problems.to_list() == task.generate(200, seed=3).to_list()
    assert problems.to_list() != task.generate(200, seed=4).to_list()


@pytest.mark.parametrize("digits", [1, 2, 4])
def test_splits_share_no_prompt_in_either_order(digits):
    train, test = AdditionTask(digits).splits(500, 60, seed=0)

    def pairs(dataset):
        return {tuple(sorted(map(int, prompt.removesuffix("=").split("+")))) for prompt in dataset["prompt"]}

    assert pairs(train).isdisjoint(pairs(test))
    assert len(test) == 60


@given(st.integers(0, 999), st.integers(0, 999))
def test_split_ignores_order(a, b):
    assert split_of(a, b) == split_of(b, a)


@given(st.integers(0, 9999), st.integers(0, 9999))
def test_slip_forgets_carries(a, b):
    columns = "".join(str((int(p) + int(q)) % 10) for p, q in zip(f"{a:05d}", f"{b:05d}", strict=True))
    assert without_carry(a, b) == int(columns)
    assert slip(a, b, random.Random(0)) != a + b


def test_demonstrations_err_as_often_as_asked():
    task = AdditionTask()
    assert list(task.demonstrations(300, 0, 0.0)["completion"]) == list(task.generate(300, 0)["answer"])
    for row in task.demonstrations(100, 0, 1.0):
        assert int(row["completion"]) == without_carry(*operands(row["prompt"]))
    rows = list(task.demonstrations(4000, 0, 0.6))
    carried = [row for row in rows if without_carry(*operands(row["prompt"])) != sum(operands(row["prompt"]))]
    wrong = sum(int(row["completion"]) != sum(operands(row["prompt"])) for row in carried)
    assert 0.56 < wrong / len(carried) < 0.64


def test_views_have_the_columns_of_their_family():
    task = AdditionTask()
    problems = task.generate(20, seed=0)
    assert task.supervised(problems).column_names == ["prompt", "completion"]
    assert task.preference(problems).column_names == ["prompt", "chosen", "rejected"]
    assert task.preference(problems)["chosen"] == problems["answer"]


def test_verifier_accepts_exactly_the_answers():
    task = AdditionTask()
    problems = task.generate(50, seed=0)
    columns = {"answer": problems["answer"]}
    assert task.reward(completions=problems["answer"], **columns) == [1.0] * 50
    assert task.reward(completions=problems["wrong_answer"], **columns) == [0.0] * 50


@pytest.mark.parametrize(
    "name, kwargs, part",
    [
        ("additon", {}, "Did you mean 'addition'"),
        ("addition", {"digits": 0}, r"`digits` must be in \[1, 9\], got 0"),
        ("addition", {"figits": 2}, "does not accept the settings"),
    ],
)
def test_unknown_tasks_and_settings_are_refused(name, kwargs, part):
    with pytest.raises(ValueError, match=part):
        load_task(name, **kwargs)


def test_a_task_with_too_few_problems_is_refused():
    class OneProblem(AdditionTask):
        def generate(self, n, seed, split="train"):
            return super().generate(1, 0, "train")

    with pytest.raises(ValueError, match="leave no other problem"):
        OneProblem().splits(10, 10, 0)


def test_reasoning_gym_task():
    pytest.importorskip("reasoning_gym")
    task = load_task("reasoning_gym:chain_sum", min_terms=2, max_terms=2)
    train, test = task.splits(40, 20, seed=1)
    assert set(train["prompt"]).isdisjoint(test["prompt"])
    columns = {name: train[name] for name in train.column_names if name != "prompt"}
    assert task.reward(completions=train["answer"], **columns) == [1.0] * 40
    tagged = [[{"role": "assistant", "content": f"I think <answer>{a}</answer>"}] for a in train["answer"]]
    assert task.reward(completions=tagged, **columns) == [1.0] * 40
    assert max(task.reward(completions=["no idea"] * 40, **columns)) < 1.0
    with pytest.raises(ValueError, match="Did you mean chain_sum"):
        load_task("reasoning_gym:chain_sums")
    with pytest.raises(ValueError, match="no wrong answers"):
        task.preference(train)


def test_reasoning_gym_missing_names_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match="`pip install reasoning-gym`"):
        load_task("reasoning_gym:chain_sum")
