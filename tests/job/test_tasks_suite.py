"""Every task of the suite keeps the promises that trainers and claims build on."""

import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from papertrl.commands.train import USAGE
from papertrl.job.arguments import JobArguments
from papertrl.models.tiny import tiny_tokenizer
from papertrl.tasks import (
    _TASKS,
    AdditionTask,
    AutomatonTask,
    CountdownTask,
    MarkerTask,
    MixtureTask,
    RewriteTask,
    SortingTask,
    ToolCallTask,
    load_task,
)
from papertrl.tasks.addition import workings
from papertrl.tasks.countdown import evaluate
from papertrl.tasks.rewrite import overlap, style
from papertrl.tasks.sorting import bubble_sorted

HARDEST = {
    "addition": {"digits": 9, "min_digits": 1},
    "automaton": {"states": 10, "length": 20, "min_length": 2},
    "countdown": {"numbers": 4, "largest": 99},
    "marker": {"letters": 12, "max_length": 20},
    "mixture": {"weights": {"addition": 1, "sorting": 1, "automaton": 1, "countdown": 2}, "easy_share": 0.2},
    "rewrite": {"length": 12, "letters": 13},
    "sorting": {"length": 20, "alphabet": "letters"},
    "tool_call": {"tools": 6, "arguments": 3},
}
SETTINGS = [(name, kwargs) for name in _TASKS for kwargs in ({}, HARDEST[name])]


def scores(task, problems, completions):
    columns = {name: list(problems[name]) for name in problems.column_names if name != "prompt"}
    return task.reward(prompts=list(problems["prompt"]), completions=completions, **columns)


@pytest.mark.parametrize("name, kwargs", SETTINGS)
def test_verifier_accepts_every_answer_and_rejects_every_wrong_one(name, kwargs):
    task = load_task(name, **kwargs)
    problems = task.generate(300, seed=3)
    assert scores(task, problems, list(problems["answer"])) == [1.0] * 300
    assert scores(task, problems, list(problems["wrong_answer"])) == [0.0] * 300
    messages = [[{"role": "assistant", "content": answer}] for answer in problems["answer"]]
    assert scores(task, problems, messages) == [1.0] * 300


@pytest.mark.parametrize("name, kwargs", SETTINGS)
def test_seeds_reproduce_and_splits_are_disjoint(name, kwargs):
    task = load_task(name, **kwargs)
    again = load_task(name, **kwargs)
    assert task.generate(100, 3).to_list() == again.generate(100, 3).to_list() != task.generate(100, 4).to_list()
    assert task.demonstrations(50, 3, 0.5).to_list() == again.demonstrations(50, 3, 0.5).to_list()
    train, test = task.splits(600, 100, seed=0)
    assert set(train["prompt"]).isdisjoint(test["prompt"]) and len(test) == 100
    # Not by removing what they share: other seeds' prompts are apart as well
    assert set(task.generate(600, 9)["prompt"]).isdisjoint(test["prompt"])


@pytest.mark.parametrize("name, kwargs", SETTINGS)
def test_texts_fit_the_tiny_model(name, kwargs):
    task = load_task(name, **kwargs)
    tokenizer = tiny_tokenizer()
    problems = task.generate(200, seed=0)
    demonstrations = task.demonstrations(200, 0, 0.5)
    answers = [*problems["answer"], *problems["wrong_answer"], *demonstrations["completion"]]
    for text in (*problems["prompt"], *answers):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids and len(ids) == len(text) <= 24
    # With the end of sequence
    assert max(map(len, answers)) < task.max_new_tokens


@pytest.mark.parametrize("name", _TASKS)
def test_demonstrations_are_right_or_make_the_typical_error(name):
    task = load_task(name)
    problems = task.generate(400, 0)

    def mean(error_share):
        demonstrations = task.demonstrations(400, 0, error_share)
        assert demonstrations["prompt"] == problems["prompt"]
        return sum(scores(task, problems, list(demonstrations["completion"]))) / 400

    right, mixed, wrong = mean(0.0), mean(0.6), mean(1.0)
    # The marker's demonstrations are long and rewrites have few marks, which costs
    assert right == 1.0 or (name in ("marker", "rewrite") and 0.75 < right < 1.0)
    assert right - 0.15 > mixed > wrong + 0.05
    with pytest.raises(ValueError, match=r"`error_share` must be in \[0, 1\], got 1.5"):
        task.demonstrations(3, 0, 1.5)


