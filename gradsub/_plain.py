"""Parameters without subspaces: the base optimizer steps them, and what it may not move is put back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradsub._guard import Guard
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

    def protect(self, vector: Tensor, protected: Tensor | None, state: State) -> None:
        """Protect these directions of a vector from now on.

        Args:
            protected: K (d x k), orthonormal; of a sharded vector for all of its entries. None lets it move freely.
        """
        if protected is None:
            self._shards.pop(vector, None)
        else:
            self._shards[vector] = shards_of(vector, "a protected vector")
            state[vector][PROTECTED] = protected.to(vector.device)

    @contextmanager
    def held(self, guard: Guard, state: State) -> Iterator[None]:
        """A step in here moves no vector along what is protected, what the null space learnt of it since included."""
        stepped = [vector for vector in self._shards if vector.grad is not None]
        for vector in stepped:
            if guard.outdated(vector):
                self.protect(vector, guard.renewed(vector, state[vector][PROTECTED]), state)
        before = [local(vector).clone() for vector in stepped]
        try:
            yield
        finally:
            self._take_back(stepped, before, [self._rows(vector, state[vector][PROTECTED]) for vector in stepped])

    def _take_back(self, vectors: list[Tensor], before: list[Tensor], bases: list[Tensor]) -> None:
        olds = [old.to(K.dtype) for old, K in zip(before, bases, strict=True)]
        changes = [local(vector).to(old.dtype) - old for vector, old in zip(vectors, olds, strict=True)]
        inside = self._over_ranks(vectors, [K.mT @ change for K, change in zip(bases, changes, strict=True)])
        for vector, old, K, change, along in zip(vectors, olds, bases, changes, inside, strict=True):
            local(vector).copy_(old + torch.addmv(change, K, along, alpha=-1.0))

    def _rows(self, vector: Tensor, protected: Tensor) -> Tensor:
        """The rows of K for the entries that are here."""
        shards = self._shards[vector]
        return protected if shards is None else protected[shards.start : shards.stop]

    def _over_ranks(self, vectors: list[Tensor], parts: list[Tensor]) -> list[Tensor]:
        """K^T step of whole vectors, from those of the entries on each rank; one sum for all that are on the same."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for position, vector in enumerate(vectors):
            shards = self._shards[vector]
            if shards is not None and shards.group is not None:
                groups[shards.group, parts[position].dtype].append(position)
        for (group, _), positions in groups.items():
            summed = torch.cat([parts[position] for position in positions])
            sum_over(group, [summed])
            for position, part in zip(positions, torch.split(summed, [len(parts[p]) for p in positions]), strict=True):
                parts[position] = part
        return parts


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
    def held(self, guard: Guard, plain: Iterable[Tensor]) -> Iterator[None]:
        """A step of these parameters in here leaves the rows as they were; also those that were named since."""
        for parameter in plain:
            if parameter.ndim == 2 and parameter.grad is not None:
                free = guard.resting(parameter)
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
