from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import utils
from torch.nn.utils import clip_grad

_EXCHANGING = threading.Lock()
_LISTENING: weakref.WeakSet[ClippingWatcher] = weakref.WeakSet()
# Where loops and trainers find them, and the one through which a function goes that was imported by name earlier.
_NAMES = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "_clip_grads_with_norm_")


class ClippingWatcher:
    """Is told of the parameters that torch's own clipping is called with, while it listens.

    Captured gradients are not in ``p.grad``, so that clipping leaves no trace of having missed them. While somebody
    listens, functions that stand in for torch's are in their place; they do what torch's do.

    Args:
        observe: receives the parameters, before they are clipped.
    """

    def __init__(self, observe: Callable[[list[Tensor]], None]) -> None:
        self._observe = weakref.WeakMethod(observe)

    def listen(self) -> None:
        """From now on it is told."""
        with _EXCHANGING:
            if self not in _LISTENING:
                _LISTENING.add(self)
                _install()

    def rest(self) -> None:
        """It is told no more."""
        with _EXCHANGING:
            if self in _LISTENING:
                _LISTENING.discard(self)
                if not _LISTENING:
                    _uninstall()

    def tell(self, parameters: list[Tensor]) -> None:
        """Pass it on."""
        observe = self._observe()
        if observe is not None:
            observe(parameters)

    def __getstate__(self) -> dict[str, Any]:
        return {"observe": self._observe()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._observe = weakref.WeakMethod(state["observe"])


class _StandIn:
    """One of torch's clipping functions, which tells who listens."""

    def __init__(self, behind: Callable[..., Any]) -> None:
        functools.update_wrapper(self, behind)
        self.behind = behind

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _LISTENING and not torch.compiler.is_compiling():
            parameters = args[0] if args else kwargs.get("parameters", ())
            if isinstance(parameters, Iterator):
                listed = list(parameters)
                args, kwargs = _with(args, kwargs, (parameter for parameter in listed))
            else:
                listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            bound = args[1] if len(args) > 1 else kwargs.get("max_norm", kwargs.get("clip_value"))
            if not (isinstance(bound, (int, float)) and math.isinf(bound)):  # else only the norm is asked for
                for watcher in list(_LISTENING):
                    watcher.tell(listed)
        elif not _LISTENING:
            with _EXCHANGING:
                if not _LISTENING:  # still: another thread may just have begun
                    _uninstall()  # who listened is gone
        return self.behind(*args, **kwargs)


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], parameters: Iterable[Tensor]) -> tuple[Any, dict[str, Any]]:
    return ((parameters, *args[1:]), kwargs) if args else (args, {**kwargs, "parameters": parameters})


def _places() -> Iterator[tuple[ModuleType, str]]:
    for module in (utils, clip_grad):
        yield from ((module, name) for name in _NAMES if hasattr(module, name))


def _install() -> None:
    for module, name in _places():
        function = getattr(module, name)
        if not isinstance(function, _StandIn):
            setattr(module, name, _StandIn(function))


def _uninstall() -> None:
    for module, name in _places():
        function = getattr(module, name)
        if isinstance(function, _StandIn):  # or somebody has put another one before it since
            setattr(module, name, function.behind)
