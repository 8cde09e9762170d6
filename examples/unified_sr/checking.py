"""From values by ``section.key`` to checked settings, or one sentence about what is wrong with them."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .methods import METHODS, Method, defaults_of, method_named
from .settings import Section, Settings, flatten, known_settings, sections

S = TypeVar("S", bound=Section)

BEFORE = {"method.normalize": False}
"""What was done before a setting was there, as far as its default is another one by now."""


def build_settings(method: str, values: Mapping[str, Any]) -> Settings[Any]:
    """Return the settings of a method, all values checked.

    Args:
        method: its name.
        values: sections of settings, or settings by ``section.key``; the method's defaults fill the rest.

    Raises:
        ValueError: naming an unknown method or key, or a value of the wrong type or size.
    """
    found = method_named(method)
    known = known_settings(found.settings)
    given = {**defaults_of(found), **flatten(values), "method.name": found.name}
    for key, value in given.items():
        if key not in known:
            raise ValueError(unknown(key, value, found))
    parts = {
        name: checked(kind, _inside(given, f"{name}."), f"the setting {name}.{{}}")
        for name, kind in sections(found.settings).items()
    }
    top = {key: value for key, value in given.items() if "." not in key}
    return checked(Settings, {**parts, **top}, "the setting {}")


def changed(settings: Settings[Any], values: Mapping[str, Any]) -> Settings[Any]:
    """Return settings with other values, checked like all."""
    return build_settings(settings.method.name, {**flatten(settings.model_dump()), **flatten(values)})


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a run wrote, by ``section.key``, those added since being the default.

    Of a method that is not known any more nothing is known to be added.
    """
    method = METHODS.get(settings.get("method.name", ""))
    if method is None:
        return dict(settings)
    defaults = {key: field.default for key, field in known_settings(method.settings).items()} | defaults_of(method)
    return {**defaults, **{key: value for key, value in BEFORE.items() if key in defaults}, **settings}


def checked(owner: type[S], values: Mapping[str, Any], naming: str, whole: str = "") -> S:
    """Return values as a section, checked by pydantic.

    Args:
        owner: the section.
        values: of its fields.
        naming: what a field is called, with ``{}`` for its path.
        whole: what the section itself is called.

    Raises:
        ValueError: with one sentence about the first value that is wrong: what must be there, and what is.
    """
    try:
        return owner(**values)
    except ValidationError as error:
        first = error.errors()[0]
        path = first["loc"]
        name = naming.format(".".join(map(str, path))) if path else whole
        if first["type"] == "value_error":
            raise ValueError(f"{name} {first['ctx']['error']}") from error
        must = re.sub(r"^.*? should ", "must ", first["msg"]).replace("tuple", "list")  # as YAML calls it
        field = owner.model_fields[str(path[0])] if len(path) == 1 else FieldInfo()
        null = " or null" if type(None) in typing.get_args(field.annotation) else ""
        text = f" ({field.description})" if field.description else ""
        raise ValueError(f"{name} {must}{null}, got {first['input']!r}{text}") from error


def unknown(key: str, value: Any, method: Method | None = None) -> str:
    """Say that there is no such setting, and which one may be meant.

    Args:
        key: that is given.
        value: that is given for it.
        method: whose settings they are to be; without it those of any method are known.
    """
    if key in sections():
        first = next(iter(sections()[key].model_fields))
        return f"{key!r} is a section of settings such as {key}.{first}, got {value!r}"
    everywhere = {name: known_settings(other.settings) for name, other in METHODS.items()}
    others = [name for name, found in everywhere.items() if key in found]
    if method is not None and others:
        have = "has" if len(others) == 1 else "have"
        return (
            f"the method {method.name!r} has no setting {key!r}, only {', '.join(others)} {have} it; "
            f"in a YAML file put it under methods: {others[0]}:"
        )
    known = dict.fromkeys(name for found in everywhere.values() for name in found)
    known = known if method is None else dict.fromkeys(everywhere[method.name])
    last = {name: name.rpartition(".")[2] for name in known}
    own = key.rpartition(".")[2]
    moved = [name for name, word in last.items() if word == own]
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    alike = difflib.get_close_matches(own, last.values(), n=2, cutoff=0.6)
    meant = moved or list(dict.fromkeys([*near, *(name for name, word in last.items() if word in alike)]))
    hint = f"did you mean {' or '.join(meant[:3])}?" if meant else f"the known ones are {', '.join(known)}"
    of = f" of the method {method.name!r}" if method else ""
    return f"there is no setting {key!r}{of}; {hint}"


def _inside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
