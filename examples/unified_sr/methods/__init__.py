"""The training methods by name. A further one is a module with a settings class and a function, and a line here."""

from __future__ import annotations

import difflib

from ._adamw import ADAMW
from ._base import Diagnostics, Method, Setup, Updater
from ._gems import GEMS, GEMS_PAPER
from ._lora import LORA
from ._zero_shot import ZERO_SHOT

METHODS: dict[str, Method] = {method.name: method for method in (GEMS, GEMS_PAPER, ADAMW, LORA, ZERO_SHOT)}

__all__ = ["METHODS", "Diagnostics", "Method", "Setup", "Updater", "method_named"]


def method_named(name: str) -> Method:
    """Return a method.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"there is no method {name!r}; {hint}the methods are {', '.join(METHODS)}")
    return METHODS[name]
