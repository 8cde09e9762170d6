"""General-domain English for the null space and for perplexity."""

from __future__ import annotations


def load_general_text(path: str | None = None) -> tuple[str, str]:
    """Return two disjoint texts: one to fit the null space on, one held out for perplexity.

    Args:
        path: a UTF-8 text file; ``None`` takes the prose of Python's own ``pydoc_data.topics``.
    """
    raise NotImplementedError
