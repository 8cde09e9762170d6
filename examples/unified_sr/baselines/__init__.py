"""Rankings without any language model: what a run of one has to beat before its numbers mean anything."""

from __future__ import annotations

from ._bm25 import Bm25
from ._ease import ease_weights
from ._interactions import histories, interactions
from ._sasrec import ItemSequence, SasRec, train_sasrec

__all__ = ["Bm25", "ItemSequence", "SasRec", "ease_weights", "histories", "interactions", "train_sasrec"]
