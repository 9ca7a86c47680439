"""Search trees: their rules against plain loops, and whole searches against a second implementation."""

import json
import math
import random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from papertrl.samplers.trees.dump import draw, main, tree_as_dict
from papertrl.samplers.trees.search import grow
from papertrl.samplers.trees.tree import (
    Node,
    Rules,
    Tree,
    completion,
    descend,
    entropy,
    frontier,
    nodes_below,
    path,
    preferred,
    priority,
    quality,
    uct,
)

END = 0


def rules(**changes):
    values = {"width": 3, "step_tokens": 2, "max_tokens": 7, "trajectories": 4, "end_tokens": frozenset([END])}
    return Rules(**(values | changes))


class World:
    """Steps that depend only on the prefix and the place among its samples, and a verdict for each completion."""

    def __init__(self, seed, end=0.15, right=0.3):
        self.seed, self.end, self.right = seed, end, right
        self.calls = []

    def step(self, prefix, place, length):
        draws = random.Random(f"{self.seed}-{prefix}-{place}")
        tokens = []
        while len(tokens) < length and END not in tokens:
            tokens.append(END if draws.random() < self.end else draws.randint(1, 9))
        return tokens, [-3 * draws.random() for _ in tokens]

    def is_right(self, prompt, tokens):
        return random.Random(f"{self.seed}-{prompt}-{tokens}-right").random() < self.right

    def sample(self, prompts, counts, length):
        self.calls.append((len(prompts), length))
        steps = [self.step(p, i, length) for p, count in zip(prompts, counts, strict=True) for i in range(count)]
        return [tokens for tokens, _ in steps], [logps for _, logps in steps]

    def verifier(self, prompts):
        return lambda asked: [self.is_right(prompts[i], tokens) for i, tokens in asked]

    def search(self, prompts, r):
        trees = [Tree(prompt, r) for prompt in prompts]
        grow(trees, r, self.sample, self.verifier(prompts))
        return trees


def search_by_hand(world, prompt, r):
    """
    The search on dictionaries, after the card: kept trajectories as lists of (tokens, q of each step), and counts.
    """
    deepest = math.ceil(r.max_tokens / r.step_tokens)
    nodes = {(): {"tokens": [], "logps": [], "q": 0.0, "n": 0, "children": [], "terminal": False}}
    kept, iterations, current = [], 0, ()

    def tokens_of(key):
        return [t for i in range(1, len(key) + 1) for t in nodes[key[:i]]["tokens"]]

    def logps_of(key):
        return [x for i in range(1, len(key) + 1) for x in nodes[key[:i]]["logps"]]

    def mean_q(key):
        return nodes[key]["q"] / nodes[key]["n"] if nodes[key]["n"] else 0.0

    def local(key):
        n, above = nodes[key]["n"], nodes[key[:-1]]["n"]
        return mean_q(key) + (r.uct * math.sqrt(math.log(above) / n) if n and above else 0.0)

    def keep(key):
        kept.append(key)
        v = nodes[key]["v"]
        for i in range(len(key) + 1):
            node = nodes[key[:i]]
            w = max(i / len(key), r.decay_floor)
            if node["q"] * v >= 0:
                node["q"] += w * v
            elif v > 0:
                node["q"] = w * v
            node["n"] += 1

    def best(keys):
        def rank(key):
            if nodes[key]["v"] == 1.0:
                return 0
            return 1 if tokens_of(key)[-1] == END else 2

        top = min(rank(key) for key in keys)
        lowest = min(-fmean(logps_of(key)) for key in keys if rank(key) == top)
        return next(key for key in keys if rank(key) == top and -fmean(logps_of(key)) == lowest)

    def verdict(key):
        if world.is_right(prompt, tokens_of(key)):
            return 1.0
        return -1.0 if tokens_of(key)[-1] == END else r.incomplete_score

    def preorder(key=()):
        return [key, *(below for child in nodes[key]["children"] for below in preorder(child))]

    def open_nodes():
        return [k for k in preorder() if k and not nodes[k]["terminal"] and not nodes[k]["children"]]

    def promise(key):
        d = {"sqrt": math.sqrt(len(key) / deepest), "log": math.log(len(key) + 1), "linear": len(key)}[r.depth_bonus]
        return (
            r.quality * math.tanh(mean_q(key[:-1]))
            + r.uncertainty * -fmean(nodes[key]["logps"])
            + r.depth * d
            + r.own * math.tanh(mean_q(key))
        )

    def largest(keys, score):
        return next(key for key in keys if score(key) == max(map(score, keys)))

    while current is not None:
        iterations += 1
        room = min(r.step_tokens, r.max_tokens - len(current) * r.step_tokens)
        for place in range(r.width):
            # The sampler is asked for a whole step; what is beyond the longest completion is cut
            step, logps = world.step(prompt + tokens_of(current), place, r.step_tokens)
            step, logps = step[:room], logps[:room]
            key = (*current, place)
            ends = step[-1] == END or len(key) == deepest
            nodes[key] = {"tokens": step, "logps": logps, "q": 0.0, "n": 0, "children": [], "terminal": ends}
            nodes[current]["children"].append(key)
            if ends:
                nodes[key]["v"] = verdict(key)
            else:
                nodes[key]["n"] += 1
        new = nodes[current]["children"]
        ends = [key for key in new if nodes[key]["terminal"]]
        if not ends:
            current = largest(new, local)
            continue
        keep(best(ends))
        if len(kept) == r.trajectories:
            break
        current = None
        if open_nodes() and r.selection == "frontier":
            current = largest(open_nodes(), promise)
        elif open_nodes():
            current = ()
            while nodes[current]["children"]:
                ways = [c for c in nodes[current]["children"] if any(o[: len(c)] == c for o in open_nodes())]
                current = largest(ways, local)
    while len(kept) < r.trajectories:
        left = [key for key in preorder() if nodes[key]["terminal"] and key not in kept]
        if not left:
            break
        keep(best(left))
    for place in range(r.trajectories - len(kept)):
        step, logps = world.step(prompt, place, r.max_tokens)
        key = ("direct", place)
        nodes[key] = {"tokens": step, "logps": logps, "q": 0.0, "n": 0}
        nodes[key]["v"] = 1.0 if world.is_right(prompt, step) else -1.0 if step[-1] == END else r.incomplete_score
        nodes[key]["q"] = nodes[key]["v"]
        kept.append(key)
    found = []
    for key in kept:
        if key[0] == "direct":
            found.append([(nodes[key]["tokens"], nodes[key]["q"])])
        else:
            steps = [nodes[key[:i]] for i in range(1, len(key) + 1)]
            found.append([(step["tokens"], step["q"]) for step in steps])
    return found, iterations


