"""Reward functions with TRL's signature."""

from .checked import RewardError, checked
from .matching import exact_match, last_number_match
from .registry import load_reward

__all__ = ["RewardError", "checked", "exact_match", "last_number_match", "load_reward"]
