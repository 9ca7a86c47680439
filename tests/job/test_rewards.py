import asyncio
import functools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from papertrl.rewards import RewardError, call_rewards, checked, exact_match, last_number_match, load_reward
from papertrl.rewards.checked import reward_name

COMPLETIONS = ["1", "2", "3"]


def returning(value):
    def some_reward(completions, **kwargs):
        return value

    return checked(some_reward)


@pytest.mark.parametrize(
    "value",
    [[1, 0.5, None], (1, 0.5, None), np.array([1, 0.5, 2]), torch.tensor([1.0, 0.5, 2]), [True, False, np.float32(1)]],
)
def test_numbers_and_none_pass(value):
    rewards = returning(value)(completions=COMPLETIONS)
    assert rewards == [None if v is None else float(v) for v in value]


@pytest.mark.parametrize(
    "value, parts",
    [
        ([1.0, 2.0], ["2 rewards for 3 completions"]),
        ([1.0, float("nan"), 1.0], ["nan", "row 1", "'2'"]),
        ([1.0, 1.0, float("inf")], ["inf", "row 2"]),
        (["1", "2", "3"], ["'1'", "`str`", "row 0"]),
        ([1.0, [2.0], 1.0], ["row 1", "`list`"]),
        (0.5, ["0.5", "`float`", "list"]),
        ("123", ["`str`", "list"]),
        (None, ["`NoneType`"]),
    ],
)
def test_anything_else_is_named(value, parts):
    with pytest.raises(RewardError) as error:
        returning(value)(completions=COMPLETIONS)
    for part in ["some_reward", *parts]:
        assert part in str(error.value)


def test_a_raising_function_is_named():
    def broken(completions, **kwargs):
        return completions[99]

    with pytest.raises(RewardError, match="'broken' raised IndexError: list index out of range"):
        checked(broken)(completions=COMPLETIONS)


def test_coroutine_functions_are_checked():
    async def slow(completions, **kwargs):
        return [float("nan")] * len(completions)

    with pytest.raises(RewardError, match="'slow' returned nan"):
        asyncio.run(checked(slow)(completions=COMPLETIONS))


class Sync:
    def __call__(self, completions, bonus=0.0, **kwargs):
        if completions == ["exit"]:
            sys.exit(3)
        return [len(c) + bonus for c in completions]

    def method(self, completions, **kwargs):
        return self(completions)


class Async(Sync):
    async def __call__(self, completions, bonus=0.0, **kwargs):
        await asyncio.sleep(0)
        return Sync.__call__(self, completions, bonus)

    async def method(self, completions, **kwargs):
        return await self(completions)


async def coroutine(completions, **kwargs):
    return await Async()(completions)


FORMS = {
    "Sync": Sync(),
    "Async": Async(),
    "method": Sync().method,
    "coroutine": coroutine,
    "Async of a partial": functools.partial(Async(), bonus=0.0),
    "coroutine of partials": functools.partial(functools.partial(coroutine)),
    "method of an asynchronous object": Async().method,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [checked, lambda function: function])
def test_all_forms_are_called_alike_also_inside_of_an_event_loop(form, wrap):
    async def in_a_notebook(completions):
        # The last one shows that one client of two rewards has one loop
        rewards = [wrap(FORMS[form]), checked(exact_match), Async()]
        return call_rewards(rewards, [""] * 2, completions, [[1]] * 2, {"answer": ["a", "b"], "prompt": []}, None)

    assert asyncio.run(in_a_notebook(["a", "bcd"])) == [[1.0, 3.0], [1.0, 0.0], [1.0, 3.0]]
    name = form.split()[0]
    assert reward_name(wrap(FORMS[form])) == name
    with pytest.raises(RewardError, match=f"'{name}' raised SystemExit: 3"):
        call_rewards([wrap(FORMS[form])], [""], ["exit"], [[1]], {}, None)


def test_asynchronous_rewards_keep_their_client_whoever_calls():
    """A client that is opened in one call is used in the next, in training or not: it belongs to one event loop."""
    loops = []

    async def asks(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    asyncio.run(checked(asks)(completions=[""]))
    call_rewards([asks], [""], [""], [[1]], {}, None)
    call_rewards([checked(asks)], [""], [""], [[1]], {}, None)
    assert len(set(loops)) == 1


def test_a_reward_that_never_applies_is_told_of_once(caplog):
    reward = returning([None] * 3)
    assert [reward(completions=COMPLETIONS), reward(completions=COMPLETIONS)] == [[None] * 3] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "Reward function 'some_reward' returned `None` for all 3 completions of its first call: it applies to none of "
        "them."
    ]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_reward_that_exits_ends_no_trainer(kind, policy_path, tmp_path):
    from papertrl import PolicyConfig, PolicyTrainer

    from ..harness.table import dataset, settings

    names = {"sys": sys}
    exec(f"{kind} leaves(completions, **kwargs):\n    sys.exit(5)", names)
    args = PolicyConfig(**settings("policy", tmp_path))
    trainer = PolicyTrainer(policy_path, names["leaves"], args, train_dataset=dataset("policy"))
    with pytest.raises(RewardError, match="'leaves' raised SystemExit: 5"):
        trainer.train()
    assert trainer.reward_funcs == [names["leaves"]]


def test_the_wrapper_keeps_name_and_parameters():
    import inspect

    assert checked(exact_match).__name__ == "exact_match"
    assert inspect.signature(checked(exact_match)) == inspect.signature(exact_match)


@given(st.integers(-(10**6), 10**6), st.text(alphabet="abc .!", max_size=8))
def test_last_number(number, words):
    messages = [[{"role": "assistant", "content": f"first 5, then{words} {number:,}{words}"}]]
    assert last_number_match(messages, answer=[str(number)]) == [1.0]
    assert last_number_match(messages, answer=[str(number + 1)]) == [0.0]


def test_last_number_without_a_number():
    assert last_number_match(["none", ""], answer=["0", "0"]) == [0.0, 0.0]


def test_rewards_by_name(monkeypatch, tmp_path):
    assert load_reward("exact_match", 10) is exact_match
    assert load_reward("accuracy_reward", 10).__name__ == "accuracy_reward"
    overlong = load_reward("get_soft_overlong_punishment", 10)
    assert overlong(completion_ids=[[0] * 8, [0] * 11]) == [0, -1]
    (tmp_path / "my_own_rewards.py").write_text(
        "def half(completions, **kwargs):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_reward("my_own_rewards.half", 10)(["a"]) == [0.5]
    for name, part in [
        ("exact_mach", "Did you mean 'exact_match'"),
        ("no_such_module.f", "cannot be imported"),
        ("my_own_rewards.nothing", "cannot be imported"),
        ("math.pi", "is a float"),
        ("fractions.Fraction", "is a class"),
    ]:
        with pytest.raises(ValueError, match=part):
            load_reward(name, 10)
