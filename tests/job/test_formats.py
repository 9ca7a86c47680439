"""Formats of preference data: found, checked, and converted there and back."""

import itertools
import math
import re

import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import unpair_preference_dataset

from papertrl.data import (
    FORMATS,
    as_messages,
    as_text,
    check_preference_rows,
    conversations_to_feedback,
    conversations_to_pairs,
    detect_format,
    explicit_prompts,
    pairs_to_rankings,
    rankings_to_pairs,
    to_format,
    unpaired_to_pairs,
)


def messages(*texts, first="user"):
    """Messages of user and assistant in turn."""
    roles = itertools.cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def answer(text):
    return messages(text, first="assistant")


CHAT = messages("hi", "hello", "no")
GOOD = {
    "rankings": {"prompt": "p", "completions": ["a", "b"], "ranks": [2, 1]},
    "scored_pairs": {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1.0, "rejected_score": 1.0},
    "pairs": {"prompt": messages("p"), "chosen": answer("a"), "rejected": answer("b")},
    "feedback": {"prompt": messages("p"), "rejected": answer("a"), "feedback": "no"},
    "unpaired": {"prompt": "", "completion": "a", "label": False},
    "conversations": {"messages": CHAT, "feedback_turn": 2},
    "prompts": {"prompt": "p"},
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("streamed", [False, True])
def test_formats_are_found_and_well_formed_rows_accepted(name, streamed):
    rows = [GOOD[name]] * 3
    dataset = IterableDataset.from_generator(lambda: iter(rows)) if streamed else Dataset.from_list(rows)
    assert detect_format(dataset) == name
    checked = check_preference_rows(dataset)
    assert [{k: row[k] for k in GOOD[name]} for row in checked] == rows


def test_implicit_prompts_tools_and_parts_are_accepted():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    turns = [{"role": "system", "content": "s"}, *messages("p"), call, {"role": "tool", "content": "3"}]
    rows = [
        {"chosen": "p a", "rejected": "p b"},
        {"chosen": turns + answer("a"), "rejected": turns + answer("b")},
        {"prompt": turns, "chosen": answer([{"type": "text", "text": "a"}]), "rejected": [call]},
    ]
    for row in rows:
        FORMATS["pairs"].check(row)


def test_unknown_columns_are_refused_with_the_formats():
    with pytest.raises(
        ValueError, match=r"\['completions', 'prompts'\] are no format.*`completions` and one of `ranks`"
    ):
        detect_format(Dataset.from_dict({"prompts": ["a"], "completions": [["a", "b"]]}))
    with pytest.raises(
        ValueError, match=r"\['chosen', 'prompt'\] do not do. What does is pairs: `chosen`, `rejected`;"
    ):
        to_format(Dataset.from_dict({"prompt": ["a"], "chosen": ["b"]}), ("pairs",))


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SCORED = PAIR | {"chosen_score": 1.0, "rejected_score": 0.0}
CHAT_PAIR = GOOD["pairs"]
RANKING = {"prompt": "p", "completions": ["a", "b"], "scores": [1.0, 0.0]}
BAD = [
    ("pairs", PAIR | {"chosen": None}, "chosen", "is missing"),
    ("pairs", PAIR | {"rejected": ""}, "rejected", "is empty"),
    ("pairs", PAIR | {"rejected": " \n"}, "rejected", "is empty"),
    ("pairs", PAIR | {"prompt": None}, "prompt", "is missing"),
    ("pairs", PAIR | {"prompt": 3}, "prompt", "must be text or a list of messages, got 3"),
    ("pairs", PAIR | {"chosen": 3}, "chosen", "must be text or a list of messages, got 3"),
    ("pairs", PAIR | {"rejected": "a"}, "rejected", "equals `chosen`"),
    ("pairs", PAIR | {"chosen": answer("a")}, "chosen", "is messages, but the prompt is text"),
    ("pairs", CHAT_PAIR | {"rejected": "b"}, "rejected", "is text, but the prompt is messages"),
    ("pairs", {"chosen": "a", "rejected": CHAT + answer("b")}, "rejected", "is in another form than `chosen`"),
    ("pairs", CHAT_PAIR | {"prompt": []}, "prompt", r"got \[\]"),
    ("pairs", CHAT_PAIR | {"chosen": []}, "chosen", "is empty"),
    ("pairs", CHAT_PAIR | {"chosen": answer(" ")}, "chosen", "is empty"),
    ("pairs", CHAT_PAIR | {"chosen": answer(None)}, "chosen", "a message of the assistant without content"),
    ("pairs", CHAT_PAIR | {"prompt": CHAT[:2]}, "prompt", "must end with a message of the user, but .* the assistant"),
    ("pairs", CHAT_PAIR | {"prompt": CHAT[1:]}, "prompt", "of the assistant at its beginning, where .*system"),
    ("pairs", CHAT_PAIR | {"prompt": CHAT[:1] * 2}, "prompt", "of the user after one of the user"),
    ("pairs", CHAT_PAIR | {"chosen": messages("a")}, "chosen", "of the user after one of the user"),
    ("pairs", CHAT_PAIR | {"chosen": [*answer("a"), *messages("b")]}, "chosen", "must end with .* the assistant"),
    (
        "pairs",
        CHAT_PAIR | {"chosen": [{"role": "bot", "content": "a"}]},
        "chosen",
        "role is 'bot', and none of system",
    ),
    ("pairs", CHAT_PAIR | {"chosen": [{"content": "a"}]}, "chosen", "role is None"),
    ("pairs", {"chosen": CHAT, "rejected": CHAT[:2]}, "chosen", "must end with .* the assistant"),
    ("scored_pairs", SCORED | {"chosen_score": None}, "chosen_score", "is missing"),
    ("scored_pairs", SCORED | {"rejected_score": math.nan}, "rejected_score", "finite numbers, got nan"),
    ("scored_pairs", SCORED | {"rejected_score": 1.5}, "chosen_score", "is 1.0, below `rejected_score` 1.5"),
    ("rankings", RANKING | {"completions": ["a"]}, "completions", "at least two"),
    ("rankings", RANKING | {"completions": ["a", ""]}, "completions", "is empty"),
    ("rankings", RANKING | {"scores": [1.0]}, "scores", "must be a list of 2"),
    ("rankings", RANKING | {"scores": None}, "scores", "is missing"),
    ("rankings", RANKING | {"scores": [1.0, math.nan]}, "scores", "finite numbers, got nan"),
    ("rankings", RANKING | {"ranks": [0, 1]}, "ranks", "finite numbers of at least 1, got 0"),
    ("rankings", RANKING | {"relevance": [-1, 1]}, "relevance", "finite numbers of at least 0, got -1"),
    ("rankings", RANKING | {"ranks": [2, 1]}, "scores", "contradicts `ranks`, which rank completion 1 before 0"),
    ("unpaired", GOOD["unpaired"] | {"completion": ""}, "completion", "is empty"),
    ("unpaired", GOOD["unpaired"] | {"label": "good"}, "label", "must be true or false, got 'good'"),
    ("unpaired", GOOD["unpaired"] | {"label": None}, "label", "is missing"),
    ("feedback", GOOD["feedback"] | {"feedback": " "}, "feedback", "is empty"),
    ("feedback", GOOD["feedback"] | {"feedback": messages("no")}, "feedback", "must be the text of the user's reply"),
    ("conversations", {"messages": "hi"}, "messages", "must be a list"),
    ("conversations", {"messages": CHAT[:2]}, "messages", "no reply of the user to an answer .* place 0"),
    ("conversations", {"messages": CHAT, "feedback_turn": 1}, "feedback_turn", "no reply .* place 1"),
    ("conversations", {"messages": CHAT, "feedback_turn": 3}, "feedback_turn", "from 0 to 2, got 3"),
    ("prompts", {"prompt": None}, "prompt", "is missing"),
]


@pytest.mark.parametrize(("name", "row", "column", "problem"), BAD)
def test_malformed_rows_are_refused_by_number_column_and_problem(name, row, column, problem):
    rows = [GOOD[name], GOOD[name], row]
    with pytest.raises(ValueError, match=rf"^Row 2 \(counted from 0\), column `{column}`: .*{problem}[^\n]*\.$"):
        # Arrow could not hold columns of several types
        list(check_preference_rows(IterableDataset.from_generator(lambda: iter(rows)), name))


def test_a_dataset_is_checked_at_once():
    rows = Dataset.from_list([PAIR, PAIR | {"rejected": "a"}])
    with pytest.raises(ValueError, match=r"Row 1 .*`rejected`: equals"):
        check_preference_rows(rows)


# --- Conversions ------------------------------------------------------------------------------------------------

texts = st.text("abc", min_size=1, max_size=3)


@st.composite
def rankings(draw):
    rows = []
    for prompt in draw(st.lists(texts, min_size=1, max_size=3, unique=True)):
        completions = draw(st.lists(texts, min_size=2, max_size=5, unique=True))
        values = st.lists(st.integers(1, 4), min_size=len(completions), max_size=len(completions))
        rows.append({"prompt": prompt, "completions": completions, "values": draw(values), "id": len(rows)})
    return rows


def all_pairs(row, distances):
    """Pairs by plain loops."""
    return {
        (row["prompt"], better, worse)
        for better, a in zip(row["completions"], distances, strict=True)
        for worse, b in zip(row["completions"], distances, strict=True)
        if a < b
    }


def triples(pairs):
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs]


