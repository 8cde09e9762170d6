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
        columns: name -> one value a row; of a list of structs a list of mappings, or None.
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
        structs: the columns that are lists of structs -> the fields to read of each; a page of results has many more.
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
    wanted = pa.array(sorted(within[1]), pa.int64()) if within else None
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path} is no complete Parquet file ({error}); fetch it again") from error
        with file:
            leaves = [*columns, *_leaves(path, file.schema, columns, structs or {})]
            first = 1
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=leaves):
                if within:
                    batch = batch.filter(pc.is_in(batch.column(within[0]).cast(pa.int64()), value_set=wanted))
                yield Rows(path, first, batch.to_pydict())
                first += batch.num_rows


def _leaves(path: Path, schema: Any, columns: Sequence[str], structs: Mapping[str, Sequence[str]]) -> list[str]:
    """Return where a file holds the fields of lists of structs, once everything is known to be there."""
    leaves = [schema.column(place).path for place in range(len(schema))]
    names = list(dict.fromkeys(leaf.partition(".")[0] for leaf in leaves))
    # Between the names of a list and of a field stand two that depend on who wrote the file.
    fields = {f"{name}[].{rest[2]}": leaf for leaf in leaves for name, *rest in [leaf.split(".")] if len(rest) == 3}
    wanted = [f"{name}[].{field}" for name, own in structs.items() for field in own]
    missing = [name for name in columns if name not in names] + [name for name in wanted if name not in fields]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}; it has {', '.join(names)}")
    return [fields[name] for name in wanted]
