"""Fail the build when a public name of gradsub lacks a docstring or a place in the API reference.

Public is what a module without a leading underscore lists in its `__all__`. A name counts as documented when a page has
an anchor for it under any module that exports the same object: one entry is enough for a name and its re-export.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError

_ANCHOR = re.compile(r'id="(gradsub[\w.]*)"')
_anchors: set[str] = set()


def on_pre_build(**_: Any) -> None:
    """Forget the anchors of an earlier build (`mkdocs serve` builds several times in one process)."""
    _anchors.clear()


def on_page_content(content: str, **_: Any) -> None:
    """Collect the anchors of one page."""
    _anchors.update(_ANCHOR.findall(content))


def on_post_build(config: MkDocsConfig) -> None:
    """Compare the collected anchors with the package.

    Raises:
        PluginError: Lists every public name without an anchor or without a docstring.
    """
    if not config["strict"]:
        return
    faults = find_faults("gradsub", _anchors)
    if faults:
        raise PluginError("The API reference is incomplete:\n" + "\n".join(f"  {fault}" for fault in faults))


def find_faults(package: str, anchors: set[str]) -> list[str]:
    """Name what is undocumented in `package`, one line a fault, given the `anchors` that the pages have."""
    exports = [
        (f"{module.__name__}.{name}", getattr(module, name))
        for module in _public_modules(package)
        for name in getattr(module, "__all__", ())
    ]
    # Identity tells a re-export from a namesake, but says nothing about constants: equal small integers are one object.
    covered = {id(exported) for path, exported in exports if path in anchors and _is_defined(exported)}
    faults = [
        f"{path}: add it to docs/api.md"
        for path, exported in exports
        if path not in anchors and id(exported) not in covered and not inspect.ismodule(exported)
    ]
    for path, exported in exports:
        if _is_defined(exported):
            faults += [f"{name}: write a docstring" for name in _without_docstring(path, exported)]
    return sorted(set(faults))


def _is_defined(exported: object) -> bool:
    return inspect.isclass(exported) or inspect.isroutine(exported) or inspect.ismodule(exported)


def _public_modules(package: str) -> Iterator[ModuleType]:
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.walk_packages(root.__path__, prefix=f"{package}."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            yield importlib.import_module(info.name)


def _without_docstring(path: str, exported: Any) -> Iterator[str]:
    # Own docstrings only: inspect.getdoc would accept the one that a class inherits, which describes something else.
    if not (getattr(exported, "__doc__", None) or "").strip():
        yield path
    if not inspect.isclass(exported):
        return
    for name, member in vars(exported).items():
        documentable = isinstance(member, (property, classmethod, staticmethod)) or inspect.isfunction(member)
        if name.startswith("_") or not documentable:
            continue
        # A method may leave its documentation to the method that it overrides.
        if not (inspect.getdoc(getattr(exported, name)) or "").strip():
            yield f"{path}.{name}"
