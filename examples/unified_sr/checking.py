"""From values by ``section.key`` to checked settings, or one sentence about what is wrong with them."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .methods import METHODS, Method, defaults_of, method_named
from .settings import Section, Settings, flatten, known_settings, sections

S = TypeVar("S", bound=Section)


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
        name: _checked(kind, _inside(given, f"{name}."), f"{name}.") for name, kind in sections(found.settings).items()
    }
    return _checked(Settings, {**parts, **{key: value for key, value in given.items() if "." not in key}})


def changed(settings: Settings[Any], values: Mapping[str, Any]) -> Settings[Any]:
    """Return settings with other values, checked like all."""
    return build_settings(settings.method.name, {**flatten(settings.model_dump()), **flatten(values)})


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


def _checked(owner: type[S], values: Mapping[str, Any], prefix: str = "") -> S:
    """A section, or what is wrong with it in one sentence: the setting, what it must be, and what it is."""
    try:
        return owner(**values)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        field = owner.model_fields[name]
        raise ValueError(
            f"the setting {prefix}{name} must be {_wanted(field)}, got {values[name]!r} ({field.description})"
        ) from error


def _wanted(field: FieldInfo) -> str:
    words = {Ge: "of at least {0.ge}", Gt: "above {0.gt}", Le: "of at most {0.le}"}
    limits = [words[type(limit)].format(limit) for limit in field.metadata if type(limit) in words]
    kinds = [_kind(option) for option in _options(field.annotation) if option is not type(None)]
    null = [" or null"] if type(None) in _options(field.annotation) else []
    return " ".join([*kinds, " and ".join(limits)]).strip() + "".join(null)


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(annotation)))
    plain = typing.get_args(annotation)[0] if origin is typing.Annotated else annotation
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[plain]
