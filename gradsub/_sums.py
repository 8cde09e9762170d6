"""The one thing that ranks do together: sums."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def sum_over(group: Any, tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks of a process group, the same bits on all of them."""
    works = [dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True) for tensor in tensors]
    for work in works:
        work.wait()
