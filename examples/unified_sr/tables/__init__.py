"""Finished runs as three Parquet files, which `compare` and any reader of data frames take from there.

``_settings`` turns a run's settings into columns, ``_rows`` a run's folder into rows, ``_schema`` says what each column
is, ``_files`` reads and writes, ``_pack`` finds the folders.
"""

from __future__ import annotations

from ._files import read_tables
from ._pack import gather, pack
from ._schema import describe
from ._settings import difference, evaluated_differently, without

__all__ = ["describe", "difference", "evaluated_differently", "gather", "pack", "read_tables", "without"]
