"""The training methods by name. A further one is a module with a settings class and a function, and its name here."""

from __future__ import annotations

import difflib
from typing import Any

from . import _adamw, _baselines, _galore, _gems, _lora, _sasrec, _surgery
from ._base import (
    Diagnostics,
    Fitted,
    Method,
    Setup,
    Updater,
    item_group,
    model_parameters,
    parameter_groups,
    train_only,
)

METHODS: dict[str, Method] = {
    method.name: method
    for module in (_gems, _adamw, _lora, _galore, _surgery, _baselines, _sasrec)
    for method in module.METHODS
}

__all__ = [
    "METHODS",
    "Diagnostics",
    "Fitted",
    "Method",
    "Setup",
    "Updater",
    "defaults_of",
    "item_group",
    "method_named",
    "model_parameters",
    "parameter_groups",
    "train_only",
]


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


def defaults_of(method: Method) -> dict[str, Any]:
    """Return the settings, by ``section.key``, whose defaults are the method's own or of what it is a variant of."""
    original = defaults_of(METHODS[method.variant_of]) if method.variant_of else {}
    return {**original, **method.defaults}
