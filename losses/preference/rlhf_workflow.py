"""Which two of a prompt's completions make a pair, in RLHF Workflow."""

from collections.abc import Sequence

CHOOSE_TYPES = ("max_min", "max_random", "max_max", "max_min_p")


def choose_pair(
    scores: Sequence[float],
    lengths: Sequence[int],
    choose_type: str = "max_min",
    length_penalty: float = 0.0,
    order_by: str = "penalized",
) -> tuple[int, int] | None:
    """
    Places of the chosen and of the rejected completion among the n of a prompt.

    - `max_min`: argmax r and argmin r
    - `max_random`: argmax r and the first other one, which is one at random, as the n are drawn alike
    - `max_max`: argmax r and the best of the others
    - `max_min_p`: argmax r̃ and argmin r̃ with r̃ = r − λ·|y|

    Of equals, the first. Two of the same r make no pair.

    Source: arXiv:2405.07863, rejection sampling of the online loop; the options are those of the authors' code, which
    measures |y| in characters.

    Args:
        scores (`Sequence[float]`):
            r of each completion, finite.
        lengths (`Sequence[int]`):
            |y| of each, in tokens.
        choose_type (`str`, *optional*, defaults to `"max_min"`):
            One of the above.
        length_penalty (`float`, *optional*, defaults to `0.0`):
            λ of `max_min_p`, in score per token.
        order_by (`str`, *optional*, defaults to `"penalized"`):
            What decides which of the two that `max_min_p` picked is the chosen one: r̃, or `"raw"` for r, as in the
            authors' code, where the penalized winner can become the rejected one.

    Returns:
        `tuple[int, int]`, or `None` if fewer than two completions are there or the two have the same r.
    """
    if len(scores) < 2:
        return None
    places = range(len(scores))
    by = list(scores)
    if choose_type == "max_min_p":
        by = [score - length_penalty * length for score, length in zip(scores, lengths, strict=True)]
    chosen = max(places, key=by.__getitem__)
    if choose_type in ("max_min", "max_min_p"):
        rejected = min(places, key=by.__getitem__)
    else:
        others = [place for place in places if place != chosen]
        rejected = others[0] if choose_type == "max_random" else max(others, key=by.__getitem__)
    if scores[chosen] == scores[rejected]:
        return None
    if order_by == "raw" and scores[chosen] < scores[rejected]:
        return rejected, chosen
    return chosen, rejected
