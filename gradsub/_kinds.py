"""An argument of the wrong kind is refused at once and by its name, not by what it turns out to lack."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any


def check_kind(argument: str, value: object, kind: Any, what: str) -> None:
    """Raise a TypeError unless a value is of a kind.

    Args:
        argument: its name.
        value: what was given.
        kind: as `isinstance` takes it.
        what: the kind in words, after "must be".
    """
    # What has places alone, such as a data set, can be run through as well.
    fits = isinstance(value, kind) or (kind is Iterable and hasattr(value, "__getitem__"))
    if not fits:
        raise TypeError(f"{argument}={reprlib.repr(value)} ({type(value).__name__}) must be {what}")
