"""Growing the trees of many prompts in lockstep: each round of sampling and verification serves all of them."""

from collections.abc import Callable
from itertools import accumulate

from .tree import Rules, Tree, completion

# (prompts, completions of each, most tokens) → tokens and log-probabilities, the completions of a prompt together
Sample = Callable[[list[list[int]], list[int], int], tuple[list[list[int]], list[list[float]]]]
# (number of a tree, tokens of a completion) → whether each is right
Verify = Callable[[list[tuple[int, list[int]]]], list[bool]]


def grow(trees: list[Tree], rules: Rules, sample: Sample, verify: Verify, largest: Callable[[int], int] = int) -> None:
    """
    Grow `trees` until each is finished, then fill those up that found too few trajectories.

    Every process calls `sample` and `verify` equally often, with empty lists where it has nothing to do, so that both
    may be collective.

    Args:
        trees (`list[Tree]`):
            One per prompt; none at all on a process without prompts.
        rules ([`Rules`]):
            Those of all trees.
        sample (`Callable`):
            Samples completions of prompts.
        verify (`Callable`):
            Says which completions are right.
        largest (`Callable`, *optional*):
            Largest of a number over all processes.
    """
    while largest(sum(tree.current is not None for tree in trees)):
        growing = [i for i, tree in enumerate(trees) if tree.current is not None]
        prefixes = [trees[i].prompt_ids + completion(trees[i].current) for i in growing]
        steps, logps = sample(prefixes, [rules.width] * len(growing), rules.step_tokens)
        asked = []
        for i, part in zip(growing, parts([rules.width] * len(growing)), strict=True):
            asked.append(trees[i].expand(steps[part], logps[part]))
        correct = verify([(i, completion(node)) for i, new in zip(growing, asked, strict=True) for node in new])
        for i, part in zip(growing, parts([len(new) for new in asked]), strict=True):
            trees[i].judge(correct[part])
    _fill(trees, rules, sample, verify, largest)


def _fill(trees: list[Tree], rules: Rules, sample: Sample, verify: Verify, largest: Callable[[int], int]) -> None:
    if not largest(sum(tree.missing for tree in trees)):
        return
    lacking = [i for i, tree in enumerate(trees) if tree.missing]
    counts = [trees[i].missing for i in lacking]
    tokens, logps = sample([trees[i].prompt_ids for i in lacking], counts, rules.max_tokens)
    owners = [i for i, count in zip(lacking, counts, strict=True) for _ in range(count)]
    correct = verify(list(zip(owners, tokens, strict=True)))
    for i, *found in zip(owners, tokens, logps, correct, strict=True):
        trees[i].sampled_tokens += len(found[0])
        trees[i].add(*found)


def parts(counts: list[int]) -> list[slice]:
    """Consecutive slices of the given lengths."""
    ends = list(accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