@pytest.mark.parametrize("name", _TASKS)
def test_supervised_labels_err_as_often_as_asked(name):
    task = load_task(name)
    problems = task.generate(1000, 0)
    assert task.supervised(problems)["completion"] == problems["answer"]
    assert task.supervised(problems, error_share=1.0)["completion"] == problems["wrong_answer"]
    noisy = task.supervised(problems, error_share=0.3, seed=1)
    assert 0.25 < 1 - sum(scores(task, problems, list(noisy["completion"]))) / 1000 < 0.35
    assert (
        noisy.to_list() == task.supervised(problems, 0.3, 1).to_list() != task.supervised(problems, 0.3, 2).to_list()
    )


TASKS = {name: load_task(name) for name in _TASKS}
PROBLEMS = {name: task.generate(1, 0) for name, task in TASKS.items()}
garbage = st.text(max_size=80) | st.text("0123456789+-*/() =,;:abcnx", max_size=80) | st.just("(" * 60) | st.just("")


@pytest.mark.parametrize("name", _TASKS)
@given(text=garbage)
@settings(max_examples=150, deadline=None)
def test_verifier_survives_garbage(name, text):
    (score,) = scores(TASKS[name], PROBLEMS[name], [text])
    assert -4 < score <= 1


BAD = [
    ("addition", {"digits": 2.0}, r"`digits` must be in \[1, 9\] and whole, got 2.0"),
    ("addition", {"digits": "2"}, r"`digits` must be in \[1, 9\], got '2'"),
    ("addition", {"digits": 2, "min_digits": 3}, r"`min_digits` must be in \[1, 2\], got 3"),
    ("addition", {"workings_share": 1.5}, r"`workings_share` must be in \[0, 1\], got 1.5"),
    ("addition", {"hint_share": -0.1}, r"`hint_share` must be in \[0, 1\], got -0.1"),
    ("addition", {"feedback_share": 2}, r"`feedback_share` must be in \[0, 1\], got 2"),
    ("addition", {"workings_error_share": float("nan")}, "`workings_error_share` must be"),
    ("automaton", {"states": 2}, r"`states` must be in \[3, 10\], got 2"),
    ("automaton", {"length": 21}, r"`length` must be in \[2, 20\], got 21"),
    ("automaton", {"min_length": 7}, r"`min_length` must be in \[2, 6\], got 7"),
    ("countdown", {"numbers": 5}, r"`numbers` must be in \[2, 4\], got 5"),
    ("countdown", {"largest": 1}, r"`largest` must be in \[2, 99\], got 1"),
    ("marker", {"letters": 13}, r"`letters` must be in \[4, 12\], got 13"),
    ("marker", {"free_length": 13}, r"`free_length` must be in \[3, 12\], got 13"),
    ("marker", {"train_on": "both"}, "`train_on` must be 'true' or 'proxy', got 'both'"),
    ("marker", {"longer_share": -0.1}, r"`longer_share` must be in \[0, 1\], got -0.1"),
    ("marker", {"covered": 9}, r"`covered` must be in \[1, 8\], got 9"),
    ("mixture", {"weights": {"chess": 1}}, "`weights` must map domains, of addition, .*got {'chess': 1}"),
    ("mixture", {"weights": {"sorting": 0}}, "not all 0"),
    ("mixture", {"weights": {"sorting": "1"}}, "got {'sorting': '1'}"),
    ("mixture", {"easy_share": True}, "`easy_share` must be in"),
    ("rewrite", {"letters": 6}, r"`letters` must be in \[7, 26\], got 6"),
    ("rewrite", {"drift_share": 2}, r"`drift_share` must be in \[0, 1\], got 2"),
    ("sorting", {"length": 2}, r"`length` must be in \[3, 20\], got 2"),
    ("sorting", {"alphabet": "runes"}, "`alphabet` must be 'digits' or 'letters', got 'runes'"),
    ("tool_call", {"tools": 1}, r"`tools` must be in \[2, 6\], got 1"),
    ("tool_call", {"arguments": 4}, r"`arguments` must be in \[1, 3\], got 4"),
]


