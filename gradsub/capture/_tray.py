from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsub.subspace import SHARED, Block


class Tray:
    """Where ordinary backward passes of a task leave what they project: a stack for a block, a row for each layer.

    A gradient lies there with the coordinates along the basis first (r x m), whatever the axis: so the longer axis is
    the inner one in memory, on which all that is done to a stack is several times as fast.

    Attributes:
        block: L layers.
        task: its index.
        opened: whether the task is, and backward passes may leave something.
        formats: those in which forward passes were computed.
        witness: a leaf that is part of every graph and receives nothing: where a backward pass would execute it, the
            pass accumulates into all leaves.
    """

    def __init__(self, block: Block, task: int) -> None:
        self.block, self.task = block, task
        self.opened = False
        self.formats: set[torch.dtype] = set()
        self.witness = torch.zeros((), dtype=block.first.dtype, device=block.device, requires_grad=True)
        self._known: tuple[Any, Any, int, Sequence[Tensor]] = (None, None, 0, ())
        self._rows: Sequence[Tensor] = ()
        self._arrived: set[int] = set()

    def bases(self, dtype: torch.dtype) -> Sequence[Tensor]:
        """What rows of inputs or of output gradients are multiplied with, layer by layer."""
        basis = self.block.stacks["basis"]
        known = self._known
        if known[0] is not dtype or known[1] is not basis or known[2] != basis._version:
            known = self._known = (dtype, basis, basis._version, self.block.joint_rows(self.task, dtype))
        return known[3]

    def row(self, row: int) -> Tensor:
        """What a layer's gradient is to be added to."""
        self._arrived.add(row)
        return (self._rows or self._begin())[row]

    def _begin(self) -> Sequence[Tensor]:
        first = self.block.first
        width = first.widths[SHARED] + first.widths[self.task + 1]
        other = first.shape[1 - first.axis]
        stack = torch.zeros(len(self.block), width, other, dtype=first.dtype, device=self.block.device)
        self._rows = (stack.mT if first.axis == 1 else stack).unbind()
        return self._rows

    def take(self) -> dict[int, Tensor]:
        """By place, the gradients that arrived; they are the receiver's."""
        rows, arrived = self._rows, sorted(self._arrived)
        self._rows, self._arrived = (), set()
        return {place: rows[place] for place in arrived}


def as_stack(gradients: Sequence[Tensor], axis: int) -> Tensor | None:
    """The stack (L x r x m) of which these are all the rows, in their order; None where they are not."""
    stack = gradients[0]._base
    if stack is None or stack.ndim != 3 or len(stack) != len(gradients) or not stack.is_contiguous():
        return None
    _, width, other = stack.shape
    shape, strides = ((other, width), (1, other)) if axis == 1 else ((width, other), (other, 1))
    for place, gradient in enumerate(gradients):
        if (
            gradient._base is not stack
            or gradient.storage_offset() != place * width * other
            or gradient.shape != shape
            or gradient.stride() != strides
        ):
            return None
    return stack
