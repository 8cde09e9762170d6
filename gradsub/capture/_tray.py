from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub.subspace import SHARED, Block


class Rack:
    """Memory for the trays of a block: side by side for the tasks of the last step, so that a step need not copy them.

    Args:
        block: L layers.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self._expected: list[int] = []
        self._given: set[int] = set()
        self._stack: Tensor | None = None

    def place(self, task: int) -> Tensor:
        """Memory for a task's gradients (L x r x m), with anything in it."""
        first = self.block.first
        shape = len(self.block), first.widths[SHARED] + first.widths[task + 1], first.shape[1 - first.axis]
        alone = task in self._given or task not in self._expected
        self._given.add(task)
        if alone:
            return torch.empty(shape, dtype=first.dtype, device=self.block.device)
        if self._stack is None:
            self._stack = torch.empty(len(self._expected), *shape, dtype=first.dtype, device=self.block.device)
        found = self._stack[self._expected.index(task)]
        if self._given.issuperset(self._expected):
            self._stack = None  # it is theirs who have the parts
        return found

    def clear(self) -> None:
        """The step is over."""
        if self._given:
            widths = {self.block.first.widths[task + 1] for task in self._given}
            self._expected = sorted(self._given) if len(widths) == 1 else []
        self._given, self._stack = set(), None


class Tray:
    """Where ordinary backward passes of a task leave what they project: a stack for a block, a row for each layer.

    A gradient lies there with the coordinates along the basis first (r x m), whatever the axis: so the longer axis is
    the inner one in memory, on which all that is done to a stack is several times as fast.

    Attributes:
        rack: where its memory comes from.
        block: L layers.
        task: its index.
        opened: whether the task is, and backward passes may leave something.
        formats: those of the factors that have come in.
        witness: a leaf that is part of every graph and receives nothing: where a backward pass would execute it, the
            pass accumulates into all leaves.
        ready: what forward passes are given, and what it was made of.
    """

    def __init__(self, rack: Rack, task: int) -> None:
        self.rack, self.block, self.task = rack, rack.block, task
        self.opened = False
        self.formats: set[torch.dtype] = set()
        self.witness = torch.zeros((), dtype=self.block.first.dtype, device=self.block.device, requires_grad=True)
        self.ready: tuple[Tensor, Any, Sequence[Any]] | None = None
        self._known: tuple[Any, Any, int, Sequence[Tensor]] = (None, None, 0, ())
        self._stack: Tensor | None = None
        self._rows: Sequence[Tensor] = ()
        self._arrived: set[int] = set()

    def bases(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """What rows of inputs or of output gradients are multiplied with, layer by layer."""
        basis = self.block.stacks["basis"]
        known = self._known
        if known[0] is not dtype or known[1] is not basis or known[2] != basis._version:
            known = self._known = (dtype, basis, basis._version, self.block.joint_rows(self.task, dtype))
        return known[3]

    def add(self, row: int, left: Tensor, right: Tensor) -> None:
        """Add a product to a layer's gradient."""
        rows = self._rows or self._begin()
        place = rows[row]
        if left.dtype is not right.dtype:  # forward and backward pass, one of them under autocast
            self.formats |= {left.dtype, right.dtype}
            wide = torch.promote_types(left.dtype, right.dtype)
            left, right = left.to(wide), right.to(wide)
        self.formats.add(left.dtype)
        alike = left.dtype is place.dtype
        if row not in self._arrived:
            if alike:
                torch.mm(left, right, out=place)
            else:
                place.copy_(torch.mm(left, right))
            self._arrived.add(row)  # only now: what is there before is anything
        elif alike:
            place.addmm_(left, right)
        else:
            place.add_(torch.mm(left, right))  # rounded before it is added, as without a stack

    def _begin(self) -> Sequence[Tensor]:
        stack = self._stack = self.rack.place(self.task)
        self._rows = (stack.mT if self.block.first.axis == 1 else stack).unbind()
        return self._rows

    def take(self) -> tuple[Tensor | None, dict[int, Tensor]]:
        """The stack, if a gradient of every layer arrived; else those that did, by place. They are the receiver's."""
        stack, rows, arrived = self._stack, self._rows, self._arrived
        self._stack, self._rows, self._arrived = None, (), set()
        if stack is not None and len(arrived) == len(rows):
            return stack, {}
        return None, {place: rows[place] for place in sorted(arrived)}


def tasks_side_by_side(stacks: Sequence[Tensor], axis: int) -> Tensor:
    """Stacks of K tasks (L x r x m each) as one (L x K x m x r, or L x K x r x m for axis 0), in memory task by task.

    Args:
        stacks: as trays leave them; not copied where they lie side by side in a rack.
        axis: of the weights, that the bases span.
    """
    first = stacks[0]
    if len(stacks) == 1 or _together(stacks):
        every, strides = (len(stacks), *first.shape), (first.numel(), *first.stride())
        whole = first.as_strided(every, strides, first.storage_offset())
    else:
        whole = torch.stack(list(stacks))
    return whole.permute(1, 0, 3, 2) if axis == 1 else whole.transpose(0, 1)


def side_by_side(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gradients of K tasks and L layers as one (L x K x m x r), in memory task by task, as in a rack: not copied there.

    Args:
        gradients: by task, of each layer.
    """
    every = [each for held in gradients for each in held]
    first, base = every[0], every[0]._base
    size, count = first.numel(), len(gradients[0])
    layout, start = first.stride(), first.storage_offset()
    if base is None or not _together(every):
        if all(_together(held) and held[0].stride() == layout for held in gradients):
            trays = [held[0].as_strided((count * size,), (1,), held[0].storage_offset()) for held in gradients]
            base = torch.cat(trays)
        else:
            base = torch.stack(every)
            layout = base.stride()[1:]
        start = 0
    return base.as_strided((count, len(gradients), *first.shape), (size, count * size, *layout), start)


def _together(gradients: Sequence[Tensor]) -> bool:
    """Whether they lie one after the other, without gaps, in one tensor."""
    first = gradients[0]
    base, start, size = first._base, first.storage_offset(), first.numel()
    if base is None or not (first.is_contiguous() or first.mT.is_contiguous()):
        return False
    # Views of one tensor come from one tray, one product or one message between ranks: they all lie as the first does.
    return all(
        each._base is base and each.storage_offset() == start + place * size for place, each in enumerate(gradients)
    )