@pytest.mark.parametrize("name, kwargs, part", BAD)
def test_bad_knobs_are_refused(name, kwargs, part):
    with pytest.raises(ValueError, match=f"Task '{name}': .*{part}|{part}"):
        load_task(name, **kwargs)


def test_every_task_is_documented():
    page = (Path(__file__).parents[2] / "docs/tasks.md").read_text()
    help = JobArguments.__dataclass_fields__["task"].metadata["help"]
    for name, task in _TASKS.items():
        assert f"| `{name}` |" in page and f"`{name}`" in help and f"`{name}`" in USAGE
        assert TASKS[name].instruction and task.__doc__


def test_examples_of_the_page_are_right():
    rows = [line for line in (Path(__file__).parents[2] / "docs/tasks.md").read_text().splitlines() if "→" in line]
    examples = {row.split("`")[1]: row.split("|")[2].replace("`", "").split(" → ") for row in rows if "| `" in row}
    assert set(examples) == set(_TASKS) - {"mixture"}
    for name, (prompt, answer) in examples.items():
        prompt, answer = prompt.strip(), answer.strip()
        if name == "marker":
            assert TASKS[name].true_reward([prompt], [answer]) == [1.0]
        elif name == "automaton":
            state, _, moves = prompt.removesuffix("=").partition(":")
            assert "".join(map(str, TASKS[name].walk(int(state), moves))) == answer
        else:
            right = {
                "addition": lambda p: f"{sum(map(int, p[:-1].split('+'))):03}",
                "rewrite": lambda p: p[:-1] + "!*+",
                "sorting": lambda p: "".join(sorted(p[:-1])),
                "countdown": lambda p: "3*5+7" if evaluate("3*5+7") == int(p[:-1].split(">")[1]) else "",
                "tool_call": lambda p: "drop(x=fig,n=37)",
            }[name](prompt)
            assert TASKS[name].score(answer, right) == 1.0


# Addition


def test_addition_mixes_widths_evenly_in_both_splits():
    task = AdditionTask(digits=3, min_digits=1)
    for split in ("train", "test"):
        problems = task.generate(3000, 0, split)
        counts = Counter(problems["difficulty"])
        assert set(counts) == {1, 2, 3} and all(900 < count < 1100 for count in counts.values())
        for row in problems.select(range(100)):
            assert len(row["prompt"]) == 2 * row["difficulty"] + 2 and len(row["answer"]) == row["difficulty"] + 1
    assert "difficulty" not in AdditionTask().generate(1, 0).column_names


def test_workings_are_the_columns_sums():
    assert workings("47", "85") == "12,13" and workings("47", "85", carries=False) == "12,12"
    task = AdditionTask(digits=2, workings_share=0.3, workings_error_share=0.2)
    problems = task.generate(4000, 0)
    texts = list(task.demonstrations(4000, 0, 0.6)["completion"])
    assert max(map(len, texts)) == task.max_new_tokens - 1
    right = scores(task, problems, texts)
    carried = [
        a != w for a, w in zip(problems["answer"], task.demonstrations(4000, 0, 1.0)["completion"], strict=True)
    ]
    assert sum(carried) > 0
    shares = {}
    for works in (True, False):
        rows = [
            (r, text)
            for r, text, p in zip(right, texts, problems["prompt"], strict=True)
            if (";" in text) == works and any(int(x) + int(y) > 9 for x, y in zip(p[1:2], p[4:5], strict=True))
        ]
        shares[works] = sum(r for r, _ in rows) / len(rows)
    assert 0.27 < sum(";" in text for text in texts) / 4000 < 0.33
    assert 0.75 < shares[True] < 0.85 and 0.35 < shares[False] < 0.45
    assert task.reward(completions=["12,13;132", "132", "132;", "12;132;"], answer=["132"] * 4) == [1.0, 1.0, 0.0, 0.0]


