"""Packages that only some use, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def optional(module: str, extra: str, what: str) -> Any:
    """The module.

    Args:
        extra: of gradsub, that installs it.
        what: needs it.

    Raises:
        ImportError: it is not installed; names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        package = module.partition(".")[0]
        raise ImportError(f"{what} needs {package}: pip install 'gradsub[{extra}]'") from missing
