from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class LossWatcher(TorchFunctionMode):
    """Reports every scalar whose ``backward()`` is called, so that a gate learns the losses without being told.

    Args:
        observe: receives the loss with its graph, before the backward pass, still on its device.
    """

    def __init__(self, observe: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._observe = observe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward and args[0].numel() == 1:
            self._observe(args[0])
        return func(*args, **(kwargs or {}))
