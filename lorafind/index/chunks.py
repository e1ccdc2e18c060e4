"""Vectors that queries scan: a few large immutable BLOBs instead of a row each.

A series holds one vector (any fixed numpy dtype and shape, records too) per LoRA and behaves like
a dict of LoRA id → vector. New vectors wait in ``pending``; 4,096 of a series are sealed into one
chunk; a deletion or replacement in a chunk leaves a tombstone, and a chunk with more than a
quarter of them is dissolved into ``pending``. Layout: ``schema.py``.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

CHUNK_ROWS = 4096
#: A chunk is rewritten when more than this share of its rows is dead.
COMPACT_ABOVE = 0.25

_IDS = np.dtype("<i8")


class Series(NamedTuple):
    """A named set of vectors of one dtype and shape."""

    id: int
    kind: str
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row(self) -> np.dtype[Any]:
        """The dtype of one whole row."""
        return np.dtype((self.dtype, self.shape))


def dtype_to_text(dtype: np.dtype[Any]) -> str:
    """numpy's descr of a dtype as JSON, in little-endian order."""
    return json.dumps(np.lib.format.dtype_to_descr(dtype.newbyteorder("<")))


def dtype_from_text(text: str) -> np.dtype[Any]:
    """Inverse of :func:`dtype_to_text`."""
    descr = json.loads(text)
    if isinstance(descr, list):
        descr = [(name, kind, *map(tuple, shape)) for name, kind, *shape in descr]
    return np.lib.format.descr_to_dtype(descr)


