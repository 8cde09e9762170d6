"""The model half: a pre-trained language model, one new token per catalogue item, and prompts that end in an item."""

from __future__ import annotations

from ._batch import Batch, Collator, length_buckets
from ._load import SMOLLM2, LanguageModel, load_language_model, packaged_model
from ._prompts import PromptBuilder, SequenceBuilder, surrounding_tokens
from ._ranker import Ranker

__all__ = [
    "SMOLLM2",
    "Batch",
    "Collator",
    "LanguageModel",
    "PromptBuilder",
    "Ranker",
    "SequenceBuilder",
    "length_buckets",
    "load_language_model",
    "packaged_model",
    "surrounding_tokens",
]
