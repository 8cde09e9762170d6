from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` around a model, also inside of ``torch.compile``'s wrapper."""
    while model is not None and not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else None
    return model
