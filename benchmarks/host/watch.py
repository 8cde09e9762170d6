"""What a step asks of the host: torch's operations, one by one, and python's functions by their own time."""

from __future__ import annotations

import cProfile
import pstats
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradsub

_PACKAGE: Final = Path(gradsub.__file__).parent
_PREFIX: Final = f"{_PACKAGE}/"
_TORCH: Final = f"{Path(torch.__file__).parent}/"


class Operations(TorchDispatchMode):
    """Counts the operations that reach torch's dispatcher, by name and by the function of gradsub that asked for them.

    An operation of the backward pass belongs to a function of gradsub only if that function runs in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.names[str(operation.overloadpacket)] += 1
        self.places[_place()] += 1
        return operation(*arguments, **(options or {}))


def count(run: Callable[[], object]) -> Operations:
    """The operations of ``run``."""
    with Operations() as operations:
        run()
    return operations


def own_milliseconds(run: Callable[[], object]) -> Counter[str]:
    """Python's functions by their own time in ``run``; being watched slows it down, the more the more calls there are.

    What torch does in an operation counts for the function that called it.
    """
    profile = cProfile.Profile()
    profile.runcall(run)
    found: Counter[str] = Counter()
    for (file, _, name), (_, _, own, *_) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        found[f"{_shorten(file)}:{name}" if file != "~" else name] += 1e3 * own  # type: ignore[assignment]
    return found


def _place() -> str:
    frame: Any = sys._getframe(2)
    # Torch's own wrappers ask on behalf of their callers, and so does a function mode, through which every call goes.
    while frame is not None and (
        frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_name == "__torch_function__"
    ):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(_PREFIX):
        return "outside of gradsub"
    return f"{_shorten(frame.f_code.co_filename)}:{frame.f_code.co_qualname}"


def _shorten(file: str) -> str:
    """From the package on, so that nothing names the machine."""
    parts = Path(file).parts
    if file.startswith(_PREFIX):
        return str(Path(file).relative_to(_PACKAGE.parent))
    if "site-packages" in parts:
        return "/".join(parts[parts.index("site-packages") + 1 :])
    return "/".join(parts[-2:])
