"""Finds finished runs, and adds them to the files of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..run_folder import CONFIG, PARTIAL, RunFolder
from ._files import Tables, merged, read_tables, write_tables
from ._rows import rows_of

Say = Callable[[str], None]


def pack(paths: Sequence[str | Path], out: str | Path, *, say: Say = print) -> Tables:
    """Add finished runs to the three files of a folder; a run that is there already is replaced.

    A run is the same if its label, settings and seed are. To forget runs, remove the files and pack the others again.

    Args:
        paths: folders of runs, or of grids.
        out: the folder of the files.
        say: prints a line to the user.

    Raises:
        FileNotFoundError: if a folder is not there.
        ValueError: if there is no finished run, two are the same, or the files that are there cannot be read.
    """
    new = gather(paths, say=say)
    before = [read_tables(out)] if _is_packed(Path(out)) else []
    tables = merged([*before, new], replace=True)
    files = write_tables(tables, out)
    replaced = sum(name in part.names for part in before for name in new.names)
    size = sum(file.stat().st_size for file in files)
    say(
        f"{len(new.runs)} runs packed, {replaced} of them in the place of an earlier one; "
        f"{out} has {len(tables.runs)} runs in {size / 2**20:.2f} MiB"
    )
    return tables


def gather(paths: Sequence[str | Path], *, say: Say = print) -> Tables:
    """Read runs, of folders of runs and of folders with the three files alike.

    Args:
        paths: the folders.
        say: is told what is left out.

    Raises:
        FileNotFoundError: if a folder is not there.
        ValueError: if a folder holds no run, no run is finished, or two are the same.
    """
    packed = [path for path in map(Path, paths) if _is_packed(path)]
    parts = {path.resolve(): read_tables(path) for path in packed}
    # Runs may lie beside the three files, finished after these were written.
    single = [path for path in map(Path, paths) if path not in packed or next(path.rglob(CONFIG), None)]
    folders = list(_folders(single))
    finished = [folder for folder in folders if folder.finished and not _is_partial(folder.path)]
    for folder in folders:
        if folder not in finished:
            say(f"left out, since it failed or is not finished: {folder.path}")
    rows = {folder.path: rows_of(folder) for folder in finished}
    owners: dict[str, Path] = {}
    for place, found in rows.items():
        name = found.run["run"]
        other = owners.setdefault(name, place)
        if other != place:
            raise ValueError(f"{other} and {place} have the same settings and seed; leave one out")
        for path, tables in parts.items():
            if place.is_relative_to(path):
                parts[path] = tables.without([name])
    whole = [*parts.values(), *([Tables.of(rows.values())] if rows else [])]
    if not whole:
        raise ValueError(f"none of the runs in {', '.join(map(str, paths))} is finished")
    return merged(whole)


def _is_packed(path: Path) -> bool:
    return (path / "runs.parquet").is_file()


def _is_partial(path: Path) -> bool:
    """Whether it is what is left of a copy that was cut off."""
    return path.name.endswith(PARTIAL)


def _folders(paths: Iterable[Path]) -> Iterable[RunFolder]:
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"the folder {str(path)!r} is not there; pass folders of runs or of a grid")
        inside = sorted(file.parent.resolve() for file in path.rglob(CONFIG))
        if not inside:
            raise ValueError(f"{str(path)!r} holds no run (no {CONFIG}); pass folders of runs or of a grid")
        found.update(dict.fromkeys(inside))
    return map(RunFolder, found)
