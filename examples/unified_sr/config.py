"""From a YAML file, ``--set`` pairs and flags to the settings of one method; nothing unknown gets through.

On the way settings are one flat mapping, in which ``training.lr`` is ``lr`` of the section ``training``: such mappings
merge by their keys, and a file may write a setting either way.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from .methods import METHODS, Method, defaults_of, method_named
from .settings import MethodSettings, Section, Settings

METHOD = "method.name"
SECTIONS = "methods"
"""The key of a YAML file under which settings stand for one method alone."""

BESIDE = "beside"
"""The key of a YAML file under which methods stand that are run for comparison, each with a sentence for the table."""

FIXED = (METHOD, "data.source", "model.name", "seed")
"""Settings of a run, which no method has for itself."""


def resolve(
    *, file: str | Path | None = None, pairs: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Settings[Any]:
    """Merge all sources of settings; later ones win: defaults, file, the file's section of the method, pairs, flags.

    Args:
        file: a YAML file with sections of settings. Under ``methods:`` it may hold the like for each method's name, of
            which only the chosen method's applies (all are checked). Before it comes that of the method of which it is
            a variant, without what the variant itself is about.
        pairs: texts ``section.key=value``, the value written as in YAML.
        flags: values from the command line; ``None`` means not given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming an unknown key with the known ones near it, or a value of the wrong type or size.
    """
    shared, sections = _read_file(file)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    set_values = parse_pairs(pairs)
    method = method_named(str({**shared, **set_values, **given}.get(METHOD, _default_method())))
    for name, section in sections.items():
        for key in FIXED:
            if key in section:
                raise ValueError(f"{key!r} cannot be set in the section {SECTIONS}.{name} of {file}; set it at the top")
        try:
            build_settings(name, section)
        except ValueError as error:
            raise ValueError(f"{error} ({file}, section {SECTIONS}.{name})") from error
    return build_settings(method.name, {**shared, **section_of(method, sections), **set_values, **given})


def beside(
    file: str | Path | None, *, pairs: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, tuple[Settings[Any], str]]:
    """Return the methods that a file wants run for comparison with its own: name -> settings and a sentence about them.

    They have the file's shared settings and, over these, the pairs and flags, as far as they know them. Their own
    sections win over all: a rate given for the file's method is not theirs. There are none where another method
    than the file's is asked for.

    Args:
        file: as of `resolve`.
        pairs: as of `resolve`.
        flags: as of `resolve`.

    Raises:
        ValueError: if there is no such method, or the file gives no sentence.
    """
    wanted = (read_yaml(file) if file is not None else {}).get(BESIDE) or {}
    if not isinstance(wanted, dict) or not all(isinstance(text, str) for text in wanted.values()):
        raise ValueError(f"{BESIDE} in {file} must hold a sentence for each method's name, got {wanted!r}")
    pairs, flags = list(pairs), dict(flags or {})
    shared, sections = _read_file(file)
    if resolve(file=file, pairs=pairs, flags=flags).method.name != shared.get(METHOD, _default_method()):
        return {}
    given = {**parse_pairs(pairs), **{key: value for key, value in flags.items() if value is not None}}
    found: dict[str, tuple[Settings[Any], str]] = {}
    for name, text in wanted.items():
        method = method_named(name)
        known = known_settings(method.settings)
        common = {key: value for key, value in {**shared, **given}.items() if key in known}
        found[name] = build_settings(name, {**common, **section_of(method, sections)}), text
    return found


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
    given = {**defaults_of(found), **flatten(values), METHOD: found.name}
    for key, value in given.items():
        if key not in known:
            raise ValueError(_unknown(found, key, value, known))
    sections = {
        name: _checked(kind, _inside(given, f"{name}."), f"{name}.") for name, kind in _sections(found.settings).items()
    }
    return _checked(Settings, {**sections, **{key: value for key, value in given.items() if "." not in key}})


def changed(settings: Settings[Any], values: Mapping[str, Any]) -> Settings[Any]:
    """Return settings with other values, checked like all."""
    return build_settings(settings.method.name, {**flatten(settings.model_dump()), **flatten(values)})


def flatten(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings as one mapping by ``section.key``.

    Example:
        >>> flatten({"seed": 1, "training": {"lr": 0.1}, "method.rank": 2})
        {'seed': 1, 'training.lr': 0.1, 'method.rank': 2}
    """
    found: dict[str, Any] = {}
    for key, value in sections.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}.")
        elif value is not None or name not in _sections(MethodSettings):  # YAML reads an empty section as null
            found[name] = value
    return found


