"""Reward functions with TRL's signature."""

from .calling import call_rewards
from .checked import RewardError, checked
from .length_shaping import boxed_format, cosine_length, relative_length
from .matching import boxed_match, exact_match, last_number_match
from .registry import load_reward

__all__ = [
    "RewardError",
    "boxed_format",
    "boxed_match",
    "call_rewards",
    "checked",
    "cosine_length",
    "exact_match",
    "last_number_match",
    "load_reward",
    "relative_length",
]
