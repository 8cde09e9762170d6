"""The three files of a folder: read with a word on what is wrong with one, written whole or not at all."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ._rows import Rows
from ._schema import COLUMNS, schema_of
from ._settings import identity, setting_columns

_ORDER = {"runs": ("run",), "steps": ("run", "step"), "queries": ("run", "task", "query")}


@dataclass(frozen=True)
class Tables:
    """The tables, as Arrow has them; ``tables.runs.to_pandas()`` is a data frame.

    Args:
        runs: one row a run.
        steps: one row a run and step.
        queries: one row a run on the test split, task and query.
    """

    runs: pa.Table
    steps: pa.Table
    queries: pa.Table

    @classmethod
    def of(cls, rows: Iterable[Rows]) -> Tables:
        """Put different runs into tables."""
        rows = list(rows)
        parts = {
            "runs": [each.run for each in rows],
            "steps": [row for each in rows for row in each.steps],
            "queries": [row for each in rows for row in each.queries],
        }
        return cls(**{table: _table(table, found) for table, found in parts.items()})

    @property
    def names(self) -> list[str]:
        """The runs."""
        return list(map(str, self.runs["run"].to_pylist()))

    def frames(self) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """The tables as data frames."""
        return _frame(self.runs), _frame(self.steps), _frame(self.queries)

    def without(self, runs: Iterable[str]) -> Tables:
        """The same without some runs."""
        unwanted = pa.array(list(runs), pa.string())

        def rest(table: pa.Table) -> pa.Table:
            return table.filter(pc.invert(pc.is_in(table["run"].cast(pa.string()), value_set=unwanted)))

        return Tables(*(rest(getattr(self, table)) for table in COLUMNS))


def merged(parts: Sequence[Tables], *, replace: bool = False) -> Tables:
    """Put tables below each other, in the order of their runs.

    Args:
        parts: at least one.
        replace: whether a run takes the place of an earlier one of its name.

    Raises:
        ValueError: if a run stands in two parts and is not to be replaced.
    """
    kept: list[Tables] = []
    for part in parts:
        twice = sorted({name for earlier in kept for name in earlier.names} & set(part.names))
        if twice and not replace:
            raise ValueError(f"{twice[0]} is given twice, with the same settings and seed; leave one out")
        kept = [*(earlier.without(twice) for earlier in kept), part]
    return Tables(*(_joined(table, [getattr(part, table) for part in kept]) for table in COLUMNS))


def read_tables(folder: str | Path) -> Tables:
    """Read the files of a folder, the runs with today's settings and named by them, whatever revision packed them.

    Raises:
        FileNotFoundError: naming a file that is not there.
        ValueError: naming a file that cannot be read, or that does not belong to the others.
    """
    tables = Tables(*(_read(Path(folder) / f"{table}.parquet") for table in COLUMNS))
    known = set(tables.names)
    for table in ("steps", "queries"):
        strange = set(map(str, pc.unique(getattr(tables, table)["run"].cast(pa.string())).to_pylist())) - known
        if strange:
            raise ValueError(
                f"{Path(folder) / table}.parquet has {min(strange)}, which runs.parquet lacks: they are not of one "
                "writing; remove the three files and pack the runs again"
            )
    return _renewed(tables, folder)


def write_tables(tables: Tables, folder: str | Path) -> list[Path]:
    """Write the files of a folder; until all are complete, those there stay as they are.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{table}.parquet" for table in COLUMNS]
    begun = [file.with_suffix(f".{os.getpid()}.part") for file in files]
    try:
        for table, file in zip(COLUMNS, begun, strict=True):
            pq.write_table(_joined(table, [getattr(tables, table)]), file, compression="zstd", compression_level=9)
        for file, part in zip(files, begun, strict=True):
            part.replace(file)
    finally:
        for part in begun:
            part.unlink(missing_ok=True)
    return files


def _frame(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    # Categories would stay where no row has them any more. The copy joins the columns, which are one block each.
    categories = [name for name in frame.columns if isinstance(frame[name].dtype, pd.CategoricalDtype)]
    return frame.astype(dict.fromkeys(categories, "str")).copy()


def _table(table: str, rows: list[dict[str, object]]) -> pa.Table:
    schema = schema_of(table, dict.fromkeys(name for row in rows for name in row))
    # from_pylist cannot make the dictionaries itself.
    plain = pa.schema([(field.name, _plain(field.type)) for field in schema])
    return pa.Table.from_pylist(rows, schema=plain).cast(schema)


def _joined(table: str, parts: Sequence[pa.Table]) -> pa.Table:
    """In one order of rows and columns, with one dictionary: the same bytes for the same content."""
    schema = schema_of(table, dict.fromkeys(name for part in parts for name in part.column_names))
    plain = pa.schema([(field.name, _plain(field.type)) for field in schema])
    filled = [_filled(part, plain) for part in parts]
    rows = pa.concat_tables(filled).sort_by([(name, "ascending") for name in _ORDER[table]])
    # A column that lost its last value with the runs that had it.
    empty = [name for name in rows.column_names if rows[name].null_count == len(rows)]
    schema = schema_of(table, [name for name in rows.column_names if name not in empty])
    return rows.combine_chunks().select(schema.names).cast(schema).unify_dictionaries()


def _renewed(tables: Tables, folder: str | Path) -> Tables:
    names: dict[str, str] = {}
    texts = []
    for row in tables.runs.select(["run", "label", "settings"]).to_pylist():
        columns = setting_columns(json.loads(row["settings"]))
        texts.append(columns["settings"])
        names[row["run"]] = identity({**columns, "label": row["label"]})
    if all(old == new for old, new in names.items()):
        return tables
    if len(set(names.values())) < len(names):
        first, second = next(
            (one, other) for one, other in itertools.combinations(names, 2) if names[one] == names[other]
        )
        raise ValueError(
            f"{first} and {second} in {folder} have the same settings and seed, but for settings that one of them "
            "lacks and that have their default in the other; remove the three files and pack one of the two"
        )
    place = tables.runs.schema.get_field_index("settings")
    runs = tables.runs.set_column(place, tables.runs.schema.field(place), pa.array(texts, pa.string()))
    parts = {"runs": runs, "steps": tables.steps, "queries": tables.queries}
    return Tables(**{table: _joined(table, [_renamed(part, names)]) for table, part in parts.items()})


def _renamed(table: pa.Table, names: Mapping[str, str]) -> pa.Table:
    place = table.schema.get_field_index("run")
    runs = pa.array([names[run] for run in table["run"].to_pylist()], pa.string())
    return table.set_column(place, "run", runs)


def _filled(part: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        part[field.name].cast(field.type) if field.name in part.column_names else pa.nulls(len(part), field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _read(file: Path) -> pa.Table:
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is not there; pass a folder that `pack` has written")
    try:
        found = pq.read_table(file)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read, so it is incomplete or no Parquet file: {error}") from error
    try:
        if "run" not in found.column_names:
            raise ValueError("it has no column 'run'")
        return _joined(file.stem, [found])
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no table of runs: {error}") from error
