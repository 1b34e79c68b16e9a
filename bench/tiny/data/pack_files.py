"""A pack as a Parquet file: columns text, source and document, a conversation a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from softprune.errors import InputError

MAX_ROW_TOKENS = 1000
"""A row has fewer tokens than this."""

_SCHEMA = pa.schema([("text", pa.string()), ("source", pa.string()), ("document", pa.string())])


@dataclass(frozen=True)
class Row:
    """A row: the Harmony text, the source's or generator's name, and the document(s), joined by " & "."""

    text: str
    source: str
    document: str

    @property
    def documents(self) -> list[str]:
        """The documents that the row was made from."""
        return self.document.split(" & ")


def write_pack(path: Path, rows: Sequence[Row]) -> None:
    """Write rows in their order; the same rows and version of pyarrow give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({name: [getattr(row, name) for row in rows] for name in _SCHEMA.names}, schema=_SCHEMA)
    temporary = path.with_name(f".{path.name}")
    pq.write_table(table, temporary, compression="zstd", compression_level=19, row_group_size=4096, use_dictionary=["source"])
    temporary.replace(path)


def read_pack(path: Path) -> list[Row]:
    """The rows of a pack.

    Raises:
        InputError: a column is missing.
    """
    table = pq.read_table(path)
    for name in _SCHEMA.names:
        if name not in table.column_names:
            raise InputError(str(path), name, f"columns {table.column_names}", f"columns {_SCHEMA.names}")
    return [Row(**row) for row in table.select(_SCHEMA.names).to_pylist()]
