"""Formats of preference data, and the ways between them."""

from .converters import (
    as_messages,
    as_text,
    check_prompt_is_read,
    conversations_to_feedback,
    conversations_to_pairs,
    explicit_prompts,
    pairs_to_rankings,
    rankings_to_pairs,
    to_format,
    unpaired_to_pairs,
)
from .files import read_files
from .formats import FORMATS, check_preference_rows, detect_format
from .rows import check_prompts, check_texts

__all__ = [
    "FORMATS",
    "as_messages",
    "as_text",
    "check_preference_rows",
    "check_prompt_is_read",
    "check_prompts",
    "check_texts",
    "conversations_to_feedback",
    "conversations_to_pairs",
    "detect_format",
    "explicit_prompts",
    "pairs_to_rankings",
    "rankings_to_pairs",
    "read_files",
    "to_format",
    "unpaired_to_pairs",
]