@given(
    st.integers(0, 10**6),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 7),
    st.integers(1, 6),
    st.sampled_from(["frontier", "uct"]),
    st.sampled_from(["sqrt", "log", "linear"]),
    st.sampled_from([0.02, 0.3, 0.9]),
    st.sampled_from([0.0, 0.5]),
)
def test_a_search_is_the_papers(seed, width, step, most, trajectories, selection, bonus, end, own):
    r = rules(
        width=width,
        step_tokens=step,
        max_tokens=most,
        trajectories=trajectories,
        selection=selection,
        depth_bonus=bonus,
        own=own,
        depth=0.3,
        incomplete_score=-0.5,
    )
    world = World(seed, end)
    (tree,) = world.search([[11, 12]], r)
    expected, iterations = search_by_hand(world, [11, 12], r)
    assert tree.iterations == iterations and len(tree.returned) == trajectories
    for node, steps in zip(tree.returned, expected, strict=True):
        found = path(node)[1:]
        assert [n.tokens for n in found] == [tokens for tokens, _ in steps]
        assert [n.value for n in found] == pytest.approx([q for _, q in steps])


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_prompts_grow_in_lockstep_and_do_not_see_each_other(seed, count):
    prompts = [[100 + i] for i in range(count)]
    together = World(seed)
    trees = together.search(prompts, rules())
    alone = [World(seed) for _ in prompts]
    for prompt, tree, world in zip(prompts, trees, alone, strict=True):
        (other,) = world.search([prompt], rules())
        assert [completion(n) for n in tree.returned] == [completion(n) for n in other.returned]
        assert [n.value for n in nodes_below(tree.root)] == [n.value for n in nodes_below(other.root)]
    # As many calls as the longest search takes, and one more where a tree has to be filled up
    steps = [length for _, length in together.calls if length == 2]
    assert len(steps) == max(tree.iterations for tree in trees)
    assert len(together.calls) - len(steps) in (0, 1)
    assert all(n <= count for n, _ in together.calls)


def test_a_process_without_prompts_keeps_up_with_the_others():
    busy = iter([5, 2, 1, 0, 7])
    asked, verified = [], []

    def sample(prompts, counts, tokens):
        asked.append((prompts, counts, tokens))
        return [], []

    def verify(completions):
        verified.append(completions)
        return []

    grow([], rules(), sample, verify, lambda mine: next(busy))
    assert asked == [([], [], 2)] * 3 + [([], [], 7)] and verified == [[]] * 4


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 9))
def test_no_completion_is_too_long_or_goes_on_after_its_end(seed, step, most):
    world = World(seed)
    (tree,) = world.search([[3]], rules(step_tokens=step, max_tokens=most))
    for node in tree.returned:
        tokens = completion(node)
        assert 1 <= len(tokens) <= most and END not in tokens[:-1]
        assert node.ended == (tokens[-1] == END) and (node.ended or len(tokens) == most)
    assert len({id(node) for node in tree.returned}) == 4


