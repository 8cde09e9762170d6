"""What the tasks' backward passes have left since the last step."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from gradsub.capture._captured import MIXED, Captured
from gradsub.subspace import Block, Layer


class Held:
    """Projected gradients of whole blocks as stacks, everything else by parameter.

    A stack is what an ordinary backward pass leaves: nothing is done to its layers one by one. Who wants to see a
    single gradient asks for `by_parameter`, and then there are no stacks any more.

    Attributes:
        single: by task and parameter, what is in no stack.
    """

    def __init__(self) -> None:
        self.single: dict[int, dict[Tensor, Captured]] = {}
        # With the layers that the rows are: a block may have been split or built anew since.
        self._stacks: dict[tuple[int, Block], tuple[Sequence[Layer], Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self.single or self._stacks)

    def by_parameter(self, keep: Collection[tuple[int, Block]] = ()) -> dict[int, dict[Tensor, Captured]]:
        """By task and parameter, all of it; to be changed at will.

        Args:
            keep: the tasks and blocks of which a stack may stay one.
        """
        for task, block in list(self._stacks):
            if (task, block) not in keep:
                self._unstack(task, block)
        return self.single

    def tasks(self) -> list[int]:
        """Those of which there is anything."""
        return sorted({*self.single, *(task for task, _ in self._stacks)}, key=lambda task: (task == MIXED, task))

    def any_of(self, parameters: Iterable[Tensor]) -> bool:
        """Whether there is a gradient of one of these."""
        there = set[int]().union(*map(self.reached, self.tasks()))
        return any(id(parameter) in there for parameter in parameters)

    def reached(self, task: int) -> set[int]:
        """The identities of the parameters of which there is a gradient of the task."""
        found = set(map(id, self.single.get(task, ())))
        for (whose, _), (layers, _) in self._stacks.items():
            if whose == task:
                found.update(id(layer.parameter) for layer in layers)
        return found

    def drop(self, parameters: Iterable[Tensor]) -> None:
        """Forget the gradients of these, and all stacks."""
        for mine in self.single.values():
            for parameter in parameters:
                mine.pop(parameter, None)
        self._stacks.clear()

    def stacks(self, task: int) -> Iterator[tuple[Block, Tensor]]:
        """A task's stacks, and whose they are."""
        return ((block, stack) for (whose, block), (_, stack) in self._stacks.items() if whose == task)

    def tensors(self, task: int) -> Iterator[Tensor]:
        """Every gradient of a task."""
        yield from (stack for _, stack in self.stacks(task))
        for captured in self.single.get(task, {}).values():
            yield from captured.tensors()

    def add(self, task: int, found: Mapping[Tensor, Captured], layers: Mapping[Tensor, Layer]) -> None:
        """Add to what a task's backward passes have left so far.

        Args:
            task: its index.
            found: by parameter.
            layers: of those parameters that are decomposed.
        """
        if self._stacks:
            for block in {layer.block for parameter in found if (layer := layers.get(parameter)) is not None}:
                self._unstack(task, block)
        mine = self.single.setdefault(task, {})
        if not mine:
            mine.update(found)  # which asks no tensor for its hash
            return
        for parameter, captured in found.items():
            if (before := mine.get(parameter)) is not None:
                before.add(captured)
            else:
                mine[parameter] = captured

    def add_stack(self, task: int, block: Block, stack: Tensor) -> None:
        """Add the projected gradients of all layers of a block.

        Args:
            task: whose they are.
            block: L layers.
            stack: along the basis first (L x r x m); it is the receiver's.
        """
        layers, before = self._stacks.get((task, block), (block.layers, None))
        if before is not None and layers is block.layers:
            before.add_(stack)
            return
        mine = self.single.get(task)
        if before is not None or (mine and any(layer.parameter in mine for layer in block.layers)):
            self.add(task, _by_parameter(block.layers, stack), {layer.parameter: layer for layer in block.layers})
        else:
            self._stacks[task, block] = block.layers, stack

    def stacks_by_block(self, blocks: Iterable[Block]) -> dict[Block, dict[int, Tensor]]:
        """By block and task, in order, the stacks of those of whose layers there is nothing else.

        Args:
            blocks: all that there are.
        """
        known = set(blocks)
        # First those of other layers than the block has now: their gradients may lie beside another block's stack.
        current = {
            (task, block)
            for (task, block), (layers, _) in self._stacks.items()
            if block in known and layers is block.layers
        }
        self.by_parameter(keep=current)
        alone = {
            block
            for block in {block for _, block in self._stacks}
            if not any(layer.parameter in mine for mine in self.single.values() for layer in block.layers)
        }
        self.by_parameter(keep={(task, block) for task, block in self._stacks if block in alone})
        found: dict[Block, dict[int, Tensor]] = {}
        for (task, block), (_, stack) in sorted(self._stacks.items(), key=lambda each: each[0][0]):
            found.setdefault(block, {})[task] = stack
        return found

    def _unstack(self, task: int, block: Block) -> None:
        if (held := self._stacks.pop((task, block), None)) is not None:
            self.add(task, _by_parameter(*held), {})

    def forget_stacks(self) -> None:
        """Once they are somebody else's, memory may be freed that was copied."""
        self._stacks.clear()

    def clear(self) -> None:
        """Forget all of it."""
        self.single.clear()
        self._stacks.clear()


def _by_parameter(layers: Sequence[Layer], stack: Tensor) -> dict[Tensor, Captured]:
    rows = (stack.mT if layers[0].axis == 1 else stack).unbind()
    return {layer.parameter: Captured(projected=row) for layer, row in zip(layers, rows, strict=True)}
