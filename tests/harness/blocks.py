"""Pairs by blocks: few runs of many methods each, in which every pair that combines meets."""

from collections.abc import Callable, Iterable
from itertools import combinations


def blocks(names: list[str], combine: Callable[[str, str], bool]) -> list[tuple[str, ...]]:
    """
    Sets of methods that combine, in one of which every pair that does meets.

    Args:
        names (`list[str]`):
            Methods.
        combine (`Callable`):
            Whether two of them do.
    """
    open_pairs = {frozenset(pair) for pair in combinations(names, 2) if combine(*pair)}
    found = []
    while open_pairs:
        first = min(open_pairs, key=lambda pair: sorted(map(names.index, pair)))
        block = sorted(first, key=names.index)
        while True:
            # Of those that combine with all, the one that closes most pairs
            fitting = [n for n in names if n not in block and all(combine(n, other) for other in block)]
            closing = {n: sum(frozenset((n, other)) in open_pairs for other in block) for n in fitting}
            if not closing or max(closing.values()) == 0:
                break
            block.append(max(fitting, key=closing.get))
        open_pairs -= {frozenset(pair) for pair in combinations(block, 2)}
        found.append(tuple(sorted(block, key=names.index)))
    return found


def culprits(block: Iterable[str], run: Callable[[tuple[str, ...]], None]) -> tuple[str, ...]:
    """
    The smallest part of a failing block that still fails, found by leaving out what it fails without.

    Args:
        block (`Iterable[str]`):
            Methods whose run fails.
        run (`Callable`):
            Runs methods, and raises if they fail.
    """
    left = list(block)
    for name in list(left):
        without = tuple(n for n in left if n != name)
        if not without:
            break
        try:
            run(without)
        except Exception:
            left = list(without)
    return tuple(left)
