"""Rows of an embedding that rest, bit for bit, whatever the base optimizer does to the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gradsub._layout import Layout
from gradsub.subspace import local, shards_of


class RestingRows:
    """Puts the rows of tokens that general text uses back after every step: no gradient, moment or decay moves them.

    Masking their gradient would not do: decay and moments move rows without one.
    """

    def __init__(self) -> None:
        self._free: dict[Tensor, Tensor] = {}
        self._given: dict[Tensor, Tensor] = {}

    def hold(self, embedding: Tensor, free: Tensor | None) -> None:
        """From now on only ``free`` rows (V, of truth values) of ``embedding`` (V x d) move; None: all of them."""
        if free is None:
            self._free.pop(embedding, None)
            self._given.pop(embedding, None)
            return
        shards = shards_of(embedding, "an embedding")
        mine = free if shards is None else free[shards.start : shards.stop]
        self._free[embedding] = mine[:, None].to(embedding.device)
        self._given[embedding] = free

    @contextmanager
    def held(self, layout: Layout, plain: Iterable[Tensor]) -> Iterator[None]:
        """A step of these parameters in here leaves the rows as they were; also those that were named since."""
        for parameter in plain:
            if parameter.ndim == 2 and parameter.grad is not None:
                free = layout.resting(parameter)
                if free is not self._given.get(parameter):
                    self.hold(parameter, free)
        stepped = [embedding for embedding in self._free if embedding.grad is not None]
        before = [local(embedding).clone() for embedding in stepped]
        try:
            yield
        finally:
            for embedding, old in zip(stepped, before, strict=True):
                free, here = self._free[embedding], local(embedding)
                if free.device != here.device:
                    free = self._free[embedding] = free.to(here.device)
                torch.where(free, here, old, out=here)
