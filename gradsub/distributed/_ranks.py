from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gradsub._sums import sum_over


class Ranks:
    """The processes that train one model on different data, and the one operation that they need: a sum.

    Args:
        process_group: a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or None: the default group from the moment
            that torch.distributed is initialised; until then this process is alone.

    Raises:
        TypeError: ``process_group`` is something else.
        ValueError: this process is no member of it, or the mesh has several dimensions.
    """

    def __init__(self, process_group: Any = None) -> None:
        self._group = _group_of(process_group)

    @property
    def group(self) -> Any:
        """The process group; None while this process is alone."""
        if not dist.is_available() or not dist.is_initialized():
            return None
        return dist.group.WORLD if self._group is None else self._group

    @property
    def size(self) -> int:
        """How many ranks there are."""
        group = self.group
        return 1 if group is None else dist.get_world_size(group)

    @property
    def index(self) -> int:
        """Which of them this process is."""
        group = self.group
        return 0 if group is None else dist.get_rank(group)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks, the same bits on all of them."""
        sum_over(self.group, tensors)

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest over the ranks, of each entry."""
        both = torch.stack([-values, values])
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.group)
        return -both[0], both[1]

    def of_all(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks; anything that can be pickled."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def send(self, tensor: Tensor, source: int) -> None:
        """Overwrite the tensor by that of one rank."""
        group = self.group
        dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._group is not None:
            raise TypeError(
                "an optimizer with a process_group of its own cannot be pickled, since the group means nothing "
                "elsewhere: save its state_dict()"
            )
        return Ranks, ()


def _group_of(process_group: Any) -> Any:
    if process_group is None:
        return None
    if not dist.is_available():
        raise ValueError("process_group was given, but this torch was built without torch.distributed")
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(process_group, DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"process_group is a mesh of {process_group.ndim} dimensions: pass the one along which the data "
                'differs, such as mesh["data"]'
            )
        return process_group.get_group()
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("this process is no member of process_group: build the optimizer on its members only")
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup, a DeviceMesh or None, found "
            f"{type(process_group).__name__}"
        )
    return process_group
