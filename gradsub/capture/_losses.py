from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

_EXCHANGING = threading.Lock()


class LossWatcher:
    """Reports every scalar on which ``backward()`` is called, so that a gate learns the losses without being told.

    A context that stands in for `torch.autograd.backward`, through which every backward pass goes. It listens to the
    thread that entered it, as other threads may train other models. A mode of torch's would be asked about each of
    some ten thousand operations of a forward pass as well.

    Args:
        observe: receives the loss, weighted as its backward pass is, still on its device, once the pass has succeeded.
    """

    def __init__(self, observe: Callable[[Tensor], None]) -> None:
        self._observe = observe
        self._open = False

    def __enter__(self) -> LossWatcher:
        self._thread = threading.get_ident()
        with _EXCHANGING:
            self._behind = torch.autograd.backward
            self._open = True
            torch.autograd.backward = self
        return self

    def __exit__(self, *_: object) -> None:
        with _EXCHANGING:
            self._open = False
            # Blocks of several optimizers need not be closed in the opposite order.
            while isinstance(watcher := torch.autograd.backward, LossWatcher) and not watcher._open:
                torch.autograd.backward = watcher._behind

    def __call__(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        """`torch.autograd.backward`."""
        found: list[Tensor] = []
        # A backward pass within another is a checkpoint's (the reentrant kind), and of no loss.
        if self._open and self._thread == threading.get_ident() and torch._C._current_graph_task_id() == -1:
            losses = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            weights = list(grad_tensors) if isinstance(grad_tensors, (list, tuple)) else [grad_tensors] * len(losses)
            for loss, weight in zip(losses, weights, strict=False):
                if isinstance(loss, Tensor) and loss.numel() == 1:
                    found.append(loss.detach() if weight is None else weighted(loss, weight))
        self._behind(tensors, grad_tensors, *args, **kwargs)
        for loss in found:
            self._observe(loss)


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
