"""
Search trees as JSON, and as a picture.

    python -m papertrl.samplers.trees.dump trees/step_000000.json --tree 0 --out tree.png
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .tree import Tree, entropy, nodes_below, quality

LABELED = 60
LONGEST = 12


def tree_as_dict(tree: Tree, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """
    A tree in plain values.

    Args:
        tree ([`Tree`]):
            Tree.
        decode (`Callable`):
            Tokens → text.

    Returns:
        `dict`: `prompt`, `iterations`, `sampled_tokens` and `nodes`. The root comes first and every parent before its
            children; a node has `parent` (its place in the list), `text`, `tokens` (how many), `depth`, `visits`, `q`,
            `quality` (q per visit), `entropy`, `terminal`, `ended`, `reward` and `returned` (its place among the
            trajectories), the last three `None` where they do not apply.
    """
    nodes = nodes_below(tree.root)
    place = {id(node): i for i, node in enumerate(nodes)}
    order = {id(node): i for i, node in enumerate(tree.returned)}
    return {
        "prompt": decode(tree.prompt_ids),
        "iterations": tree.iterations,
        "sampled_tokens": tree.sampled_tokens,
        "nodes": [
            {
                "parent": None if node.parent is None else place[id(node.parent)],
                "text": decode(node.tokens),
                "tokens": len(node.tokens),
                "depth": node.depth,
                "visits": node.visits,
                "q": node.value,
                "quality": quality(node),
                "entropy": value if (value := entropy([node])) < float("inf") else None,
                "terminal": node.terminal,
                "ended": node.ended if node.terminal else None,
                "reward": node.reward,
                "returned": order.get(id(node)),
            }
            for node in nodes
        ],
    }


def draw(tree: dict[str, Any], out: Path) -> None:
    """
    Draw a tree: value q as color, visits as size, right trajectories as stars, other kept ones as squares.

    Args:
        tree (`dict`):
            From [`tree_as_dict`].
        out (`Path`):
            PNG file to write.
    """
    nodes = tree["nodes"]
    across = _positions(nodes)
    leaves, deepest = max(across) + 1, max(node["depth"] for node in nodes)
    figure = Figure(figsize=(max(6.0, min(40.0, 0.35 * leaves)), 2.0 + 1.1 * deepest), layout="constrained")
    axes = figure.subplots()
    for x, node in zip(across, nodes, strict=True):
        if node["parent"] is not None:
            parent = node["parent"]
            axes.plot([across[parent], x], [nodes[parent]["depth"], node["depth"]], color="0.8", lw=0.8, zorder=1)
    for marker, wanted in (("o", None), ("s", False), ("*", True)):
        chosen = [i for i, node in enumerate(nodes) if _kept(node) is wanted]
        shown = axes.scatter(
            [across[i] for i in chosen],
            [nodes[i]["depth"] for i in chosen],
            c=[nodes[i]["q"] for i in chosen],
            s=[30 + 25 * min(nodes[i]["visits"], 10) + 90 * (marker == "*") for i in chosen],
            marker=marker,
            cmap="RdYlGn",
            norm=Normalize(-1, 1),
            edgecolors="0.3",
            linewidths=0.6,
            zorder=2,
        )
    if len(nodes) <= LABELED:
        for x, node in zip(across, nodes, strict=True):
            axes.annotate(
                node["text"][:LONGEST],
                (x, node["depth"]),
                (0, -14),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.invert_yaxis()
    axes.set_ylabel("step")
    axes.set_xticks([])
    axes.set_title(
        f"{tree['prompt'][-60:]}   {tree['iterations']} expansions, {tree['sampled_tokens']} tokens", fontsize=9
    )
    figure.colorbar(shown, ax=axes, label="q", shrink=0.6)
    figure.savefig(out, dpi=100)


def _kept(node: dict[str, Any]) -> bool | None:
    """Whether a kept trajectory is right; `None` for other nodes."""
    return None if node["returned"] is None else node["reward"] == 1.0


def _positions(nodes: list[dict[str, Any]]) -> list[float]:
    """Place across of every node: leaves side by side, parents in the middle of their children."""
    children: list[list[int]] = [[] for _ in nodes]
    for i, node in enumerate(nodes):
        if node["parent"] is not None:
            children[node["parent"]].append(i)
    across = [0.0] * len(nodes)
    leaves = 0
    for i, below in enumerate(children):
        if not below:
            across[i] = leaves
            leaves += 1
    for i in reversed(range(len(nodes))):
        if children[i]:
            across[i] = sum(across[child] for child in children[i]) / len(children[i])
    return across


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw a search tree that DeepSearch wrote to `tree_dump_dir`.")
    parser.add_argument("dump", type=Path, help="JSON file")
    parser.add_argument("--tree", type=int, default=0, help="which tree of the file")
    parser.add_argument("--out", type=Path, help="PNG file to write (default: next to the dump)")
    args = parser.parse_args(argv)
    trees = json.loads(args.dump.read_text(encoding="utf-8"))["trees"]
    if not 0 <= args.tree < len(trees):
        parser.error(f"--tree must be in [0, {len(trees) - 1}], got {args.tree}")
    out = args.out or args.dump.with_suffix(".png")
    draw(trees[args.tree], out)
    print(out)


if __name__ == "__main__":
    main()
