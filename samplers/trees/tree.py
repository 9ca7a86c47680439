"""A search tree over completions, whose nodes are steps of several tokens, and the rules of DeepSearch to grow it."""

import math
from dataclasses import dataclass, field

import torch

from ...losses.policy.deepsearch import back_up


@dataclass(frozen=True)
class Rules:
    """
    How a tree grows (arXiv:2509.25454).

    Args:
        width (`int`):
            Children of an expansion.
        step_tokens (`int`), max_tokens (`int`):
            Tokens of a step and of a whole completion. The tree is `ceil(max_tokens / step_tokens)` deep.
        trajectories (`int`):
            G, complete trajectories after which a tree is finished.
        end_tokens (`frozenset[int]`):
            Tokens that end a completion.
        selection (`str`):
            Where the search goes on after a terminal: `"frontier"`, or `"uct"`, from the root.
        uct (`float`):
            λ of the local score.
        quality, uncertainty, depth, own (`float`):
            λ1 to λ4 of the frontier's priority.
        depth_bonus (`str`):
            `"sqrt"`, `"log"` or `"linear"`.
        decay_floor (`float`):
            γ of the backup.
        incomplete_score (`float`):
            Reward of a completion without an end token that is not right.
    """

    width: int
    step_tokens: int
    max_tokens: int
    trajectories: int
    end_tokens: frozenset[int]
    selection: str = "frontier"
    uct: float = 2.0
    quality: float = 0.4
    uncertainty: float = 0.4
    depth: float = 0.01
    own: float = 0.0
    depth_bonus: str = "sqrt"
    decay_floor: float = 0.1
    incomplete_score: float = -1.0

    @property
    def max_depth(self) -> int:
        """d_T, steps of the longest completion; the last may be shorter than the others."""
        return -(-self.max_tokens // self.step_tokens)


@dataclass(eq=False)
class Node:
    """
    One step of a completion.

    Args:
        parent ([`Node`], *optional*):
            `None` for the root, which has no tokens.
        tokens (`list[int]`), logps (`list[float]`):
            The step's tokens and their log-probabilities, in nats.
        terminal (`bool`):
            Whether the completion goes no further.
        ended (`bool`):
            Whether it has an end token.
        value (`float`), visits (`int`):
            q and N.
        reward (`float`, *optional*):
            Of a verified terminal, v.
        returned (`bool`):
            Whether it is the end of one of the tree's trajectories.
    """

    parent: "Node | None" = None
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    terminal: bool = False
    ended: bool = False
    value: float = 0.0
    visits: int = 0
    reward: float | None = None
    returned: bool = False
    children: list["Node"] = field(default_factory=list)
    depth: int = field(init=False)

    def __post_init__(self):
        self.depth = 0 if self.parent is None else self.parent.depth + 1


def path(node: Node) -> list[Node]:
    """Nodes from the root to `node`."""
    nodes = [node]
    while nodes[-1].parent is not None:
        nodes.append(nodes[-1].parent)
    return nodes[::-1]


def completion(node: Node) -> list[int]:
    """Tokens from the root to the end of `node`."""
    return [token for step in path(node) for token in step.tokens]


def entropy(nodes: list[Node]) -> float:
    """Mean of -log π over the tokens of `nodes`, in nats; infinite where there is none or one is not a number."""
    logps = [logp for node in nodes for logp in node.logps]
    mean = -sum(logps) / len(logps) if logps else math.inf
    return math.inf if math.isnan(mean) else mean


def quality(node: Node) -> float:
    """Q = q / N, 0 without visits."""
    return node.value / node.visits if node.visits else 0.0


def uct(node: Node, weight: float) -> float:
    """Q + λ·√(ln N(parent) / N), whose second part is 0, as in the released code, where either was never visited."""
    if node.visits == 0 or node.parent.visits == 0:
        return quality(node)
    return quality(node) + weight * math.sqrt(math.log(node.parent.visits) / node.visits)


def priority(node: Node, rules: Rules) -> float:
    """λ1·tanh(Q(parent)) + λ2·H + λ3·D + λ4·tanh(Q): how promising it is to expand a node of the frontier (Eq. 7)."""
    bonus = {
        "sqrt": math.sqrt(node.depth / rules.max_depth),
        "log": math.log(node.depth + 1),
        "linear": node.depth,
    }[rules.depth_bonus]
    score = rules.quality * math.tanh(quality(node.parent)) + rules.depth * bonus
    if rules.own:
        score += rules.own * math.tanh(quality(node))
    if rules.uncertainty:
        score += rules.uncertainty * entropy([node])
    return score


def nodes_below(root: Node) -> list[Node]:
    """All nodes of a tree, each parent before its children, which stay in order."""
    nodes, stack = [], [root]
    while stack:
        nodes.append(stack.pop())
        stack += reversed(nodes[-1].children)
    return nodes


def frontier(root: Node) -> list[Node]:
    """Nodes that can be expanded: those not terminal and without children (Eq. 6); never the root."""
    return [n for n in nodes_below(root) if not (n.terminal or n.children) and n.parent is not None]


def descend(root: Node, weight: float) -> Node | None:
    """From the root along the largest UCT among children that lead to the frontier; `None` if none does."""
    leading = {id(node) for leaf in frontier(root) for node in path(leaf)}
    node = root if leading else None
    while node is not None and node.children:
        node = max((child for child in node.children if id(child) in leading), key=lambda n: uct(n, weight))
    return node


def preferred(terminals: list[Node]) -> Node:
    """
    The terminal to keep among verified ones: a right one, else one with an end, else any; of these, the one whose
    trajectory has the lowest entropy (Eq. 2), then the first.
    """

    def key(node: Node) -> tuple:
        return (0 if node.reward == 1.0 else 1 if node.ended else 2), entropy(path(node))

    return min(terminals, key=key)


class Tree:
    """
    The search tree of one prompt.

    Whoever grows it alternates between [`expand`] and [`judge`] until `current` is `None`; then [`add`] makes up for
    trajectories it could not find.

    Args:
        prompt_ids (`list[int]`):
            Prompt.
        rules ([`Rules`]):
            How to grow.
        grown (`bool`, *optional*, defaults to `False`):
            Whether not to search at all.
    """

    def __init__(self, prompt_ids: list[int], rules: Rules, grown: bool = False):
        self.prompt_ids = prompt_ids
        self.rules = rules
        self.root = Node()
        self.current: Node | None = None if grown else self.root
        self.returned: list[Node] = []
        self.iterations = 0
        self.sampled_tokens = 0

    @property
    def missing(self) -> int:
        """Trajectories that are still to be found."""
        return self.rules.trajectories - len(self.returned)

    def expand(self, tokens: list[list[int]], logps: list[list[float]]) -> list[Node]:
        """
        Give the current node its children.

        Args:
            tokens (`list[list[int]]`), logps (`list[list[float]]`):
                Of each child.

        Returns:
            `list[Node]`: those among them that are terminal, which [`judge`] wants verified.
        """
        rules, depth = self.rules, self.current.depth + 1
        room = min(rules.step_tokens, rules.max_tokens - self.current.depth * rules.step_tokens)
        for step, step_logps in zip(tokens, logps, strict=True):
            self.sampled_tokens += len(step)
            step, step_logps = step[:room], step_logps[:room]
            ended = bool(step) and step[-1] in rules.end_tokens
            # A step that stops early has met a stop of the sampler's
            terminal = ended or len(step) < room or depth == rules.max_depth
            self.current.children.append(Node(self.current, step, step_logps, terminal, ended))
        self.iterations += 1
        return [child for child in self.current.children if child.terminal]

    def judge(self, correct: list[bool]) -> None:
        """
        Take in which of the new terminals are right, keep one of them, and choose the node to expand next.

        Args:
            correct (`list[bool]`):
                One per terminal that [`expand`] returned.
        """
        terminals = [child for child in self.current.children if child.terminal]
        for child in self.current.children:
            child.visits += not child.terminal
        for node, right in zip(terminals, correct, strict=True):
            self._reward(node, right)
        if not terminals:
            self.current = max(self.current.children, key=lambda node: uct(node, self.rules.uct))
            return
        self._keep(preferred(terminals))
        self.current = self._select() if self.missing else None
        if self.current is None:
            self._keep_more()

    def add(self, tokens: list[int], logps: list[float], correct: bool) -> None:
        """Add a whole completion that was not found by the search, as one step from the root, and keep it."""
        ended = bool(tokens) and tokens[-1] in self.rules.end_tokens
        node = Node(self.root, tokens, logps, terminal=True, ended=ended)
        self.root.children.append(node)
        self._reward(node, correct)
        self._keep(node)

    def _reward(self, node: Node, correct: bool) -> None:
        node.reward = 1.0 if correct else -1.0 if node.ended else self.rules.incomplete_score

    def _keep(self, node: Node) -> None:
        node.returned = True
        self.returned.append(node)
        nodes = path(node)
        values = torch.tensor([n.value for n in nodes], dtype=torch.float64)
        for n, value in zip(nodes, back_up(values, node.reward, self.rules.decay_floor).tolist(), strict=True):
            n.value, n.visits = value, n.visits + 1

    def _select(self) -> Node | None:
        if self.rules.selection == "uct":
            return descend(self.root, self.rules.uct)
        return max(frontier(self.root), key=lambda node: priority(node, self.rules), default=None)

    def _keep_more(self) -> None:
        """With nothing left to expand, terminals that were not kept are trajectories as good as any."""
        left = [node for node in nodes_below(self.root) if node.terminal and not node.returned]
        while left and self.missing:
            node = preferred(left)
            left.remove(node)
            self._keep(node)
