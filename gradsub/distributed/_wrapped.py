from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` around a model, also inside of ``torch.compile``'s wrapper."""
    while model is not None and not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else None
    return model


@contextmanager
def without_sync(model: nn.Module | None) -> Iterator[None]:
    """Forward passes in here send no weight gradients: what is captured is reduced by the optimizer, much smaller."""
    wrapped = data_parallel(model)
    if wrapped is None:
        yield
        return
    with wrapped.no_sync():
        yield
