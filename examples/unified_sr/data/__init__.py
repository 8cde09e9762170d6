"""Data of the unified search and recommendation example."""

from __future__ import annotations

from ._types import TASKS, Dataset, Example, Item

__all__ = ["TASKS", "Dataset", "Example", "Item", "format_statistics", "load_dataset"]


def load_dataset(
    source: str,
    *,
    min_user_events: int = 5,
    min_item_events: int = 5,
    max_history: int = 20,
    seed: int = 0,
    repeats: str = "drop",
) -> Dataset:
    """Load ``"movielens-100k"`` or a folder of RecBole atomic files."""
    raise NotImplementedError


def format_statistics(dataset: Dataset) -> str:
    """Return the data set's statistics as a plain-text table."""
    raise NotImplementedError
