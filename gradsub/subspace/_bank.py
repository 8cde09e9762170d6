from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from gradsub.linalg._arithmetic import full_precision, product
from gradsub.linalg._gaussian import gaussian
from gradsub.linalg._orthonormal import _orthonormalize_unchecked
from gradsub.linalg._room import Room
from gradsub.subspace._basis import dominant_basis, sketched_basis
from gradsub.subspace._block import Block, Rotation, pieces
from gradsub.subspace._layer import Layer
from gradsub.subspace._protected import Protected, side_by_side
from gradsub.subspace._schedule import SKETCHES_PER_REFRESH, next_multiple, next_place, own_place
from gradsub.subspace._verdicts import Verdicts

SHARED = 0

# What a layer's state holds only if the layer is sketched.
SKETCHES = frozenset({"singular_values", "sketches", "usable"})

# In the place of a subspace, for random numbers that belong to none.
_DIRECTIONS = 1 << 16

# Rows of a block, and a stack of one matrix for each of them.
Rows: TypeAlias = "tuple[Sequence[int], Tensor]"


class SubspaceBank:
    """Every layer's bases, and when each is due for a refresh; all of it lies in the blocks and shows in the state.

    A layer's state holds ``"step"`` (a count of the layer's steps, 0-dim, int64, CPU), ``"basis"`` (d x sum of widths:
    the shared basis, then one a task) and ``"next_refresh"`` (the step at which each basis is due, int64, CPU). A basis
    that could not be refreshed when it was due, because its gradient was absent, zero or protected as a whole, stays as
    it is and stays due.

    There are two kinds of refresh. An exact one (`refresh`) decomposes the whole gradient before the step. A sketched
    one (`renew`) takes the basis after the step from Y = G^T Omega with a Gaussian Omega, and improves it with a second
    sketch one step later. A sketched layer's state also holds ``"singular_values"`` (of the first sketch, one a
    column), ``"sketches"`` (how many of a refresh's sketches were taken, int64, CPU) and ``"usable"`` (whether the last
    one was). The device decides what is usable; the schedule assumes that it is, and is put right one step later, when
    reading the decision does not keep the device waiting. Both refresh all layers of a
    block together, with the same random numbers.

    Args:
        orthogonalize: ``"none"``, or ``"shared_first"``: task bases are orthogonal to the shared one.
        seed: with the block, the subspace and the step it determines every random number.
        together: whether blocks take no turns, so that there are few kinds of steps, as torch.compile makes a graph of
            each.
    """

    def __init__(self, orthogonalize: str, seed: int, together: bool = False) -> None:
        self._shared_first = orthogonalize == "shared_first"
        self._together = together
        self._seed = seed
        self._directions: dict[Hashable, Tensor] = {}
        self._verdicts = Verdicts()

    def initialise(self, block: Block) -> None:
        """The first bases, all of them due.

        Zero ones where the first gradient is decomposed before it is used: until then nothing moves. Random ones where
        it is sketched, since the first step is taken before its sketch is there.
        """
        first = block.first
        subspaces = len(first.widths)
        block.add("step", dtype=torch.int64, device="cpu")
        block.add("basis", (first.dimension, sum(first.widths)))
        block.add("next_refresh", (subspaces,), dtype=torch.int64, device="cpu")
        if not first.sketched:
            return
        block.add("singular_values", (sum(first.widths),))
        block.add("sketches", (subspaces,), dtype=torch.int64, device="cpu")
        block.add("usable", (subspaces,), dtype=torch.bool, fill=True)
        for piece in self._pieces(block, range(len(block))):
            for subspace in range(subspaces):
                kept = piece.kept[subspace]
                if not kept:
                    continue
                generator = self._generator(block, subspace, 0)
                random = gaussian(first.dimension, kept, like=block.stacks["basis"], generator=generator)
                new = block.stacks["basis"].new_zeros(len(piece.rows), first.dimension, first.widths[subspace])
                room = self._room(block, piece, piece.rows, subspace)
                with full_precision(block.device):
                    random = room.enter(random.expand(len(piece.rows), -1, -1))
                new[:, :, :kept] = _orthonormalize_unchecked(random, room, generator)
                block.basis(subspace)[list(piece.rows)] = new

    def basis(self, layer: Layer, subspace: int) -> Tensor:
        """The subspace's basis (d x r), a view."""
        return layer.block.stacks["basis"][layer.row][:, layer.columns(subspace)]

    def columns(self, layer: Layer, subspace: int, free: int | None = None) -> int:
        """How many columns of the subspace's basis find room beside what is forbidden; the others are zero.

        Args:
            layer: the layer.
            subspace: its index.
            free: how many directions are not protected; None: as now.
        """
        free = layer.free if free is None else free
        if self._beside_shared(subspace):
            free -= min(layer.widths[SHARED], free)
        return min(layer.widths[subspace], free)

    def _beside_shared(self, subspace: int) -> bool:
        """Whether the subspace's basis is orthogonal to the shared one."""
        return self._shared_first and subspace != SHARED

    def due(self, block: Block) -> Any:
        """Which rows (L) should refresh which subspaces (S) in this step: an array of booleans."""
        return block.array("step")[:, None] >= block.array("next_refresh")

    def demand(self, layer: Layer, task: int) -> tuple[bool, bool]:
        """What a capture has to leave of a task's gradient: the whole of it, or beside its projections a sketch."""
        return self.demand_if(layer, self.due_for(layer.block, task))

    @staticmethod
    def demand_if(layer: Layer, rows: Any) -> tuple[bool, bool]:
        """The same, once it is known which rows of the layer's block are due, see `due_for`."""
        due = rows is not None and bool(rows[layer.row])
        return due and not layer.sketched, due and layer.sketched

    def due_for(self, block: Block, task: int) -> Any:
        """Which rows (L) have to refresh the shared or the task's own subspace; None if there is none."""
        step, places = block.array("step"), block.array("next_refresh")
        due = (step >= places[:, SHARED]) | (step >= places[:, task + 1])
        return due if due.any() else None

    def at_place(self, block: Block, gap: int) -> Sequence[int]:
        """The rows for which this step is the first, or the one in ``gap`` steps in which their bases are due."""
        steps = block.array("step")
        place = own_place(gap, self._turn(block)) if block.first.sketched else 0
        found: Sequence[int] = ((steps == 0) | (steps % gap == place)).nonzero()[0].tolist()
        return found

    def _turn(self, block: Block) -> int:
        return 0 if self._together else block.turn

    def directions(self, layer: Layer) -> Tensor:
        """Omega (codimension x c), Gaussian: through which directions a sketch looks at the gradient.

        It is the same for all tasks, for all layers of a block, and for the whole step, so that sketches of several
        backward passes add up.
        """
        step = int(layer.block.array("step")[layer.row])
        size, device, dtype = layer.sketch_size, layer.parameter.device, layer.dtype
        key = (layer.block.turn, step, device, dtype)
        if key not in self._directions:
            if size == layer.codimension:
                found = torch.eye(size, dtype=dtype, device=device)
            else:
                generator = self._generator(layer.block, _DIRECTIONS, step)
                like = layer.block.stacks["basis"]
                found = gaussian(layer.codimension, size, like=like, generator=generator) / size**0.5
            self._directions[key] = found
        return self._directions[key]

    def forget_directions(self) -> None:
        """The step is over."""
        self._directions.clear()

    def enforce(self, layer: Layer) -> None:
        """Keep bases that came from elsewhere out of the protected directions, and let them be refreshed soon.

        A checkpoint may know of no null space; bases that obey this one stay bit for bit.
        """
        if layer.protected is None:
            return
        basis = layer.block.stacks["basis"][layer.row]
        free = layer.protected.to(basis.device).leaves(basis)
        if bool((basis - free).abs().max() > 64 * torch.finfo(layer.dtype).eps):
            basis.copy_(free)
            layer.block.array("next_refresh")[layer.row] = int(layer.block.array("step")[layer.row])

    def loaded(self, block: Block) -> None:
        """Its state came from elsewhere: what the device decided last may not have been heeded yet."""
        if block.first.sketched:
            self._verdicts.expect(block)

    def advance(self, block: Block) -> None:
        """Count a step."""
        steps = block.array("step")
        steps += 1

    def refresh(self, block: Block, rows: Sequence[int], gradients: Mapping[int, Tensor], update_proj_gap: int) -> None:
        """Recompute the bases that are due and whose gradient is there and says something.

        Args:
            block: the layers.
            rows: those of them whose gradients are given.
            gradients: full gradients (l x m x n) by subspace.
            update_proj_gap: steps between refreshes; the next one falls on the next multiple of it.
        """
        due, steps, places = self.due(block), block.array("step"), block.array("next_refresh")
        for piece in self._pieces(block, [row for row in rows if due[row, sorted(gradients)].any()]):
            for subspace in sorted(gradients):
                some = [row for row in piece.rows if due[row, subspace]]
                if not some:
                    continue
                step, kept = int(steps[some[0]]), piece.kept[subspace]
                found = dominant_basis(
                    _of(gradients[subspace], rows, some),
                    block.first.widths[subspace],
                    block.first.axis,
                    self._room(block, piece, some, subspace),
                    kept,
                    self._generator(block, subspace, step),
                    # Where the shared basis has all of the gradient, it is in vain to wait for another.
                    self._beside_shared(subspace) or not kept,
                )
                if found is None:
                    continue
                new, usable = found
                if not all(usable):
                    new = new[[place for place, good in enumerate(usable) if good]]
                    some = [row for row, good in zip(some, usable, strict=True) if good]
                self._write(block, some, subspace, new)
                places[some, subspace] = next_multiple(step, update_proj_gap)
                if subspace == SHARED and self._shared_first:
                    # The tasks' bases were orthogonal to the old one: they follow, now or with their next gradient.
                    places[some, 1:] = step
                    due[some, 1:] = True

    def renew(self, batches: Iterable[tuple[Block, Mapping[int, Rows], int]]) -> None:
        """Take the bases that are due from sketches of this step's gradients; nothing here waits for the device.

        Args:
            batches: blocks; by subspace, of which of their rows there are sketches, and Y (l x d x c); and the steps
                between refreshes.
        """
        self.settle()
        for block, sketches, update_proj_gap in batches:
            self._renew_block(block, sketches, update_proj_gap)
        self._verdicts.send()

    def settle(self) -> None:
        """Take back what the schedule assumed of the last step's sketches and the device found otherwise."""
        for block, usable in self._verdicts.read():
            steps, places, taken = (block.array(key) for key in ("step", "next_refresh", "sketches"))
            rows, subspaces = (~usable).nonzero()
            if len(rows):
                taken[rows, subspaces] = (taken[rows, subspaces] - 1) % SKETCHES_PER_REFRESH
                places[rows, subspaces] = steps[rows]
                block.stacks["usable"].fill_(True)

    def _renew_block(self, block: Block, sketches: Mapping[int, Rows], update_proj_gap: int) -> None:
        due = self.due(block)
        found = {s: [row for row in rows if due[row, s]] for s, (rows, _) in sketches.items()}
        follow = set(found.get(SHARED, ())) if self._shared_first else set()
        for piece in self._pieces(block, sorted({row for rows in found.values() for row in rows})):
            for subspace in range(len(block.first.widths)):
                here = set(found.get(subspace, ()))
                rows = [row for row in piece.rows if row in here]
                if rows:
                    every, Y = sketches[subspace]
                    self._renew(block, piece, rows, subspace, _of(Y, every, rows), judged=True)
                # A task without a sketch keeps what the new shared basis leaves of its own.
                left = [row for row in piece.rows if row in follow - here]
                if left:
                    Y = block.basis(subspace, left).clone()
                    self._renew(block, piece, left, subspace, Y, judged=False)
        steps, places, taken = (block.array(key) for key in ("step", "next_refresh", "sketches"))
        for subspace, rows in found.items():
            for row in rows:
                step, count = int(steps[row]), int(taken[row, subspace]) + 1
                complete = count == SKETCHES_PER_REFRESH
                taken[row, subspace] = 0 if complete else count
                places[row, subspace] = next_place(step, update_proj_gap, self._turn(block)) if complete else step + 1
        if any(found.values()):
            self._verdicts.expect(block)

    def _renew(self, block: Block, piece: _Piece, rows: Sequence[int], subspace: int, Y: Tensor, judged: bool) -> None:
        taken, kept = block.array("sketches"), piece.kept[subspace]
        columns = block.first.columns(subspace)
        for count in sorted({int(taken[row, subspace]) for row in rows}) if kept else ():
            some = [row for row in rows if taken[row, subspace] == count]
            place: Any = slice(None) if len(some) == len(block) else some
            old = block.basis(subspace, some)
            values = block.stacks["singular_values"][place, columns.start : columns.start + kept]
            step = int(block.array("step")[some[0]])
            fresh, strengths, usable = sketched_basis(
                _of(Y, rows, some),
                old[:, :, :kept] * values[:, None] if count else None,
                kept,
                self._room(block, piece, some, subspace),
                self._generator(block, subspace, step),
                self._beside_shared(subspace),
            )
            new = torch.zeros_like(old)
            new[:, :, :kept] = torch.where(usable, fresh, old[:, :, :kept])
            self._write(block, some, subspace, new)
            # What is left of a refresh that began with nothing must not enter the next sketch.
            strengths = torch.where(usable[:, 0], strengths, values if count else 0.0)
            block.stacks["singular_values"][place, columns.start : columns.start + kept] = strengths
            if judged:
                block.stacks["usable"][place, subspace] = usable[:, 0, 0]

    def _write(self, block: Block, rows: Sequence[int], subspace: int, new: Tensor) -> None:
        basis = block.basis(subspace)
        block.rotations.append(Rotation(rows, subspace, product(block.basis(subspace, rows).mT, new)))
        if len(rows) == len(block):
            basis.copy_(new)
        else:
            basis[list(rows)] = new

    def _pieces(self, block: Block, rows: Sequence[int]) -> Iterator[_Piece]:
        """Rows that one operation can refresh; what they protect travels to the device once for all subspaces."""
        kinds: dict[tuple[tuple[int, ...], int, bool], list[int]] = defaultdict(list)
        steps, widths = block.array("step"), block.first.widths
        for row in rows:
            layer = block.layers[row]
            kept = tuple(self.columns(layer, subspace) for subspace in range(len(widths)))
            form = layer.protected is not None and layer.protected.complement
            kinds[kept, int(steps[row]), form].append(row)
        for (kept, *_), some in kinds.items():
            held = [block.layers[row].protected for row in some]
            # What a refresh has to stay out of, or in, and two bases.
            most = widths[SHARED] + max(0 if each is None else each.directions.shape[1] for each in held)
            size = most + 2 * max(widths)
            for piece in pieces(some, block.first.dimension * size, block.device):
                protected = [block.layers[row].protected for row in piece]
                yield _Piece(piece, kept, side_by_side(protected, block.stacks["basis"]))

    def _room(self, block: Block, piece: _Piece, rows: Sequence[int], subspace: int) -> Room:
        """Where the bases of some of the rows of a piece have to stay."""
        room = Room()
        if piece.protected is not None:
            directions = _of(piece.protected.directions, piece.rows, rows)
            room = Room(within=directions) if piece.protected.complement else Room(directions)
        return room.without(block.basis(SHARED, rows)) if self._beside_shared(subspace) else room

    def _generator(self, block: Block, subspace: int, step: int) -> torch.Generator:
        """An own generator for every draw: reproducible after a resume, and the global one is left alone."""
        entropy = np.random.SeedSequence([self._seed, block.turn, subspace, step])
        generator = torch.Generator(device=block.device)
        return generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_directions": {}}


@dataclass(frozen=True)
class _Piece:
    """Rows that one operation can refresh: at the same step, with as much room, and protected in one form.

    Attributes:
        rows: of a block.
        kept: by subspace, how many columns of its basis find room beside what is forbidden.
        protected: what they protect, side by side.
    """

    rows: Sequence[int]
    kept: tuple[int, ...]
    protected: Protected | None


def _of(stack: Tensor, every: Sequence[int], some: Sequence[int]) -> Tensor:
    """The matrices of some rows, of a stack with one for every row."""
    if len(some) == len(every):
        return stack
    where = {row: place for place, row in enumerate(every)}
    return stack[[where[row] for row in some]]
