"""From a YAML file, ``--set`` pairs and flags to the settings of one method; nothing unknown gets through.

On the way settings are one flat mapping, in which ``training.lr`` is ``lr`` of the section ``training``: such mappings
merge by their keys, and a file may write a setting either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .checking import build_settings, completed, unknown
from .methods import Method, method_named
from .settings import MethodSettings, Settings, flatten, known_settings, sections

METHOD = "method.name"
DEFAULT_METHOD = str(MethodSettings.model_fields["name"].default)

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

    Where another method is asked for than the file's, what defines it (``Method.defining``) wins over what the file
    says outside of its sections for methods, which may be the whole configuration of that other one.

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
    shared, own = _read_file(file)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    set_values = parse_pairs(pairs)
    method = method_named(str({**shared, **set_values, **given}.get(METHOD, DEFAULT_METHOD)))
    for name, section in own.items():
        for key in FIXED:
            if key in section:
                raise ValueError(f"{key!r} cannot be set in the section {SECTIONS}.{name} of {file}; set it at the top")
        try:
            build_settings(name, section)
        except ValueError as error:
            raise ValueError(f"{error} ({file}, section {SECTIONS}.{name})") from error
    defining = method.defining if method.name != shared.get(METHOD, DEFAULT_METHOD) else {}
    return build_settings(method.name, merged(shared, defining, section_of(method, own), set_values, given))


def beside(
    file: str | Path | None, *, pairs: Iterable[str] = (), flags: Mapping[str, Any] | None = None
) -> dict[str, tuple[Settings[Any], str]]:
    """Return the methods that a file wants run for comparison with its own: name -> settings and a sentence about them.

    They have the file's shared settings and, over these, the pairs and flags, as far as they know them. What defines
    them and their own sections win over all: a rate given for the file's method is not theirs. There are none where
    another method than the file's is asked for.

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
    shared, own = _read_file(file)
    if resolve(file=file, pairs=pairs, flags=flags).method.name != shared.get(METHOD, DEFAULT_METHOD):
        return {}
    given = merged(parse_pairs(pairs), {key: value for key, value in flags.items() if value is not None})
    found: dict[str, tuple[Settings[Any], str]] = {}
    for name, text in wanted.items():
        method = method_named(name)
        known = known_settings(method.settings)
        common = {key: value for key, value in merged(shared, given).items() if key in known}
        found[name] = build_settings(name, merged(common, method.defining, section_of(method, own))), text
    return found


def merged(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """Merge settings by ``section.key``, later ones winning; a later number of steps does so over earlier epochs.

    Example:
        >>> merged({"training.epochs": 3, "seed": 1}, {"training.steps": 5})
        {'seed': 1, 'training.steps': 5}
    """
    found: dict[str, Any] = {}
    for source in sources:
        if "training.steps" in source:
            found.pop("training.epochs", None)
        found |= source
    return found


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

    A setting may be newer than the old run: absent there, it counts as its default.
    """
    current, old = flatten(new.model_dump()), completed(flatten(old))
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
        if "." not in key and (key not in Settings.model_fields or key in sections()):
            raise ValueError(f"{path}: {unknown(key, value)}")
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