class Chunks:
    """All series of one index. Writing belongs inside a batch of the store, which seals."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn
        self._touched: set[int] = set()

    def append(self, kind: str, key: str, lora_id: int, payload: np.ndarray) -> None:
        """Set the vector of one LoRA, in place of one that it may have.

        Raises ValueError where dtype or shape is not that of the series.
        """
        self.append_many(kind, key, [lora_id], np.asarray(payload)[None])

    def append_many(
        self, kind: str, key: str, lora_ids: Sequence[int] | np.ndarray, payloads: np.ndarray
    ) -> None:
        """Set the vectors of distinct LoRAs; ``payloads`` has one row per LoRA."""
        series = self._series(kind, key) or self._create(kind, key, payloads)
        if series.dtype != payloads.dtype.newbyteorder("<") or series.shape != payloads.shape[1:]:
            raise ValueError(
                f"{kind}/{key} holds {series.dtype} × {series.shape}, "
                f"not {payloads.dtype} × {payloads.shape[1:]}"
            )
        ids = np.asarray(lora_ids, dtype=_IDS)
        rows = np.ascontiguousarray(payloads, dtype=series.dtype)
        if len(ids) != len(rows):
            raise ValueError(f"{len(ids)} LoRAs, but {len(rows)} vectors for {kind}/{key}")
        self._bury(series.id, ids)
        self._conn.executemany(
            "INSERT OR REPLACE INTO pending (series, lora, payload) VALUES (?, ?, ?)",
            ((series.id, int(i), row.tobytes()) for i, row in zip(ids, rows, strict=True)),
        )
        self._touched.add(series.id)

    def delete(
        self, lora_ids: Iterable[int], kind: str | None = None, key: str | None = None
    ) -> None:
        """Take LoRAs out of every series, or only of those of a kind and key."""
        ids = np.fromiter(lora_ids, dtype=_IDS)
        for series in self.series(kind):
            if key is None or key == series.key:
                self._conn.executemany(
                    "DELETE FROM pending WHERE series = ? AND lora = ?",
                    ((series.id, int(i)) for i in ids),
                )
                self._bury(series.id, ids)
                self._touched.add(series.id)

    def drop(self, kind: str, key: str) -> None:
        """Remove a whole series."""
        self._conn.execute("DELETE FROM series WHERE kind = ? AND key = ?", (kind, key))

    def series(self, kind: str | None = None) -> list[Series]:
        """Every series, or those of one kind."""
        rows = self._conn.execute(
            "SELECT id, kind, key, dtype, shape FROM series WHERE ?1 IS NULL OR kind = ?1 "
            "ORDER BY kind, key",
            (kind,),
        )
        return [_series(row) for row in rows]

    def count(self, kind: str, key: str) -> int:
        """The number of vectors in a series."""
        row = self._conn.execute(
            "SELECT (SELECT count(*) FROM pending WHERE series = s.id)"
            " + (SELECT coalesce(sum(rows), 0) FROM chunks WHERE series = s.id)"
            " - (SELECT count(*) FROM chunks c JOIN tombstones t ON t.chunk = c.id"
            "    WHERE c.series = s.id) "
            "FROM series s WHERE kind = ? AND key = ?",
            (kind, key),
        ).fetchone()
        return int(row[0]) if row else 0

    def ids(self, kind: str, key: str) -> np.ndarray:
        """The LoRAs in a series, int64, in no particular order; reads no vectors."""
        series = self._series(kind, key)
        blocks = [np.empty(0, _IDS)]
        if series:
            blocks += [
                _alive(np.frombuffer(ids, _IDS), dead)
                for ids, dead in self._conn.execute(
                    f"SELECT ids, {_DEAD} FROM chunks c WHERE series = ?", (series.id,)
                )
            ]
            waiting = self._conn.execute("SELECT lora FROM pending WHERE series = ?", (series.id,))
            blocks.append(np.fromiter((i for (i,) in waiting), _IDS))
        return np.concatenate(blocks)

    def scan(self, kind: str, key: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, matrix) of at most 4,096 LoRAs at a time, in no particular order.

        The matrix (rows × shape) is read-only and lies over SQLite's own bytes; at most two
        blocks are in memory at once.
        """
        series = self._series(kind, key)
        if series is None:
            return
        # One statement sees one state of the index, whatever a writer seals meanwhile.
        cursor = self._conn.execute(
            f"SELECT ids, data, {_DEAD} FROM chunks c WHERE series = ?1 "
            "UNION ALL SELECT lora, payload, NULL FROM pending WHERE series = ?1",
            (series.id,),
        )
        ids: list[int] = []
        payloads: list[bytes] = []
        for which, data, dead in cursor:
            if isinstance(which, bytes):
                block = np.frombuffer(data, series.dtype).reshape(-1, *series.shape)
                del data
                yield _alive(np.frombuffer(which, _IDS), dead), _alive(block, dead)
                del block
                continue
            ids.append(which)
            payloads.append(data)
            if len(ids) == CHUNK_ROWS:
                yield _block(series, ids, payloads)
                ids, payloads = [], []
        if ids:
            yield _block(series, ids, payloads)

    def get(self, kind: str, key: str, lora_id: int) -> np.ndarray | None:
        """The vector of one LoRA (read-only), None where the series has none."""
        series = self._series(kind, key)
        if series is None:
            return None
        row = self._conn.execute(
            "SELECT payload FROM pending WHERE series = ? AND lora = ?", (series.id, lora_id)
        ).fetchone()
        if row:
            return np.frombuffer(row[0], series.dtype).reshape(series.shape)
        for chunk, positions in self._find(series.id, np.array([lora_id], _IDS)):
            size = series.row.itemsize
            with self._conn.blobopen("chunks", "data", chunk, readonly=True) as blob:
                blob.seek(int(positions[0]) * size)
                return np.frombuffer(blob.read(size), series.dtype).reshape(series.shape)
        return None

    def seal(self) -> None:
        """Compact and seal what was touched since the last call; the store's batch calls it."""
        for series in sorted(self._touched):
            self._compact(series)
            while self._seal(series):
                pass
        self._touched.clear()

    def rolled_back(self) -> None:
        """Nothing is left to seal; the store's batch calls it."""
        self._touched.clear()

    def _series(self, kind: str, key: str) -> Series | None:
        row = self._conn.execute(
            "SELECT id, kind, key, dtype, shape FROM series WHERE kind = ? AND key = ?", (kind, key)
        ).fetchone()
        return _series(row) if row else None

    def _create(self, kind: str, key: str, payloads: np.ndarray) -> Series:
        self._conn.execute(
            "INSERT INTO series (kind, key, dtype, shape) VALUES (?, ?, ?, ?)",
            (kind, key, dtype_to_text(payloads.dtype), json.dumps(payloads.shape[1:])),
        )
        series = self._series(kind, key)
        assert series is not None
        return series

    def _find(self, series: int, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(chunk, living positions) of the given LoRAs; chunks that hold none are left out."""
        if not len(ids):
            return
        rows = self._conn.execute(
            f"SELECT id, ids, {_DEAD} FROM chunks c "
            "WHERE series = ? AND min_lora <= ? AND max_lora >= ?",
            (series, int(ids.max()), int(ids.min())),
        ).fetchall()
        for chunk, blob, dead in rows:
            positions = np.flatnonzero(np.isin(np.frombuffer(blob, _IDS), ids))
            positions = np.setdiff1d(positions, _positions(dead))
            if len(positions):
                yield chunk, positions

    def _bury(self, series: int, ids: np.ndarray) -> None:
        for chunk, positions in self._find(series, ids):
            self._conn.executemany(
                "INSERT INTO tombstones (chunk, position) VALUES (?, ?)",
                ((chunk, int(position)) for position in positions),
            )

    def _compact(self, series: int) -> None:
        """Move the living rows of chunks with many tombstones back to ``pending``."""
        chunks = self._conn.execute(
            "SELECT id FROM chunks c WHERE series = ? AND rows * ? < "
            "(SELECT count(*) FROM tombstones WHERE chunk = c.id)",
            (series, COMPACT_ABOVE),
        ).fetchall()
        for (chunk,) in chunks:
            rows, blob, data, dead = self._conn.execute(
                f"SELECT rows, ids, data, {_DEAD} FROM chunks c WHERE id = ?", (chunk,)
            ).fetchone()
            size = len(data) // rows
            ids = np.frombuffer(blob, _IDS)
            keep = np.setdiff1d(np.arange(rows), _positions(dead))
            self._conn.executemany(
                "INSERT INTO pending (series, lora, payload) VALUES (?, ?, ?)",
                ((series, int(ids[k]), data[k * size : (k + 1) * size]) for k in keep.tolist()),
            )
            self._conn.execute("DELETE FROM chunks WHERE id = ?", (chunk,))

    def _seal(self, series: int) -> bool:
        """Make a chunk of the oldest pending rows; False where there are too few."""
        (count,) = self._conn.execute(
            "SELECT count(*) FROM pending WHERE series = ?", (series,)
        ).fetchone()
        if count < CHUNK_ROWS:
            return False
        rows = self._conn.execute(
            "SELECT id, lora, payload FROM pending WHERE series = ? ORDER BY id LIMIT ?",
            (series, CHUNK_ROWS),
        ).fetchall()
        ids = np.array([lora for _, lora, _ in rows], _IDS)
        self._conn.execute(
            "INSERT INTO chunks (series, rows, min_lora, max_lora, ids, data) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                series,
                CHUNK_ROWS,
                int(ids.min()),
                int(ids.max()),
                ids.tobytes(),
                b"".join(payload for _, _, payload in rows),
            ),
        )
        self._conn.execute(
            "DELETE FROM pending WHERE series = ? AND id <= ?", (series, rows[-1][0])
        )
        return True


_DEAD = "(SELECT group_concat(position) FROM tombstones WHERE chunk = c.id)"


def _positions(dead: str | None) -> np.ndarray:
    return np.array(dead.split(",") if dead else [], dtype=np.int64)


def _alive(rows: np.ndarray, dead: str | None) -> np.ndarray:
    return np.delete(rows, _positions(dead), axis=0) if dead else rows


def _series(row: tuple[int, str, str, str, str]) -> Series:
    return Series(*row[:3], dtype_from_text(row[3]), tuple(json.loads(row[4])))


def _block(series: Series, ids: list[int], payloads: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    matrix = np.frombuffer(b"".join(payloads), series.dtype).reshape(-1, *series.shape)
    return np.array(ids, _IDS), matrix
