"""Norm weights and biases that a null space knows: the base optimizer steps them, and each step is projected."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradsub._layout import Layout
from gradsub._sums import sum_over
from gradsub.subspace import Shards, local, shards_of
from gradsub.update import PROTECTED

State = MutableMapping[Tensor, Any]


class ProtectedVectors:
    """Keeps every step of some vectors v (d) inside their null spaces: v <- v + (I - K K^T) step.

    A vector needs no subspace, since its optimizer's state is as small as itself. So its base optimizer steps it as it
    is, weight decay included, and what the step did along K is taken back. K (d x k) is in the vector's state, so that
    a resumed run protects the same.
    """

    def __init__(self) -> None:
        self._shards: dict[Tensor, Shards | None] = {}
        self._state: State = {}

    def attach(self, state: State) -> None:
        """Tell where the optimizer's state is."""
        self._state = state

    def protect(self, vector: Tensor, protected: Tensor | None) -> None:
        """Protect these directions of a vector from now on.

        Args:
            vector: a parameter that the base optimizer steps.
            protected: K (d x k), orthonormal; of a sharded vector for all of its entries. None lets it move freely.
        """
        if protected is None:
            self._shards.pop(vector, None)
        else:
            self._shards[vector] = shards_of(vector, "a protected vector")
            self._state[vector][PROTECTED] = protected.to(vector.device)

    @contextmanager
    def held(self, layout: Layout) -> Iterator[None]:
        """A step in here moves no vector along what is protected of it, what the null space learnt since included."""
        stepped = [vector for vector in self._shards if vector.grad is not None]
        for vector in stepped:
            if layout.outdated(vector):
                self.protect(vector, layout.renewed(vector, self._state[vector][PROTECTED]))
        before = [local(vector).clone() for vector in stepped]
        yield
        self._take_back(stepped, before)

    def _take_back(self, vectors: list[Tensor], before: list[Tensor]) -> None:
        bases = [self._rows(vector) for vector in vectors]
        changes = [(local(vector) - old).to(K.dtype) for vector, old, K in zip(vectors, before, bases, strict=True)]
        inside = [K.mT @ change for K, change in zip(bases, changes, strict=True)]
        self._sum_over_ranks(vectors, inside)
        for vector, old, K, change, along in zip(vectors, before, bases, changes, inside, strict=True):
            local(vector).copy_(old + torch.addmv(change, K, along, alpha=-1.0))

    def _rows(self, vector: Tensor) -> Tensor:
        """The rows of K for the entries that are here."""
        shards = self._shards[vector]
        protected: Tensor = self._state[vector][PROTECTED]
        return protected if shards is None else protected[shards.start : shards.stop]

    def _sum_over_ranks(self, vectors: list[Tensor], parts: list[Tensor]) -> None:
        divided = [part for vector, part in zip(vectors, parts, strict=True) if self._group(vector) is not None]
        group = next((group for vector in vectors if (group := self._group(vector)) is not None), None)
        if group is not None:
            sum_over(group, divided)

    def _group(self, vector: Tensor) -> Any:
        shards = self._shards[vector]
        return None if shards is None else shards.group
