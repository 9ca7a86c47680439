"""DRIFT (arXiv:2510.02341): which sampled answers may stand against an answer that a user rejected."""

from typing import Literal

Reason = Literal["empty", "identical", "unfinished"]


def unusable(chosen: str, rejected: str, finished: bool, drop_unfinished: bool) -> Reason | None:
    """
    Why a sampled answer makes no pair with the rejected one, or `None` if it makes one.

    A pair of equal answers has no gradient under any loss of their difference, and an empty chosen answer teaches to
    say nothing. The paper's code filters neither. White space around an answer does not count.

    Args:
        chosen (`str`):
            Sampled answer, y⁺.
        rejected (`str`):
            Answer that the user was not satisfied with, y⁻.
        finished (`bool`):
            Whether the sampled answer ended by itself.
        drop_unfinished (`bool`):
            Whether it must have.
    """
    if not chosen.strip():
        return "empty"
    if chosen.strip() == rejected.strip():
        return "identical"
    return "unfinished" if drop_unfinished and not finished else None
