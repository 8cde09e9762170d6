from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(model: nn.Module | None) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` around a model, also inside of ``torch.compile``'s wrapper.

    Raises:
        ValueError: its graph was declared static.
    """
    while model is not None and not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        model = inner if isinstance(inner, nn.Module) else None
    if model is not None and model.static_graph:
        raise ValueError(
            "model is a DistributedDataParallel with static_graph=True, which cannot be silent inside of tasks, as "
            "torch has no no_sync() for static graphs: wrap the model with static_graph=False"
        )
    return model
