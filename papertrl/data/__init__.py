"""Data: what a job trains on, and the formats of preference data with the ways between them."""

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
from .job import JobData, check_reward_columns, dataset_data, load_splits, task_data, task_of

__all__ = [
    "FORMATS",
    "JobData",
    "as_messages",
    "as_text",
    "check_preference_rows",
    "check_reward_columns",
    "conversations_to_feedback",
    "conversations_to_pairs",
    "dataset_data",
    "detect_format",
    "explicit_prompts",
    "load_splits",
    "pairs_to_rankings",
    "rankings_to_pairs",
    "task_data",
    "task_of",
    "to_format",
    "unpaired_to_pairs",
]
