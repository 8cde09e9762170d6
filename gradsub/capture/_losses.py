from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle


class LossWatcher(TorchFunctionMode):
    """Reports every scalar whose ``backward()`` is called, so that a gate learns the losses without being told.

    Args:
        observe: receives the loss, weighted as its backward pass is, still on its device.
    """

    def __init__(self, observe: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._observe = observe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.backward and args[0].numel() == 1:
            weight = kwargs.get("gradient", args[1] if len(args) > 1 else None)
            self._observe(args[0].detach() if weight is None else weighted(args[0], weight))
        return func(*args, **kwargs)


def weighted(loss: Tensor, weight: Tensor) -> Tensor:
    """The loss as it enters what ``backward()`` was called on, whose gradient with respect to it is ``weight``."""
    dtype = torch.promote_types(loss.dtype, torch.float32)
    return (loss.detach().to(dtype) * weight.detach().to(dtype)).sum()


def when_weighted(loss: Tensor, observe: Callable[[Tensor], None]) -> RemovableHandle:
    """Have every backward pass through ``loss`` tell its weight there: a loss scale, one over a number of parts."""
    return loss.register_hook(lambda weight: observe(weight))  # type: ignore[no-untyped-call, no-any-return]


@contextmanager
def watch_through(loss: Tensor, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Report a loss that ``backward()`` itself may not be called on: as backward passes in here weigh it, or as it is.

    Args:
        loss: the loss.
        observe: receives it.
    """
    passes: list[Tensor] = []
    value = loss.detach()
    handle = when_weighted(loss, lambda weight: passes.append(weighted(value, weight))) if loss.requires_grad else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
    observe(sum(passes[1:], passes[0]) if passes else value)
