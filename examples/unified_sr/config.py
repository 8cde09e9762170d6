"""From a YAML file, ``--set`` pairs and flags to the settings of one method; nothing unknown gets through."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml

from .methods import METHODS, Method, method_named
from .settings import Settings, checked

SECTIONS = "methods"
"""The key of a YAML file under which settings stand for one method alone."""

BESIDE = "beside"
"""The key of a YAML file under which methods stand that are run for comparison, each with a sentence for the table."""


def resolve(
    *, file: str | Path | None = None, pairs: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> Settings:
    """Merge all sources of settings; later ones win: defaults, file, the file's section of the method, pairs, flags.

    Args:
        file: a YAML mapping of settings. Under ``methods:`` it may hold a mapping per method name, of which only
            the chosen method's applies (all are checked). Before it comes that of the method of which it is a variant,
            without what the variant itself is about.
        pairs: texts ``key=value``, the value written as in YAML.
        flags: values from the command line; ``None`` means not given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming an unknown key with the known ones near it, or a value of the wrong type or size.
    """
    shared, sections = _read_file(file)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    set_values = parse_pairs(pairs)
    chosen = {**shared, **set_values, **given}.get("method", Settings.method)
    method = method_named(str(chosen))
    for name, section in sections.items():
        owner = method_named(name).settings
        for key, value in section.items():
            if key in ("method", "data", "model", "seed"):
                raise ValueError(f"{key!r} cannot be set in the section {SECTIONS}.{name} of {file}; set it at the top")
            _checked_key(owner, key, value, f"{file}, section {SECTIONS}.{name}")
    merged = {**shared, **section_of(method, sections), **set_values, **given, "method": method.name}
    return build_settings(method.name, merged)


def beside(
    file: str | Path | None, *, pairs: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, tuple[Settings, str]]:
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
    content = read_yaml(file) if file is not None else {}
    wanted = content.get(BESIDE) or {}
    if not isinstance(wanted, dict) or not all(isinstance(text, str) for text in wanted.values()):
        raise ValueError(f"{BESIDE} in {file} must hold a sentence for each method's name, got {wanted!r}")
    pairs, flags = list(pairs), dict(flags or {})
    if resolve(file=file, pairs=pairs, flags=flags).method != content.get("method", Settings.method):
        return {}
    shared, sections = _read_file(file)
    given = {**parse_pairs(pairs), **{key: value for key, value in flags.items() if value is not None}}
    found: dict[str, tuple[Settings, str]] = {}
    for name, text in wanted.items():
        method = method_named(name)
        known = {item.name for item in fields(method.settings)}
        common = {key: value for key, value in {**shared, **given}.items() if key in known}
        found[name] = build_settings(name, {**common, **section_of(method, sections)}), text
    return found


def build_settings(method: str, values: Mapping[str, Any]) -> Settings:
    """Return the settings of a method, all values checked.

    Args:
        method: its name.
        values: by name; defaults fill the rest.

    Raises:
        ValueError: naming an unknown method or key, or a value of the wrong type or size.
    """
    owner = method_named(method).settings
    return owner(**{key: _checked_key(owner, key, value) for key, value in {**values, "method": method}.items()})


def parse_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """Read texts ``key=value``, the value written as in YAML.

    Raises:
        ValueError: naming the text that is none.
    """
    return dict(_parse_pair(pair) for pair in pairs)


def to_yaml(settings: Settings) -> str:
    """Return settings as YAML that ``resolve`` reads back."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True)


def differences(old: Mapping[str, Any], new: Settings) -> list[str]:
    """Name each setting that two runs do not share, as ``key: old -> new``.

    A setting that is None or False by default may be newer than the old run: absent there, it counts as that.
    """
    current = asdict(new)
    old = {
        **{entry.name: entry.default for entry in fields(new) if entry.default is None or entry.default is False},
        **old,
    }
    keys = [*current, *(key for key in old if key not in current)]
    absent = "(absent)"
    return [
        f"{key}: {old.get(key, absent)!r} -> {current.get(key, absent)!r}"
        for key in keys
        if old.get(key, absent) != current.get(key, absent)
    ]


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

    Where a variant differs from its original, the original's section does not count.

    Args:
        method: the method.
        sections: method -> its settings.
    """
    own = dict(sections.get(method.name, {}))
    if method.variant_of is None:
        return own
    original = {item.name: item.default for item in fields(METHODS[method.variant_of].settings)}
    variant = {item.name: item.default for item in fields(method.settings)}
    section = sections.get(method.variant_of, {})
    return {**{key: value for key, value in section.items() if variant.get(key) == original.get(key)}, **own}


def _read_file(file: str | Path | None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    content = read_yaml(file) if file is not None else {}
    content.pop(BESIDE, None)
    sections = content.pop(SECTIONS, None) or {}
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        hint = "; a list of methods is for the command grid" if isinstance(sections, list) else ""
        raise ValueError(
            f"{SECTIONS} in {file} must hold one mapping of settings per method name, got {sections!r}{hint}"
        )
    return content, sections


def _parse_pair(pair: str) -> tuple[str, Any]:
    key, equals, text = pair.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key=value, got {pair!r}")
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {key.strip()}: the value {text!r} is not YAML: {error}") from error


def _checked_key(owner: type[Settings], key: str, value: Any, where: str = "") -> Any:
    known = [item.name for item in fields(owner)]
    if key not in known:
        raise ValueError(_unknown(owner, key, known) + (f" ({where})" if where else ""))
    try:
        return checked(owner, key, value)
    except ValueError as error:
        raise ValueError(f"{error}" + (f" ({where})" if where else "")) from error


def _unknown(owner: type[Settings], key: str, known: list[str]) -> str:
    method = owner.method
    others = [name for name, other in METHODS.items() if key in {item.name for item in fields(other.settings)}]
    if others:
        have = "has" if len(others) == 1 else "have"
        return (
            f"the method {method!r} has no setting {key!r}, only {', '.join(others)} {have} it; "
            f"in a YAML file put it under {SECTIONS}: {others[0]}:"
        )
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the known ones are {', '.join(known)}"
    return f"there is no setting {key!r} of the method {method!r}; {hint}"
