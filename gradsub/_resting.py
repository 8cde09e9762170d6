"""Rows of an embedding that rest, bit for bit, whatever the base optimizer does to the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gradsub.subspace import local, shards_of


class RestingRows:
    """Puts the rows of tokens that general text uses back after every step: no gradient, moment or decay moves them.

    Masking their gradient would not do: decay and moments move rows without one.
    """

    def __init__(self) -> None:
        self._free: dict[Tensor, Tensor] = {}

    def hold(self, embedding: Tensor, free: Tensor | None) -> None:
        """From now on only ``free`` rows (V, of truth values) of ``embedding`` (V x d) move; None: all of them."""
        if free is None:
            self._free.pop(embedding, None)
            return
        shards = shards_of(embedding, "an embedding")
        mine = free if shards is None else free[shards.start : shards.stop]
        self._free[embedding] = mine[:, None].to(embedding.device)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A step in here leaves them as they were."""
        stepped = [embedding for embedding in self._free if embedding.grad is not None]
        before = [local(embedding).clone() for embedding in stepped]
        try:
            yield
        finally:
            for embedding, old in zip(stepped, before, strict=True):
                free, here = self._free[embedding], local(embedding)
                if free.device != here.device:
                    free = self._free[embedding] = free.to(here.device)
                here.copy_(torch.where(free, here, old))