@settings(max_examples=15)
@given(rows=rankings(), order=st.sampled_from(["ranks", "scores", "relevance"]), streamed=st.booleans())
def test_rankings_to_pairs_and_back(rows, order, streamed):
    sign = 1 if order == "ranks" else -1
    data = [{**row, order: row["values"]} for row in rows]
    expected = set().union(*(all_pairs(row, [sign * v for v in row["values"]]) for row in rows))
    dataset = Dataset.from_list(data)
    pairs = list(rankings_to_pairs(dataset.to_iterable_dataset() if streamed else dataset))
    assert sorted(triples(pairs)) == sorted(expected)
    for pair in pairs:
        row = rows[pair["id"]]
        graded = dict(zip(row["completions"], row["values"], strict=True))
        if order == "ranks":
            assert "chosen_score" not in pair
        else:
            assert (pair["chosen_score"], pair["rejected_score"]) == (graded[pair["chosen"]], graded[pair["rejected"]])
    best_worst = triples(rankings_to_pairs(dataset, "best_worst"))
    for row in rows:
        mine = [pair for pair in best_worst if pair[0] == row["prompt"]]
        far = sorted(sign * v for v in row["values"])
        assert len(mine) == (far[0] < far[-1])
        for _, better, worse in mine:
            place = dict(zip(row["completions"], row["values"], strict=True))
            assert (sign * place[better], sign * place[worse]) == (far[0], far[-1])
    adjacent = triples(rankings_to_pairs(dataset, "adjacent"))
    assert set(adjacent) <= expected and len(adjacent) <= sum(len(row["completions"]) - 1 for row in rows)
    if not pairs:
        return
    back = pairs_to_rankings(Dataset.from_list(pairs))
    # Pairs know the order, and no more of ties than that
    assert sorted(triples(rankings_to_pairs(back))) == sorted(expected)
    assert back.column_names == ["prompt", "completions", "ranks" if order == "ranks" else "scores"]
    originals = {row["prompt"]: row for row in rows}
    for row in back:
        values = originals[row["prompt"]]["values"]
        place = dict(zip(originals[row["prompt"]]["completions"], values, strict=True))
        if order == "ranks":
            dense = {v: i + 1 for i, v in enumerate(sorted(set(values)))}
            assert row["ranks"] == [dense[place[c]] for c in row["completions"]]
        else:
            assert row["scores"] == [place[c] for c in row["completions"]]


