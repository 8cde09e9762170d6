"""The three files of a folder: read with a word on what is wrong with one, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ._rows import Rows
from ._schema import COLUMNS, schema_of
from ._settings import identity, setting_columns

_ORDER = {"runs": ["run"], "steps": ["run", "step"], "queries": ["run", "task", "query"]}


class Tables(NamedTuple):
    """The tables: one row a run; one a run and step; one a run on the test split, task and query."""

    runs: pd.DataFrame
    steps: pd.DataFrame
    queries: pd.DataFrame

    @classmethod
    def of(cls, rows: Iterable[Rows]) -> Tables:
        """Put different runs into tables."""
        rows = list(rows)
        runs = pd.DataFrame([each.run for each in rows])
        steps = pd.DataFrame([row for each in rows for row in each.steps])
        return cls(runs, steps, pd.DataFrame([row for each in rows for row in each.queries])).typed()

    @property
    def names(self) -> list[str]:
        """The runs."""
        return list(self.runs["run"])

    def without(self, runs: Iterable[str]) -> Tables:
        """The same without some runs."""
        unwanted = set(runs)
        return Tables(*(frame[~frame["run"].isin(unwanted)] for frame in self))

    def typed(self) -> Tables:
        """The same in the order and with the types that the files have."""
        return Tables(*(_frame(_arrow(table, frame)) for table, frame in zip(COLUMNS, self, strict=True)))


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
    return Tables(*map(pd.concat, zip(*kept, strict=True))).typed()


def read_tables(folder: str | Path) -> Tables:
    """Read the files of a folder, the runs with today's settings and named by them, whatever revision packed them.

    Raises:
        FileNotFoundError: naming a file that is not there.
        ValueError: naming a file that cannot be read, or that does not belong to the others.
    """
    tables = Tables(*(_read(Path(folder) / f"{table}.parquet") for table in COLUMNS))
    for table, frame in zip(COLUMNS, tables, strict=True):
        strange = set(frame["run"]).difference(tables.names)
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
        for table, frame, file in zip(COLUMNS, tables, begun, strict=True):
            pq.write_table(_arrow(table, frame), file, compression="zstd", compression_level=9)
        for file, part in zip(files, begun, strict=True):
            part.replace(file)
    finally:
        for part in begun:
            part.unlink(missing_ok=True)
    return files


def _arrow(table: str, frame: pd.DataFrame) -> pa.Table:
    """In one order of rows and columns, without empty families of columns: the same bytes for the same content."""
    schema = schema_of(table, frame.columns[frame.notna().any()])
    rows = frame.reindex(columns=schema.names).sort_values(_ORDER[table])
    plain = pa.schema([(field.name, _plain(field.type)) for field in schema])
    found = pa.Table.from_pandas(rows, plain, preserve_index=False).combine_chunks()
    return found.cast(schema).replace_schema_metadata()


def _frame(table: pa.Table) -> pd.DataFrame:
    # Categories would stay where no row has them any more. The copy joins the columns, which are one block each.
    return table.cast(pa.schema([(field.name, _plain(field.type)) for field in table.schema])).to_pandas().copy()


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _renewed(tables: Tables, folder: str | Path) -> Tables:
    runs = tables.runs
    columns = [setting_columns(json.loads(text)) for text in runs["settings"]]
    names = pd.Series(
        [identity({**found, "label": label}) for found, label in zip(columns, runs["label"], strict=True)], runs["run"]
    )
    if (names == names.index).all():
        return tables
    twice = names.index[names.duplicated(keep=False) & (names == names[names.duplicated()].min())]
    if len(twice):
        raise ValueError(
            f"{twice[0]} and {twice[1]} in {folder} have the same settings and seed, but for settings that one of them "
            "lacks and that have their default in the other; remove the three files and pack one of the two"
        )
    tables = tables._replace(runs=runs.assign(settings=[found["settings"] for found in columns]))
    return Tables(*(frame.assign(run=frame["run"].map(names)) for frame in tables)).typed()


def _read(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} is not there; pass a folder that `pack` has written")
    try:
        found = pq.read_table(file)
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(file)!r} cannot be read, so it is incomplete or no Parquet file: {error}") from error
    try:
        if "run" not in found.column_names:
            raise ValueError("it has no column 'run'")
        return _frame(_arrow(file.stem, _frame(found)))
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is no table of runs: {error}") from error
