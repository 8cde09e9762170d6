"""BM25 (bm25s) of the query's words in the items' titles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data import Item

Array = np.ndarray[Any, np.dtype[np.float32]]


class Bm25:
    """Scores every title for a query.

    Words are lower-cased runs of letters and digits, without stemming and without a list of stop words: the inverse
    document frequency already makes frequent words count little, and such lists hold whole titles ("It").

    Args:
        items: the catalogue.
        k1: how slowly repeated words saturate.
        b: how much long titles are held back, between 0 and 1.
    """

    def __init__(self, items: Sequence[Item], k1: float, b: float) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ImportError("the method 'bm25' needs bm25s: pip install 'gradsub[examples]'") from error
        self._bm25s: Any = bm25s
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        self._index.index(self._words([item.title for item in items]), show_progress=False)

    def __call__(self, queries: Sequence[str]) -> Array:
        """Return (queries, items); all zeros for a query of which no word is in any title."""
        found: list[Array] = []
        for words in self._words(queries):
            known = [word for word in words if word and word in self._index.vocab_dict]
            found.append(self._index.get_scores(known) if known else np.zeros(self._index.scores["num_docs"]))
        return np.stack(found).astype(np.float32)

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        # A text without words is one empty word: bm25s can index nothing of which all parts are empty.
        words: list[list[str]] = self._bm25s.tokenize(
            list(texts), token_pattern=r"\w+", stopwords=[], return_ids=False, show_progress=False, allow_empty=False
        )
        return words
