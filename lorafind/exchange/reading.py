"""From the tables of ``tables.py`` to rows that an index can take in."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafind.exchange.source import (
    SIGNATURES,
    Compared,
    FileRow,
    LayoutRow,
    LoraRow,
    RelationRow,
    SignatureRow,
)
from lorafind.exchange.tables import FORMAT, LORAS, ROWS, TABLES, Tables, schemas
from lorafind.index.chunks import dtype_from_text
from lorafind.index.problem import IndexProblem
from lorafind.index.roots import Root
from lorafind.index.rows import StoredBasis
from lorafind.signatures.constants import IDENTITY

if TYPE_CHECKING:
    import pyarrow as pa


class TableSource:
    """Exported tables as a :class:`~lorafind.exchange.source.Source`.

    Raises IndexProblem where they are not whole, not lorafind's, or of a newer format.
    """

    def __init__(self, tables: Tables) -> None:
        self.label = tables.label
        self._tables = tables
        whole = tables.facts(TABLES[-1])
        if int(whole.get("format", 0)) > FORMAT:
            raise IndexProblem(
                f"{self.label} was written by a newer lorafind (its format is {whole['format']}, "
                f"this one reads up to {FORMAT}): update lorafind."
            )
        for name, columns in schemas().items():
            wanted = whole["tables"].get(name)
            if name != TABLES[-1] and tables.count(name) != wanted:
                raise IndexProblem(
                    f"{self.label} is not whole: {name} has {tables.count(name):,} rows and was "
                    f"written with {wanted or 0:,}; export it again."
                )
            lacking = [column for column in columns.names if column not in tables.columns(name)]
            if lacking:
                raise IndexProblem(f"{self.label} is damaged: {name} lacks {lacking[0]}.")
        shard = whole["shard"]
        self.shard: tuple[int, int] | None = (shard[0], shard[1]) if shard else None
        self.compared: Mapping[str, Compared] = {
            key: Compared(full, copies, {int(i): proved for i, proved in holders.items()})
            for key, (full, copies, holders) in whole["compared"].items()
        }
        self.in_use: Mapping[str, str] = whole["in_use"]

    def roots(self) -> list[Root]:
        return [Root(*row) for row in self._rows("roots", ROWS)]

    def count(self, table: str) -> int:
        return self._tables.count(table)

    def layouts(self) -> Iterator[LayoutRow]:
        for number, digest, architecture, modules in self._rows("layouts", ROWS):
            yield LayoutRow(number, digest, architecture, zlib.compress(modules.encode()))

    def loras(self) -> Iterator[LoraRow]:
        return (LoraRow(*row) for row in self._rows("loras", LORAS))

    def files(self) -> Iterator[FileRow]:
        return (FileRow(*row[:-1]) for row in self._rows("files", ROWS))

    def signatures(self, loras: np.ndarray) -> Iterator[list[SignatureRow]]:
        if not len(loras):
            return
        between = (int(loras[0]), int(loras[-1]))
        for batch in self._tables.batches("signatures", SIGNATURES, between):
            wanted = np.isin(batch.column("lora").to_numpy(), loras)
            rows = [
                SignatureRow(*row)
                for row, is_wanted in zip(_rows("signatures", batch), wanted, strict=True)
                if is_wanted
            ]
            if rows:
                yield rows

    def identities(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for batch in self._tables.batches("identity", LORAS):
            records = np.zeros(batch.num_rows, IDENTITY)
            for name in ("norms", "sketch"):
                flat = batch.column(name).flatten().to_numpy()
                records[name] = flat.reshape(records[name].shape)
            series = np.array(batch.column("series").to_pylist())
            for key in np.unique(series).tolist():
                mine = series == key
                yield key, batch.column("lora").to_numpy()[mine], records[mine]

    def relations(self) -> Iterator[RelationRow]:
        return (RelationRow(*row) for row in self._rows("relations", ROWS))

    def bases(self) -> Iterator[StoredBasis]:
        from lorafind.bases.basis import PUBLISHED

        # The arrays of one basis stand together.
        for own, rows in groupby(self._rows("bases", 1), key=lambda row: row[:5]):
            name, architecture, version, facts, made_ns = own
            parts = {
                part: np.frombuffer(data, dtype_from_text(dtype)).reshape(json.loads(shape))
                for *_, part, dtype, shape, data in rows
            }
            yield StoredBasis(
                name, architecture, PUBLISHED, version, json.loads(facts), parts, made_ns
            )

    def _rows(self, name: str, size: int) -> Iterator[tuple[Any, ...]]:
        for batch in self._tables.batches(name, size):
            yield from _rows(name, batch)


def _rows(name: str, batch: pa.RecordBatch) -> Iterator[tuple[Any, ...]]:
    """Rows of plain values; lists of numbers become BLOBs."""
    import pyarrow as pa

    columns: list[list[Any]] = []
    for field in schemas()[name]:
        column = batch.column(field.name)
        if pa.types.is_list(field.type):
            dtype = np.dtype(field.type.value_type.to_pandas_dtype()).newbyteorder("<")
            numbers = column.values.to_numpy().astype(dtype, copy=False)
            ends = column.offsets.to_numpy()
            columns.append([numbers[a:b].tobytes() for a, b in pairwise(ends)])
        else:
            columns.append(column.to_pylist())
    return zip(*columns, strict=True)
