from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gradsub.subspace._layer import Layer

T = TypeVar("T")
State = MutableMapping[Tensor, Any]

# Entries of a tensor that holds several layers. On a CPU 16 MiB in float32: the C library gives memory of more than
# 32 MiB back to the system when it is released, and the system hands it out again page by page, cleared: at every step
# that took longer than what was computed in it. Accelerators keep their memory; there it bounds what exists at a time.
_MOST_ON_CPU = 1 << 22
_MOST_ELSEWHERE = 1 << 26


class Rotation(NamedTuple):
    """What became of some layers' bases of a subspace.

    Attributes:
        rows: l of a block's layers.
        subspace: whose bases they are.
        matrix: B_old^T B_new (l x r x r): coordinates in the old bases, times it, are those in the new ones.
    """

    rows: Sequence[int]
    subspace: int
    matrix: Tensor


class Block:
    """Layers of one shape, axis, dtype, device and parameter group, side by side: what is done to one is done to all.

    What the optimizer knows of its layers lies in stacked tensors with the layers along the first axis; a layer's state
    shows views of them. All layers of a block had gradients of the same tasks in every step so far: where that ends,
    `split` makes two blocks of one.

    Attributes:
        group: the index of the parameter group.
        layers: L of them, in the order of the rows.
        turn: decides when the block's sketched bases are refreshed; parts of a block that was split keep it.
        stacks: by the key of a layer's state, (L, ...) each.
        proxies: by subspace, what the base optimizer steps: one stack of coordinates, or one matrix a layer.
        shown: what of the base optimizer's state the layers' states show.
        rotations: of the bases that were written, for what is kept in their coordinates to follow.
    """

    def __init__(self, group: int, layers: Sequence[Layer], turn: int) -> None:
        self.group = group
        self.turn = turn
        self.layers = list(layers)
        self.stacks: dict[str, Tensor] = {}
        self._fills: dict[str, float] = {}
        self.proxies: list[list[nn.Parameter]] = []
        self.shown: dict[tuple[str, int], Any] = {}
        self.rotations: list[Rotation] = []
        self._joint: dict[tuple[int, torch.dtype], tuple[int, Tensor, Sequence[Tensor]]] = {}
        self._columns: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._arrays: dict[str, tuple[Tensor, Any]] = {}
        self.lr_factor: tuple[list[Any], float | Tensor] | None = None  # what `gradsub._lr_scale` computed
        self._count_rows()

    def _count_rows(self) -> None:
        for row, layer in enumerate(self.layers):
            layer.block, layer.row = self, row

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def first(self) -> Layer:
        """Any layer: what they have in common can be read from it."""
        return self.layers[0]

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return self.first.parameter.device

    def add(
        self,
        key: str,
        shape: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        fill: float = 0,
    ) -> None:
        """A stack of this shape for every layer, of the same number throughout.

        Args:
            key: of the layers' state.
            shape: of one layer's part.
            dtype: None: that of the bases.
            device: None: that of the layers.
            fill: the number, which stands for what a checkpoint lacks, too.
        """
        dtype, device = dtype or self.first.dtype, device or self.device
        self._fills[key] = fill
        self.stacks[key] = torch.full((len(self), *shape), fill, dtype=dtype, device=device)

    def show(self, state: State) -> None:
        """Put views of the stacks into the layers' state."""
        for row, layer in enumerate(self.layers):
            state[layer.parameter].update({key: stack[row] for key, stack in self.stacks.items()})

    def take_over(self, state: State) -> None:
        """Copy what was loaded into the layers' state, and show views of the stacks there again."""
        for row, layer in enumerate(self.layers):
            held = state[layer.parameter]
            for key, stack in self.stacks.items():
                if key in held:
                    stack[row].copy_(held[key])
                else:
                    stack[row].fill_(self._fills[key])
        self.show(state)

    def array(self, key: str) -> Any:
        """A stack on the CPU as an array that shares its memory: reading and writing it is no operation of torch."""
        stack = self.stacks[key]
        found = self._arrays.get(key)
        if found is None or found[0] is not stack:
            found = self._arrays[key] = (stack, stack.numpy())
        return found[1]

    def basis(self, subspace: int, rows: Sequence[int] | None = None) -> Tensor:
        """A subspace's bases (L x d x r): a view, or a copy of some rows."""
        joint = self.stacks["basis"][:, :, self.first.columns(subspace)]
        return joint if rows is None or len(rows) == len(self) else joint[list(rows)]

    def joint(self, task: int, dtype: torch.dtype) -> Tensor:
        """The shared and a task's own bases side by side (L x d x (r + r_k)); made once after each change of them."""
        return self._found_joint(task, dtype)[1]

    def joint_rows(self, task: int, dtype: torch.dtype) -> Sequence[Tensor]:
        """The same for each layer (d x (r + r_k))."""
        return self._found_joint(task, dtype)[2]

    def _found_joint(self, task: int, dtype: torch.dtype) -> tuple[int, Tensor, Sequence[Tensor]]:
        version = self.stacks["basis"]._version
        found = self._joint.get((task, dtype))
        if found is None or found[0] != version:
            joint = torch.cat([self.basis(0), self.basis(task + 1)], dim=2).to(dtype)
            found = self._joint[task, dtype] = (version, joint, joint.unbind())
        return found

    def columns(self, subspaces: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Which columns of these subspaces' bases, side by side, are the shared one's (R) and each task's (K x R).

        Numbers of 0 and 1, to spread a factor of each subspace over its columns.
        """
        found = self._columns.get(subspaces)
        if found is None:
            widths = self.first.widths
            rows = torch.zeros(len(widths), sum(widths[s] for s in subspaces), dtype=self.first.dtype, device="cpu")
            start = 0
            for subspace in subspaces:
                rows[subspace, start : start + widths[subspace]] = 1
                start += widths[subspace]
            rows = rows.to(self.device)
            found = self._columns[subspaces] = (rows[0], rows[1:])
        return found

    def split(self, rows: Sequence[int]) -> Block:
        """A block of its own for some of the rows; the others stay. Views of the old stacks are to be shown anew."""
        leaving = set(rows)
        staying = [row for row in range(len(self)) if row not in leaving]
        other = Block(self.group, [self.layers[row] for row in rows], self.turn)
        other._fills = self._fills
        other.stacks = {key: stack[list(rows)] for key, stack in self.stacks.items()}
        self.stacks = {key: stack[staying] for key, stack in self.stacks.items()}
        self.layers = [self.layers[row] for row in staying]
        self._joint.clear()
        self.lr_factor = None
        self.shown.clear()
        self._count_rows()
        return other

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_joint": {}, "_columns": {}, "_arrays": {}, "lr_factor": None, "shown": {}}


def make_blocks(
    group: int, layers: Iterable[Layer], alike: Callable[[Layer], Hashable], turn: int | None = None
) -> list[Block]:
    """Blocks of the layers that are alike, none with more coordinates than fit one operation.

    Args:
        group: the index of the parameter group.
        layers: of that group.
        alike: what layers of a block have to have in common beside their shape.
        turn: of the block that they come from, if there is one: it decides their draws, and is in no checkpoint.
    """
    kinds: dict[Hashable, list[Layer]] = defaultdict(list)
    for layer in layers:
        weight = layer.parameter
        key = (
            layer.shape,
            layer.whole_shape,  # ranks whose rows differ have to form the same blocks
            layer.axis,
            layer.widths,
            layer.shards is None,
            layer.sketched,
            weight.dtype,
            weight.device,
        )
        kinds[key, alike(layer)].append(layer)
    return [
        Block(group, some, some[0].index if turn is None else turn)
        for members in kinds.values()
        for some in pieces(members, _coordinates(members[0]), members[0].parameter.device)
    ]


def _coordinates(layer: Layer) -> int:
    """Entries of a layer's coordinates in all its subspaces, on all ranks that have rows of it."""
    return layer.codimension * sum(layer.widths)


def pieces(members: Sequence[T], size: int, device: torch.device) -> Iterator[Sequence[T]]:
    """Divide the members, in order, so that one operation on a piece of several does not ask for too much memory.

    Args:
        members: of one kind.
        size: entries of each in a tensor that holds several.
        device: where that tensor is.

    Example:
        >>> [len(piece) for piece in pieces(range(5), 1 << 20, torch.device("cpu"))]
        [4, 1]
    """
    most = max(1, (_MOST_ON_CPU if device.type == "cpu" else _MOST_ELSEWHERE) // max(1, size))
    for start in range(0, len(members), most):
        yield members[start : start + most]
