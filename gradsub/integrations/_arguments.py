"""Arguments of `GemsOptimizer` as a configuration file has them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from gradsub.null_space import NullSpace
from gradsub.optimizer import GemsOptimizer

NAMES = frozenset(inspect.signature(GemsOptimizer).parameters) - {"base", "model"}


def from_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with the null space loaded if it is a path.

    Args:
        options: name -> value, as YAML has it.

    Raises:
        ValueError: `GemsOptimizer` has no argument of such a name.
    """
    unknown = sorted(options.keys() - NAMES)
    if unknown:
        raise ValueError(f"gems has {unknown}, which GemsOptimizer does not take: it takes {sorted(NAMES)}")
    found = dict(options)
    if isinstance(found.get("null_space"), (str, os.PathLike)):
        found["null_space"] = NullSpace.load(found["null_space"])
    return found
