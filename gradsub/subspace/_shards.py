from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsub._sums import sum_over


@dataclass(frozen=True)
class Shards:
    """Which rows of a weight are here, of one that `torch.distributed.fsdp.fully_shard` has spread over ranks.

    Attributes:
        mesh: of the ranks.
        placements: how the weight lies on it.
        group: the ranks among which the rows are divided; None if all rows are here.
        start: the first row here.
        stop: the row after the last one here.
        rows: of the whole weight.
    """

    mesh: Any
    placements: tuple[Any, ...]
    group: Any
    start: int
    stop: int
    rows: int

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks that hold the other rows."""
        if self.group is not None:
            sum_over(self.group, tensors)

    @property
    def first(self) -> bool:
        """Whether this is the first of these ranks."""
        return self.group is None or dist.get_rank(self.group) == 0

    def wrap(self, rows: Tensor) -> Tensor:
        """These rows of a matrix, as the part of a DTensor that lies like the weight."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size((self.rows, *rows.shape[1:]))
        stride = torch.empty(shape, dtype=rows.dtype, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)

    def unwrap(self, tensor: Tensor) -> Tensor:
        """The rows that belong here, of a DTensor or of all rows."""
        if is_distributed(tensor):
            return local(tensor.redistribute(self.mesh, self.placements))  # type: ignore[attr-defined]
        return tensor[self.start : self.stop] if tensor.shape[0] == self.rows else tensor


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def sharded_over(tensor: Tensor) -> list[Any]:
    """The groups of ranks that hold different parts of a tensor; none of one that is whole everywhere."""
    if not is_distributed(tensor):
        return []
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return [mesh.get_group(dim) for dim, placement in enumerate(placements) if not placement.is_replicate()]


def local(tensor: Tensor) -> Tensor:
    """What of a tensor is on this rank; shares its memory."""
    found: Tensor = tensor.detach().to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]
    return found


def shards_of(parameter: Tensor, name: str) -> Shards | None:
    """How a parameter is sharded; None if it is whole on every rank.

    Raises:
        ValueError: it is sharded along another axis than its first, or along several dimensions of its mesh.
    """
    if not is_distributed(parameter):
        return None
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    sharded = [dimension for dimension, placement in enumerate(placements) if not placement.is_replicate()]
    if len(sharded) > 1 or not all(placements[dimension].is_shard(0) for dimension in sharded):
        raise ValueError(
            f"{name} is distributed as {placements}: subspaces know weights whose rows are sharded along one dimension "
            "of the mesh (fully_shard, HSDP); leave tensor-parallel weights out with subspace=False"
        )
    if any(type(placement).__name__ == "_StridedShard" for placement in placements):
        raise ValueError(f"{name} is distributed as {placements}: leave tensor-parallel weights out, subspace=False")
    rows = parameter.shape[0]
    if not sharded:
        return Shards(mesh, tuple(placements), None, 0, rows, rows)
    (dimension,) = sharded
    length = -(-rows // mesh.size(dimension))
    start = min(rows, length * mesh.get_local_rank(dimension))
    return Shards(mesh, tuple(placements), mesh.get_group(dimension), start, min(rows, start + length), rows)