def test_ranks_of_pairs_are_chains_and_circles_are_refused():
    def pairs(*sides, prompt="p"):
        return [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in sides]

    (row,) = pairs_to_rankings(Dataset.from_list(pairs("ab", "bc", "ac", "xc")))
    assert dict(zip(row["completions"], row["ranks"], strict=True)) == {"a": 1, "b": 2, "c": 3, "x": 1}
    circle = pairs("ab", prompt="q") + pairs("az", "zb", "bc", "cz", "cd")
    with pytest.raises(ValueError, match=r"Row [234] \(counted from 0\), column `rejected`: goes around in a circle"):
        pairs_to_rankings(Dataset.from_list(circle))
    scored = [{**row, "chosen_score": 2.0, "rejected_score": 1.0} for row in pairs("ab", "bc")]
    with pytest.raises(ValueError, match=r"Row 1 .*`chosen_score`: is 2.0, but another pair gives .* 1.0"):
        pairs_to_rankings(Dataset.from_list(scored))
    with pytest.raises(ValueError, match="`choose` must be one of 'all', 'adjacent', 'best_worst', got 'some'"):
        rankings_to_pairs(Dataset.from_list([GOOD["rankings"]]), "some")


def test_equal_completions_make_no_pair():
    row = {"prompt": "p", "completions": ["a", "a", "b"], "ranks": [1, 2, 3]}
    assert triples(rankings_to_pairs(Dataset.from_list([row]))) == [("p", "a", "b"), ("p", "a", "b")]


@settings(max_examples=20)
@given(
    pairs=st.lists(st.tuples(texts, texts, texts).filter(lambda t: t[1] != t[2]), min_size=1, max_size=6, unique=True)
)
def test_pairs_to_labels_and_back(pairs):
    dataset = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs])
    found = set(triples(unpaired_to_pairs(unpair_preference_dataset(dataset))))
    good, bad = {(x, y) for x, y, _ in pairs}, {(x, z) for x, _, z in pairs}
    assert found == {(x, y, z) for x, y in good for w, z in bad if x == w and y != z}
    assert set(pairs) <= found