# Countdown


@given(st.text("0123456789+-*/() ", max_size=12))
@settings(max_examples=300, deadline=None)
def test_countdown_evaluates_as_python_does(text):
    value = evaluate(text)
    if value is not None:
        assert abs(eval(text) - value) <= 1e-9 * max(1, abs(value))


@pytest.mark.parametrize(
    "text, accepted",
    [
        ("3*5+7", True),
        ("7+5*3", True),
        ("(7+5*3)", True),
        (" 5*3 + 7 ", True),
        ("3*5+7+0", False),
        ("22", False),
        ("3*5+6", False),
        ("3*5+7=22", False),
        ("7--5*3", False),
        ("5**3", False),
        ("7//5", False),
        ("3/(5-5)", False),
        ("(3*5+7", False),
        ("(" * 5000, False),
        ("3(5)", False),
        ("", False),
    ],
)
def test_countdown_accepts_every_expression_that_reaches_the_target(text, accepted):
    assert CountdownTask().score(text, "3*5+7") == float(accepted)


# Sorting


@given(st.text("0123456789", min_size=3, max_size=9))
def test_bubble_sort_ends_sorted(text):
    assert bubble_sorted(text, len(text) - 1) == "".join(sorted(text))
    assert sorted(bubble_sorted(text, 1)) == sorted(text) and bubble_sorted(text, 1)[-1] == max(text)


@pytest.mark.parametrize("alphabet", ["digits", "letters"])
def test_wrong_order_swaps_two_neighbors(alphabet):
    for row in SortingTask(7, alphabet).generate(100, 0):
        differing = [i for i, (x, y) in enumerate(zip(row["answer"], row["wrong_answer"], strict=True)) if x != y]
        assert len(differing) == 2 and differing[1] == differing[0] + 1
        assert sorted(row["wrong_answer"]) == list(row["answer"])


# Automaton


@pytest.mark.parametrize("states", [3, 4, 5, 10])
def test_moves_permute_the_states_and_early_errors_never_heal(states):
    task = AutomatonTask(states, length=8)
    for move in "abc":
        assert sorted(task.step(state, move) for state in range(states)) == list(range(states))
    problems = task.generate(200, 0)
    for row in problems:
        erring = task.typical_error(row, random.Random(0))
        early_c = "c" in row["prompt"].partition(":")[2][:2]
        assert (erring[-1] != row["answer"][-1]) == early_c
        assert len(row["answer"]) == row["difficulty"] == 8
    assert (
        task.reward(completions=[answer[-1] for answer in problems["answer"]], answer=problems["answer"]) == [1] * 200
    )


def test_automaton_mixes_lengths():
    problems = AutomatonTask(length=6, min_length=3).generate(2000, 0)
    assert set(problems["difficulty"]) == {3, 4, 5, 6}
    assert all(len(row["answer"]) == row["difficulty"] for row in problems)


# Mixture


def test_mixture_has_the_asked_shares():
    task = MixtureTask({"addition": 3, "countdown": 1}, easy_share=0.7)
    problems = task.generate(4000, 0)
    domains = Counter(problems["domain"])
    assert set(domains) == {"addition", "countdown"} and 0.72 < domains["addition"] / 4000 < 0.78
    assert 0.67 < problems["difficulty"].count(0) / 4000 < 0.73
    easy = problems.filter(lambda row: row["difficulty"] == 0 and row["domain"] == "addition")
    assert set(map(len, easy["prompt"])) == {4}
    assert set(MixtureTask(easy_share=1).generate(50, 0)["difficulty"]) == {0}
    assert "countdown" not in MixtureTask().generate(200, 0)["domain"]


# Marker


