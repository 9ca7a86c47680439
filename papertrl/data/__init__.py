"""Formats of preference data, and the ways between them."""

from .converters import (
    as_messages,
    as_text,
    conversations_to_feedback,
    conversations_to_pairs,
    explicit_prompts,
    pairs_to_rankings,
    rankings_to_pairs,
    to_format,
    unpaired_to_pairs,
)
from .formats import FORMATS, check_preference_rows, detect_format

__all__ = [
    "FORMATS",
    "as_messages",
    "as_text",
    "check_preference_rows",
    "conversations_to_feedback",
    "conversations_to_pairs",
    "detect_format",
    "explicit_prompts",
    "pairs_to_rankings",
    "rankings_to_pairs",
    "to_format",
    "unpaired_to_pairs",
]