def test_labels_of_one_kind_and_streams_make_no_pairs():
    rows = Dataset.from_list([{"prompt": "p", "completion": "a", "label": True}])
    with pytest.raises(ValueError, match="No prompt has completions of both labels"):
        unpaired_to_pairs(rows)
    with pytest.raises(ValueError, match=r"`unpaired_to_pairs` looks for .*without streaming"):
        unpaired_to_pairs(rows.to_iterable_dataset())


@settings(max_examples=20)
@given(
    turns=st.lists(texts, min_size=3, max_size=9),
    place=st.none() | st.integers(1, 4),
    system=st.booleans(),
    streamed=st.booleans(),
)
def test_conversations_part_at_the_dissatisfied_turn(turns, place, system, streamed):
    head = [{"role": "system", "content": "s"}] if system else []
    said = messages(*turns)
    last = max(i for i in range(len(said)) if said[i]["role"] == "user")
    turn = last if place is None or 2 * place >= len(said) else 2 * place
    row = {"messages": head + said, "id": 7}
    if turn != last or place is not None:
        row["feedback_turn"] = turn + len(head)
    dataset = Dataset.from_list([row])
    if streamed:
        dataset = dataset.to_iterable_dataset()
    (found,) = conversations_to_feedback(dataset)
    expected = {"prompt": head + said[: turn - 1], "rejected": [said[turn - 1]], "feedback": turns[turn], "id": 7}
    assert found == expected
    FORMATS["feedback"].check(found)
    pairs = list(conversations_to_pairs(dataset))
    if turn + 1 == len(said) or turns[turn + 1] == turns[turn - 1]:
        assert not pairs
        return
    (pair,) = pairs
    assert pair == {
        "prompt": expected["prompt"],
        "rejected": expected["rejected"],
        "chosen": [said[turn + 1]],
        "id": 7,
    }
    FORMATS["pairs"].check(pair)


def test_explicit_prompts_are_all_but_the_last_turn():
    rows = [{"chosen": CHAT + answer("yes"), "rejected": CHAT + answer("so")}]
    (row,) = explicit_prompts(Dataset.from_list(rows))
    assert row == {"prompt": CHAT, "chosen": answer("yes"), "rejected": answer("so")}
    other = messages("hi", "good day", "no") + answer("so")
    with pytest.raises(ValueError, match=r"Row 0 .*`rejected`: differs from `chosen` before the last turn"):
        explicit_prompts(Dataset.from_list([rows[0] | {"rejected": other}]))
    (row,) = explicit_prompts(Dataset.from_list([{"chosen": "1+1=2", "rejected": "1+1=3"}]))
    assert row == {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


@settings(max_examples=8)
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            dict.fromkeys(("prompt", "hint", "completion", "chosen", "rejected", "feedback"), texts)
            | dict.fromkeys(("completions", "hints"), st.lists(texts, min_size=1, max_size=3))
        ),
        min_size=1,
        max_size=3,
    )
)
def test_text_to_messages_and_back(rows):
    dataset = Dataset.from_list(rows)
    chat = as_messages(dataset)
    for text, row in zip(rows, chat, strict=True):
        assert row["prompt"] == messages(text["prompt"]) and row["rejected"] == answer(text["rejected"])
        assert row["completions"] == [answer(c) for c in text["completions"]]
        assert row["hints"] == [messages(h) for h in text["hints"]] and row["feedback"] == text["feedback"]
    assert as_text(chat).to_list() == rows


def test_conversations_are_no_text():
    with pytest.raises(ValueError, match=re.escape("Row 0 (counted from 0), column `prompt`: has 3 messages")):
        as_text(Dataset.from_list([{"prompt": CHAT}]))


WAYS = [
    ("pairs", ("pairs",), {"prompt", "chosen", "rejected"}),
    ("scored_pairs", ("pairs",), set(SCORED)),
    ("rankings", ("pairs",), {"prompt", "chosen", "rejected"}),
    ("rankings", ("rankings", "pairs"), {"prompt", "completions", "ranks"}),
    ("pairs", ("rankings",), {"prompt", "completions", "ranks"}),
    ("scored_pairs", ("rankings",), {"prompt", "completions", "scores"}),
    ("conversations", ("feedback",), {"prompt", "rejected", "feedback"}),
    ("conversations", ("prompts",), {"prompt", "rejected", "feedback"}),
    ("rankings", ("prompts",), {"prompt", "completions", "ranks"}),
]


@pytest.mark.parametrize(("found", "formats", "columns"), WAYS)
def test_to_format_takes_the_first_way(found, formats, columns):
    converted = to_format(Dataset.from_list([GOOD[found]]), formats)
    assert set(converted.column_names) == columns and len(converted) == 1
    assert any(FORMATS[name].fits(columns) for name in formats)