def known_settings(method: type[MethodSettings]) -> dict[str, FieldInfo]:
    """Return all settings by ``section.key`` with their declarations, of which the section ``method`` has a class."""
    sections = _sections(method)
    top = {name: field for name, field in Settings.model_fields.items() if name not in sections}
    return top | {
        f"{name}.{key}": field for name, section in sections.items() for key, field in section.model_fields.items()
    }


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Read texts ``section.key=value``, the value written as in YAML.

    Raises:
        ValueError: naming the text that is none.
    """
    return flatten(dict(_parse_pair(pair) for pair in pairs))


def to_yaml(settings: Settings[Any]) -> str:
    """Return settings as YAML that ``resolve`` reads back."""
    return yaml.safe_dump(settings.model_dump(), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Settings[Any]) -> list[str]:
    """Name each setting that two runs do not share, as ``section.key: old -> new``.

    A setting that is None or False by default may be newer than the old run: absent there, it counts as that.
    """
    current = flatten(new.model_dump())
    known = known_settings(type(new.method))
    old = {
        **{key: field.default for key, field in known.items() if field.default is None or field.default is False},
        **old,
    }
    keys = [*current, *(key for key in old if key not in current)]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)!r} -> {current.get(key, absent)!r}"
        for key in keys
        if old.get(key, absent) != current.get(key, absent)
    ]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read the settings of a run out of its folder, by ``section.key``; they need not be known any more.

    Raises:
        ValueError: as `read_yaml`, or if a setting stands outside of its section.
    """
    found = flatten(read_yaml(path))
    for key, value in found.items():
        if ("." not in key and key not in Settings.model_fields) or key in _sections(MethodSettings):
            known = {
                name: field for method in METHODS.values() for name, field in known_settings(method.settings).items()
            }
            raise ValueError(f"{path}: {_unknown(METHODS[_default_method()], key, value, known)}")
    return found


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML, or no mapping.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the configuration {str(path)!r} is no file; pass the path of a YAML file")
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} must be a mapping of settings to values, got {type(content).__name__}")
    return content


def section_of(method: Method, sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the settings that hold for one method: its section over that of the method of which it is a variant.

    What the variant is about is not taken from the original's section.

    Args:
        method: the method.
        sections: method -> its settings by ``section.key``.
    """
    original = sections.get(method.variant_of or "", {})
    return {
        **{key: value for key, value in original.items() if key not in method.defaults},
        **sections.get(method.name, {}),
    }


def _default_method() -> str:
    return str(MethodSettings.model_fields["name"].default)


def _sections(method: type[MethodSettings]) -> dict[str, type[Section]]:
    found = {name: field.annotation for name, field in Settings.model_fields.items()} | {"method": method}
    return {name: kind for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, Section)}


def _inside(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _read_file(file: str | Path | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    content = read_yaml(file) if file is not None else {}
    content.pop(BESIDE, None)
    sections = content.pop(SECTIONS, None) or {}
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        hint = "; a list of methods is for the command grid" if isinstance(sections, list) else ""
        raise ValueError(
            f"{SECTIONS} in {file} must hold one mapping of settings per method name, got {sections!r}{hint}"
        )
    return flatten(content), {name: flatten(section) for name, section in sections.items()}


def _parse_pair(pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key=value, got {pair!r}")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key.strip()}: the value {text!r} is not YAML: {error}") from error


S = TypeVar("S", bound=Section)


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


def _unknown(method: Method, key: str, value: Any, known: Mapping[str, FieldInfo]) -> str:
    sections = _sections(method.settings)
    if key in sections:
        first = next(iter(sections[key].model_fields))
        return f"{key!r} is a section of settings such as {key}.{first}, got {value!r}"
    others = [name for name, other in METHODS.items() if key in known_settings(other.settings)]
    if others:
        have = "has" if len(others) == 1 else "have"
        return (
            f"the method {method.name!r} has no setting {key!r}, only {', '.join(others)} {have} it; "
            f"in a YAML file put it under {SECTIONS}: {others[0]}:"
        )
    last = {name: name.rpartition(".")[2] for name in known}
    own = key.rpartition(".")[2]
    moved = [name for name, word in last.items() if word == own]
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    alike = difflib.get_close_matches(own, last.values(), n=2, cutoff=0.6)
    found = moved or list(dict.fromkeys([*near, *(name for name, word in last.items() if word in alike)]))
    hint = f"did you mean {' or '.join(found[:3])}?" if found else f"the known ones are {', '.join(known)}"
    return f"there is no setting {key!r} of the method {method.name!r}; {hint}"
