"""Arguments of `GemsOptimizer` as a configuration file has them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any

from gradsub.null_space import NullSpace
from gradsub.optimizer import GemsOptimizer

_PARAMETERS = inspect.signature(GemsOptimizer).parameters
NAMES = frozenset(_PARAMETERS) - {"base", "model"}


def telling_rows_apart(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with the fused capture in small layers as well where batches may hold rows of several tasks.

    Args:
        options: arguments of `GemsOptimizer`; a ``capture`` among them stays.
    """
    found = dict(options)
    tasks = found.get("tasks", _PARAMETERS["tasks"].default)
    if not isinstance(tasks, str):
        tasks = found["tasks"] = tuple(tasks)
    return {"capture": "fused", **found} if len(tasks) > 1 and not isinstance(tasks, str) else found


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