@pytest.mark.parametrize("trajectories", [2, 3, 5])
def test_an_empty_frontier_gives_other_terminals_and_then_direct_completions(trajectories):
    """Every completion is one token, so that all children of the root are terminal."""
    world = World(1, end=1.0, right=0.0)
    (tree,) = world.search([[3]], rules(trajectories=trajectories))
    assert tree.iterations == 1 and len(tree.returned) == trajectories
    assert tree.sampled_tokens == max(3, trajectories)
    assert [length for _, length in world.calls] == [2] + [7] * (trajectories > 3)
    # Of the searched ones, those of lowest entropy come first
    searched = [entropy(path(node)) for node in tree.returned[:3]]
    assert searched == sorted(searched)
    assert tree.root.visits == trajectories


def test_a_finished_tree_is_only_filled_up():
    world = World(2)
    tree = Tree([5], rules(), grown=True)
    tree.add([4, END], [math.nan, math.nan], correct=True)
    grow([tree], rules(), world.sample, world.verifier([[5]]))
    assert world.calls == [(1, 7)] and tree.iterations == 0 and len(tree.returned) == 4
    assert completion(tree.returned[0]) == [4, END] and tree.returned[0].value == 1.0


def make_tree(q_root=0.0, n_root=0):
    root = Node(value=q_root, visits=n_root)
    for q, n, logps, terminal in ((0.6, 2, [-1.0, -3.0], False), (-1.0, 1, [-0.5], True), (0.0, 0, [], False)):
        root.children.append(Node(root, [1] * len(logps), logps, terminal, value=q, visits=n))
    return root


def test_scores_of_a_node():
    root = make_tree(q_root=0.8, n_root=4)
    first, second, third = root.children
    assert quality(first) == 0.3 and quality(third) == 0.0
    assert uct(first, 2.0) == pytest.approx(0.3 + 2 * math.sqrt(math.log(4) / 2))
    assert uct(third, 2.0) == 0.0 and uct(make_tree().children[0], 2.0) == 0.3
    r = rules(max_tokens=8, quality=0.5, uncertainty=0.25, depth=0.125, own=2.0)
    expected = 0.5 * math.tanh(0.2) + 0.25 * 2.0 + 0.125 * math.sqrt(1 / 4) + 2 * math.tanh(0.3)
    assert priority(first, r) == pytest.approx(expected)
    assert entropy([first, second]) == pytest.approx(1.5)
    assert entropy([third]) == entropy([]) == math.inf
    assert entropy([Node(root, [1], [math.nan])]) == math.inf


def test_the_frontier_is_what_can_be_expanded():
    root = make_tree()
    assert frontier(Node()) == []
    assert frontier(root) == [root.children[0], root.children[2]]
    root.children[0].children.append(Node(root.children[0], terminal=True))
    assert frontier(root) == [root.children[2]] and descend(root, 2.0) is root.children[2]
    root.children[2].terminal = True
    assert frontier(root) == [] and descend(root, 2.0) is None


def test_which_terminal_is_kept():
    root = Node()

    def terminal(reward, ended, surprise):
        return Node(root, [1], [-surprise], True, ended, reward=reward)

    right, unsure = terminal(1.0, False, 0.2), terminal(1.0, True, 0.7)
    wrong, sure = terminal(-1.0, True, 0.9), terminal(-1.0, True, 0.5)
    unfinished = terminal(-1.0, False, 0.1)
    assert preferred([unfinished, wrong, sure, unsure, right]) is right
    assert preferred([unfinished, wrong, sure]) is sure
    assert preferred([unfinished, terminal(-0.5, False, math.nan)]) is unfinished


def test_a_dump_is_plain_and_can_be_drawn(tmp_path):
    (tree,) = World(3).search([[8, 9]], rules(trajectories=6))
    plain = json.loads(json.dumps(tree_as_dict(tree, lambda ids: "-".join(map(str, ids)))))
    assert plain["prompt"] == "8-9" and plain["sampled_tokens"] == tree.sampled_tokens
    nodes = plain["nodes"]
    assert nodes[0]["parent"] is None and nodes[0]["visits"] == 6 and len(nodes) == len(nodes_below(tree.root))
    for i, node in enumerate(nodes[1:], 1):
        assert node["parent"] < i and node["depth"] == nodes[node["parent"]]["depth"] + 1
    kept = sorted((node["returned"], node["reward"], node["q"]) for node in nodes if node["returned"] is not None)
    assert kept == [(i, node.reward, node.reward) for i, node in enumerate(tree.returned)]

    draw(plain, tmp_path / "one.png")
    (tmp_path / "trees.json").write_text(json.dumps({"step": 0, "trees": [plain]}))
    main([str(tmp_path / "trees.json")])
    for name in ("one.png", "trees.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "trees.json"), "--tree", "1"])
