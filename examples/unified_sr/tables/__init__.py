"""Finished runs as three Parquet files, which `compare` and any reader of data frames take from there.

``_settings`` turns a run's settings into columns, ``_rows`` a run's folder into rows, ``_schema`` says what each column
is, ``_files`` reads and writes, ``_pack`` finds the folders.
"""

from __future__ import annotations

from ._files import Tables, merged, read_tables, write_tables
from ._pack import gather, pack
from ._rows import rows_of
from ._schema import COLUMNS, column_of, describe
from ._settings import difference, evaluated_differently, without

__all__ = [
    "COLUMNS",
    "Tables",
    "column_of",
    "describe",
    "difference",
    "evaluated_differently",
    "gather",
    "merged",
    "pack",
    "read_tables",
    "rows_of",
    "without",
    "write_tables",
]