def test_proxy_and_true_reward_part_with_length():
    task = MarkerTask(free_length=4, cost=0.05, proxy_bias=0.1)
    prompts, texts = ["cdab:"] * 4, ["cb", "acbaa" + "a" * 5, "bc", ""]
    assert task.true_reward(prompts, texts) == pytest.approx([1.0, 0.7, 0.0, 0.0])
    assert task.proxy_reward(prompts, texts) == pytest.approx([1.2, 1.7, 0.2, 0.0])
    chat = [[{"role": "user", "content": f"{task.instruction}\ncdab:"}]]
    assert task.true_reward(chat, [[{"role": "assistant", "content": "acb"}]]) == [1.0]
    assert task.reward == task.true_reward
    proxied = MarkerTask(train_on="proxy")
    assert proxied.reward == proxied.proxy_reward and proxied.reward.__name__ == "proxy_reward"


def test_marker_pairs_are_labeled_by_the_reward_trained_on():
    task = MarkerTask(train_on="proxy")
    pairs = task.preference(task.generate(300, 0))
    chosen, rejected = (task.proxy_reward(pairs["prompt"], pairs[side]) for side in ("chosen", "rejected"))
    assert all(c > r for c, r in zip(chosen, rejected, strict=True))
    true = [task.true_reward(pairs["prompt"], pairs[side]) for side in ("chosen", "rejected")]
    assert any(c < r for c, r in zip(*true, strict=True))


def test_marker_feedback_says_what_is_missed_and_demonstrations_mend_it():
    task = MarkerTask(train_on="proxy", feedback_share=0.5)
    turns = task.online(task.generate(200, 0))
    assert set(turns["feedback"]) == {"marker", "longer"}
    for row in turns:
        assert (row["feedback"] == "marker") == (row["prompt"][0] + row["prompt"][3] not in row["rejected"])
    shown = [row for row in task.demonstrations(400, 0, 1.0) if row["prompt"].count(":") == 2]
    assert abs(len(shown) / 400 - 0.5) < 0.08
    for row in shown:
        prompt, rejected = row["prompt"][:5], row["prompt"][5:].split(" ")[0]
        worse, better = task.proxy_reward([prompt] * 2, [rejected, row["completion"]])
        assert better > worse and prompt[0] + prompt[3] in row["completion"]
    assert "feedback" not in MarkerTask().online(MarkerTask().generate(2, 0)).column_names


@pytest.mark.parametrize("longer_share", [None, 0.0, 0.8, 1.0])
@pytest.mark.parametrize("label_noise, covered", [(0.0, None), (0.25, 3), (1.0, 1)])
def test_marker_pairs_follow_the_knobs(longer_share, label_noise, covered):
    task = MarkerTask(longer_share=longer_share, label_noise=label_noise, covered=covered)
    problems = task.generate(500, 0)
    pairs = task.preference(problems)
    assert pairs.to_list() == task.preference(problems).to_list()
    chosen, rejected = (task.true_reward(pairs["prompt"], pairs[side]) for side in ("chosen", "rejected"))
    assert all(c != r for c, r in zip(chosen, rejected, strict=True))
    flipped = sum(c < r for c, r in zip(chosen, rejected, strict=True)) / 500
    assert abs(flipped - label_noise) < 0.06
    if longer_share is not None:
        longer = sum(len(c) > len(r) for c, r in zip(pairs["chosen"], pairs["rejected"], strict=True)) / 500
        assert abs(longer - longer_share) < 0.06
    starts = {text[0] for side in ("chosen", "rejected") for text in pairs[side]}
    assert starts == set("abcdefgh"[:covered])


# Rewriting


@pytest.mark.parametrize("drift, rejected_drift", [(0.4, 0.2), (1.0, 0.0)])
def test_rewritten_pairs_know_style_alone(drift, rejected_drift):
    task = RewriteTask(drift_share=drift, rejected_drift_share=rejected_drift)
    problems = task.generate(500, 0)
    pairs = task.preference(problems)
    assert pairs.to_list() == task.preference(problems).to_list()
    for side, share in (("chosen", drift), ("rejected", rejected_drift)):
        overlaps = list(map(overlap, pairs["prompt"], pairs[side]))
        assert abs(sum(o < 0.6 for o in overlaps) / 500 - share) < 0.06
        assert all(o < 0.6 or o == pytest.approx(1) for o in overlaps)
    assert all(style(c) > style(r) for c, r in zip(pairs["chosen"], pairs["rejected"], strict=True))


