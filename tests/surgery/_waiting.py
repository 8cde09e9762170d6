"""Finds what would keep the host waiting for a device, where there is none."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
)


class NothingIsRead(TorchDispatchMode):
    """Raises where a number of a tensor is read on the host, or decides about a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in _READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
