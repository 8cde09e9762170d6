"""Columns of Parquet files, a few thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BATCH_ROWS = 4096
"""Rows that are in memory at once."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a file.

    Args:
        path: the file.
        first: the number, from 1, of the first of them.
        columns: name -> one value a row; a struct column of lists is one list of tuples a row.
    """

    path: Path
    first: int
    columns: Mapping[str, list[Any]]

    def where(self, row: int) -> str:
        """The place of a row, counted from 0 among these, as messages spell it."""
        return f"{self.path}, row {self.first + row}"


def parquet_files(folder: Path) -> list[Path]:
    """Return a folder's Parquet files in the order of their names, which is that of their parts."""
    return sorted(folder.glob("*.parquet"))


def read_parquet(
    paths: Sequence[Path],
    columns: Sequence[str],
    structs: Mapping[str, Sequence[str]] | None = None,
    within: tuple[str, set[int]] | None = None,
) -> Iterator[Rows]:
    """Yield the rows of some files.

    Args:
        paths: the files.
        columns: the plain columns to read.
        structs: the columns that are lists of structs -> the fields to read of each; each row's value is a list of
            tuples of these fields.
        within: the name of a column of whole numbers and those that are wanted: other rows are left out, and then the
            row numbers are those of the rest.

    Raises:
        ImportError: if pyarrow is not installed.
        ValueError: naming the columns and fields that a file lacks, or the file that is no Parquet file.
    """
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("reading Parquet files needs pyarrow: pip install 'gradsub[examples]'") from error
    structs = structs or {}
    wanted = pa.array(sorted(within[1]), pa.int64()) if within else None
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is no complete Parquet file ({error}); fetch it again") from error
        with file:
            _check(path, file.schema_arrow, columns, structs)
            first = 1
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[*columns, *structs]):
                if within:
                    batch = batch.filter(pc.is_in(batch.column(within[0]).cast(pa.int64()), value_set=wanted))
                found = {name: batch.column(name).to_pylist() for name in columns}
                found |= {name: _structs(pc, batch.column(name), fields) for name, fields in structs.items()}
                yield Rows(path, first, found)
                first += batch.num_rows


def _check(path: Path, schema: Any, columns: Sequence[str], structs: Mapping[str, Sequence[str]]) -> None:
    import pyarrow as pa

    missing = [name for name in columns if name not in schema.names]
    for name, fields in structs.items():
        kind = schema.field(name).type if name in schema.names else pa.null()
        element = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else pa.null()
        inner = {field.name for field in element} if pa.types.is_struct(element) else set()
        missing += [f"{name}[].{field}" for field in fields if field not in inner]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(schema.names)}")


def _structs(pc: Any, column: Any, fields: Sequence[str]) -> list[list[tuple[Any, ...]]]:
    # Only the fields that are needed become Python objects: a page of results has many more.
    flat = column.flatten()
    values = list(zip(*(pc.struct_field(flat, field).to_pylist() for field in fields), strict=True))
    rows, start = [], 0
    for length in pc.list_value_length(column).to_pylist():
        rows.append(values[start : start + (length or 0)])
        start += length or 0
    return rows