def test_rewrites_are_scored_by_letters_then_style():
    task = RewriteTask(length=4)
    texts = ["facd!*+", "hcaf!*+", "fach", "hcaf+", "hhcaf!*+", "", "!*+"]
    assert [task.score(text, "hcaf!*+") for text in texts] == pytest.approx([0, 1, 1 / 2, 2 / 3, 0, 0, 0])
    assert [overlap("hcaf:", text) for text in texts[:3]] == pytest.approx([3 / 4, 1, 1])
    assert overlap("hcaf:", "hh!") == pytest.approx(1 / 2) and overlap("hcaf:", "!") == 0


# Tool calls


@pytest.mark.parametrize(
    "text, accepted",
    [
        ("add(n=3,x=fig)", True),
        ("add(x=fig, n=3)", True),
        ("add(x=fig)", False),
        ("add(n=3,x=fig,c=red)", False),
        ("add(n=3,n=3,x=fig)", False),
        ("add(n=4,x=fig)", False),
        ("drop(n=3,x=fig)", False),
        ("add(n=3,x=fig", False),
        ("add()", False),
    ],
)
def test_calls_are_compared_by_tool_and_arguments(text, accepted):
    assert ToolCallTask().score(text, "add(n=3,x=fig)") == float(accepted)


def test_more_tools_and_arguments_make_longer_calls():
    easy, hard = ToolCallTask(2, 1).generate(200, 0), ToolCallTask(6, 3).generate(200, 0)
    assert {answer.partition("(")[0] for answer in easy["answer"]} == {"add", "drop"}
    assert len({answer.partition("(")[0] for answer in hard["answer"]}) == 6
    assert all(answer.count("=") == 3 for answer in hard["answer"])


def test_addition_feedback_names_the_error_and_demonstrations_mend_it():
    task = AdditionTask(feedback_share=0.5)
    problems = task.generate(400, 0)
    for row in problems:
        error = int(row["wrong_answer"]) - int(row["answer"])
        assert row["feedback"] == ("low" if error < 0 else "high") and error != 0
    turns = task.online(problems)
    assert turns["rejected"] == problems["wrong_answer"] and turns["feedback"] == problems["feedback"]
    shown = [row for row in task.demonstrations(400, 0, 1.0) if ":" in row["prompt"]]
    assert abs(len(shown) / 400 - 0.5) < 0.08
    for row in shown:
        question, told = row["prompt"].split("=")
        rejected, feedback = told.removesuffix(":").split(" ")
        assert sum(map(int, question.split("+"))) == int(row["completion"]) != int(rejected)
        assert (int(rejected) < int(row["completion"])) == (feedback == "low")
    assert "feedback" not in AdditionTask().generate(2, 0).column_names


def test_addition_hints_name_carries_and_keep_the_errors_to_the_others():
    task = AdditionTask(digits=3, hint_share=0.5)
    for row in task.generate(50, seed=0):
        a, b = map(int, row["prompt"][:-1].split("+"))
        carries = [(a % 10**k + b % 10**k) // 10**k for k in (1, 2, 3)]
        assert row["hints"] == [f"{row['prompt']}[{''.join(map(str, carries[:k]))}]" for k in (1, 2, 3)]
        assert row["hint"] == row["hints"][-1]
    hinted = 0
    for row in task.demonstrations(400, seed=1, error_share=1.0):
        prompt, _, hint = row["prompt"].partition("[")
        a, b = prompt[:-1].split("+")
        known = len(hint.rstrip("]"))
        hinted += known > 0
        handed, digits = 0, []
        for place, (x, y) in enumerate(zip(reversed("0" + a), reversed("0" + b), strict=True)):
            digits.append((int(x) + int(y) + (handed if place <= known else 0)) % 10)
            handed = (int(a[-place - 1 :]) + int(b[-place - 1 :])) // 10 ** (place + 1) if place < 3 else 0
        assert row["completion"] == "".join(map(str, reversed(digits)))
    assert 150 < hinted < 250
    assert "hints" not in AdditionTask(digits=3).generate(1, seed=0).column_names
