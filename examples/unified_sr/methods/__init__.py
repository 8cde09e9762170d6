"""The training methods by name. A further one is a module with a settings class and a function, and a line here."""

from __future__ import annotations

import difflib
from typing import Any

from ..settings import MethodSettings
from ._adamw import ADAMW, ADAMW_REC, ADAMW_SEARCH
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
from ._baselines import BM25, EASE, POPULARITY
from ._galore import GALORE
from ._gems import GEMS, GEMS_HYPERGRADIENT, GEMS_NO_NULL, GEMS_NO_TASK, GEMS_PAPER, GEMS_UNIFORM
from ._lora import LORA
from ._sasrec import SASREC
from ._surgery import CAGRAD, PCGRAD

ZERO_SHOT = Method("zero-shot", "the language model as it is", MethodSettings, None, defaults={"training.steps": 0})

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        GEMS,
        GEMS_PAPER,
        GEMS_NO_TASK,
        GEMS_NO_NULL,
        GEMS_UNIFORM,
        GEMS_HYPERGRADIENT,
        ADAMW,
        ADAMW_REC,
        ADAMW_SEARCH,
        LORA,
        GALORE,
        PCGRAD,
        CAGRAD,
        ZERO_SHOT,
        POPULARITY,
        EASE,
        BM25,
        SASREC,
    )
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
