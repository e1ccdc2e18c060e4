"""From an index to the tables of ``tables.py``, a batch at a time."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafind import __version__
from lorafind.exchange.source import (
    SIGNATURES,
    IndexSource,
    LayoutRow,
    blocks,
)
from lorafind.exchange.tables import EMBEDDINGS, FORMAT, KEY, LORAS, ROWS, TABLES, Table, schemas
from lorafind.files.scan import join
from lorafind.index.chunks import dtype_to_text
from lorafind.index.rows import readable, to_text

if TYPE_CHECKING:
    import pyarrow as pa

    from lorafind.bases.basis import Basis


def tables(source: IndexSource) -> Iterator[Table]:
    """An index as tables; each is to be written before the next is asked for."""
    makers = {
        "layouts": (map(_layout, source.layouts()), ROWS),
        "loras": (source.loras(), LORAS),
        "files": (_files(source), ROWS),
        "relations": (source.relations(), ROWS),
        "bases": (_bases(source), 1),
    }
    counts: dict[str, int] = {}

    def table(
        name: str, columns: pa.Schema, batches: Iterable[pa.RecordBatch], **facts: Any
    ) -> Table:
        entry = to_text({"format": FORMAT, "table": name, "version": __version__, **facts})
        schema = columns.with_metadata({KEY: entry})

        def counted() -> Iterator[pa.RecordBatch]:
            for made in batches:
                counts[name] = counts.get(name, 0) + made.num_rows
                yield made.replace_schema_metadata(schema.metadata)

        counts[name] = 0
        return Table(name, schema, counted())

    for name, columns in schemas().items():
        if name == "signatures":
            yield table(name, columns, _signatures(source, columns))
        elif name == "identity":
            yield table(name, columns, _identities(source, columns))
        elif name in makers:
            rows, size = makers[name]
            yield table(name, columns, _batches(columns, rows, size))
    for name, columns, batches, facts in _embeddings(source):
        yield table(name, columns, batches, **facts)
    whole = {
        "tables": counts,
        "shard": source.shard,
        "compared": source.compared,
        "in_use": dict(source.in_use),
    }
    columns = schemas()[TABLES[-1]]
    yield table(TABLES[-1], columns, [batch(columns, source.roots())], **whole)


def _batches(
    columns: pa.Schema, rows: Iterable[Sequence[Any]], size: int
) -> Iterator[pa.RecordBatch]:
    for block in blocks(rows, size):
        yield batch(columns, block)


def batch(columns: pa.Schema, rows: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    """Rows of plain values as a batch; numbers in BLOBs become lists."""
    import pyarrow as pa

    made = []
    for field, values in zip(columns, zip(*rows, strict=True), strict=True):
        if pa.types.is_list(field.type):
            dtype = np.dtype(field.type.value_type.to_pandas_dtype()).newbyteorder("<")
            ends = np.cumsum([0, *(len(value) // dtype.itemsize for value in values)])
            numbers = np.frombuffer(b"".join(values), dtype)
            made.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(numbers)))
        else:
            made.append(pa.array(values, field.type))
    return pa.record_batch(made, schema=columns)


def _layout(row: LayoutRow) -> tuple[Any, ...]:
    return (*row[:3], zlib.decompress(row.modules).decode())


def _files(source: IndexSource) -> Iterator[tuple[Any, ...]]:
    roots = {root.id: root.path for root in source.roots()}
    for row in source.files():
        name = readable(os.fsdecode(join(roots[row.root], row.path)))
        yield (*row._replace(is_link=bool(row.is_link)), name)


def _bases(source: IndexSource) -> Iterator[tuple[Any, ...]]:
    for basis in source.bases():
        own = (basis.id, basis.architecture, basis.version, to_text(basis.facts), basis.made_ns)
        for name, part in basis.parts.items():
            data = np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes()
            yield (*own, name, dtype_to_text(part.dtype), json.dumps(part.shape), data)


def _signatures(source: IndexSource, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    for block in blocks((row.id for row in source.loras()), 64 * SIGNATURES):
        for rows in source.signatures(np.sort(np.array(block, np.int64))):
            if rows:
                yield batch(columns, rows)


def _identities(source: IndexSource, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for key, ids, records in source.identities():
        made = [pa.array(ids), pa.array([key] * len(ids), pa.string())]
        for name in ("norms", "sketch"):
            flat = pa.array(np.ascontiguousarray(records[name]).reshape(-1))
            width = columns.field(name).type.list_size
            made.append(pa.FixedSizeListArray.from_arrays(flat, width))
        yield pa.record_batch(made, schema=columns)


def _embeddings(
    source: IndexSource,
) -> Iterator[tuple[str, pa.Schema, Iterator[pa.RecordBatch], Mapping[str, Any]]]:
    """The embeddings in the basis in use of every architecture that has one."""
    import pyarrow as pa

    from lorafind.bases.stored import current
    from lorafind.index.classes import kinds

    rows = source.store.conn.execute("SELECT DISTINCT architecture FROM loras").fetchall()
    for architecture in sorted({kind for (name,) in rows for kind in kinds(name)}):
        basis = current(source.store, architecture, light=True)
        if basis is None or "model" not in basis.spaces:
            continue
        columns = pa.schema(
            [
                ("lora", pa.int64()),
                ("content", pa.string()),
                ("path", pa.string()),
                ("groups", pa.uint8()),
                ("fitted", pa.bool_()),
                ("vector", pa.list_(pa.float32(), basis.spaces["model"].size)),
            ]
        )
        facts = {
            "basis": basis.id,
            "basis_name": basis.facts.get("name", ""),
            "architecture": architecture,
            "metric": "euclidean" if basis.euclidean else "cosine",
        }
        # A colon is no letter of a file name on Windows, nor of a table's in LanceDB.
        name = EMBEDDINGS + architecture.replace(":", "-")
        yield name, columns, _vectors(source, basis, columns), facts


def _vectors(source: IndexSource, basis: Basis, columns: pa.Schema) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    for ids, rows in source.store.chunks.scan("embedding", basis.id):
        # Zeros stand for a LoRA without any of the basis's groups; it is never compared.
        kept = rows["vector"].any(1)
        ids, rows = ids[kept], rows[kept]
        known = {
            number: (content, None if root is None else os.fsdecode(join(root, path)))
            for number, content, root, path in source.store.conn.execute(
                "SELECT l.id, l.content, r.path, f.path FROM json_each(?) "
                "JOIN loras l ON l.id = json_each.value LEFT JOIN files f ON f.id = (SELECT id "
                "FROM files WHERE lora = l.id ORDER BY presence != 'here', is_link, id LIMIT 1) "
                "LEFT JOIN roots r ON r.id = f.root",
                (json.dumps(ids.tolist()),),
            )
        }
        cards = [known[number] for number in ids.tolist()]
        fitted = (
            rows["seen"] != 0 if "seen" in (rows.dtype.names or ()) else np.zeros(len(ids), bool)
        )
        vectors = np.ascontiguousarray(rows["vector"]).reshape(-1)
        yield pa.record_batch(
            [
                pa.array(ids),
                pa.array([content for content, _ in cards], pa.string()),
                pa.array([path and readable(path) for _, path in cards], pa.string()),
                pa.array(rows["groups"]),
                pa.array(fitted),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(vectors), columns.field("vector").type.list_size
                ),
            ],
            schema=columns,
        )
