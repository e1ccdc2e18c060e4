"""What can be taken into an index: rows under ids of their own, streamed; and an index as such.

Columns are those of ``index/schema.py`` and hold what SQLite holds there: JSON as text, BLOBs as
bytes. Ids mean something within one source alone.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from lorafind.index import opening, roots, schema, stars
from lorafind.index.problem import IndexProblem, explained
from lorafind.index.relate import copies_mark, mark_of
from lorafind.index.rows import StoredBasis
from lorafind.index.shard import META as SHARD
from lorafind.index.store import Store

#: The identity series that an index may have (``index/classes.py``).
SERIES = ("sd", "other")
#: Rows of signatures (about 100 kB each) that are in memory at once.
SIGNATURES = 128

T = TypeVar("T")


class LayoutRow(NamedTuple):
    """A row of ``layouts``."""

    id: int
    digest: str
    architecture: str
    modules: bytes


class LoraRow(NamedTuple):
    """A row of ``loras``."""

    id: int
    content: str
    data_sha256: str
    architecture: str
    family: str
    spelling: str
    ranks: str
    alphas: str
    dtype: str
    effective_dtype: str
    layout: int
    norm: float
    norms: bytes
    facts: str
    notes: str
    unknown_keys: str
    extras: str
    version: int


class FileRow(NamedTuple):
    """A row of ``files``; content: of its LoRA, None where there is none."""

    root: int
    path: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int
    is_link: int
    probe: bytes | None
    status: str
    reason: str
    sha256: str | None
    version: int
    read_ns: int
    presence: str
    lora: int | None
    content: str | None


class SignatureRow(NamedTuple):
    """A row of ``signatures``."""

    lora: int
    version: int
    groups: int
    scales: bytes
    votes: bytes
    style: bytes


class RelationRow(NamedTuple):
    """A row of ``relations``."""

    x: int
    y: int
    version: int
    grade: str
    direction: int
    steps: str
    numbers: str


class Compared(NamedTuple):
    """How far an identity series was searched for relations (``index/relate.py``).

    full, copies: up to which LoRA all pairs, and copies alone, were looked for. holders: LoRA
    because of which pairs of others were left out → whether all that it holds is proved.
    """

    full: int
    copies: int
    holders: dict[int, bool]


class Source(Protocol):
    """Where rows come from; memory is bounded by a block of them, and by some bytes a LoRA.

    label: what people call it. shard: which of how many it is, None for a whole. compared: by
    identity series. in_use: architecture → id of the basis that the user has chosen.
    """

    label: str
    shard: tuple[int, int] | None
    compared: Mapping[str, Compared]
    in_use: Mapping[str, str]

    def roots(self) -> list[roots.Root]:
        """Every root."""

    def count(self, table: str) -> int:
        """The number of rows of a table."""

    def layouts(self) -> Iterator[LayoutRow]:
        """Every layout."""

    def loras(self) -> Iterator[LoraRow]:
        """Every LoRA."""

    def files(self) -> Iterator[FileRow]:
        """Every file."""

    def signatures(self, loras: np.ndarray) -> Iterator[list[SignatureRow]]:
        """The signatures of some LoRAs (int64, ascending), at most SIGNATURES at a time."""

    def identities(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(series, LoRAs, identity records), at most 4,096 at a time."""

    def relations(self) -> Iterator[RelationRow]:
        """Every relation, and every pair in which none was found."""

    def bases(self) -> Iterator[StoredBasis]:
        """Every published basis."""


def blocks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    """``rows`` in lists of at most ``size``."""
    iterator = iter(rows)
    while block := list(islice(iterator, size)):
        yield block


class IndexSource:
    """An index as a :class:`Source`, as it stands when it is opened, and only read.

    Close it, or use ``with``. A writer of the source need not wait, but on network drives, where
    SQLite has no WAL.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises IndexProblem: none there, another program's, damaged, newer, older, unfinished."""
        self.path = Path(os.path.abspath(path))
        self.label = str(path)
        with explained(self.path), ExitStack() as stack:
            self._conn = stack.enter_context(closing(_open(self.path)))
            self.store = Store(self.path, self._conn, None)
            # The first statement of the transaction fixes what all others see.
            self._conn.execute("BEGIN")
            self._check()
            shard = self.store.get_meta(SHARD)
            self.shard: tuple[int, int] | None = (int(shard[0]), int(shard[1])) if shard else None
            self.in_use: Mapping[str, str] = {
                key.partition(":")[2]: json.loads(value)
                for key, value in self._conn.execute(
                    "SELECT key, value FROM meta WHERE key LIKE 'basis:%' ORDER BY key"
                )
            }
            self.compared: Mapping[str, Compared] = {
                key: Compared(
                    int(self.store.get_meta(mark_of(key), 0)),
                    int(self.store.get_meta(copies_mark(key), 0)),
                    stars.load(self.store, key),
                )
                for key in SERIES
            }
            self._open = stack.pop_all()

    def close(self) -> None:
        """Let go of the file."""
        self._open.close()

    def __enter__(self) -> IndexSource:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check(self) -> None:
        """Damage that shows without reading every signature: nothing must be taken from it."""
        pages, size = (
            self._conn.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("page_count", "page_size")
        )
        wal = self.path.with_name(self.path.name + "-wal")
        if not wal.exists() and self.path.stat().st_size < pages * size:
            raise IndexProblem(
                f"The index {self.path} is cut off ({self.path.stat().st_size:,} of "
                f"{pages * size:,} bytes are there): copy it again."
            )
        for table in ("roots", "files", "loras", "layouts", "relations", "series", "meta"):
            for (said,) in self._conn.execute(f"PRAGMA quick_check({table})"):
                if said != "ok":
                    raise IndexProblem(
                        f"The index {self.path} is damaged ({said}): nothing was taken from it."
                    )
        if self._conn.execute("SELECT 1 FROM loras WHERE version < 0 LIMIT 1").fetchone():
            raise IndexProblem(
                f"A merge into {self.path} was ended before it was done: run that merge again "
                "first."
            )

    def roots(self) -> list[roots.Root]:
        with explained(self.path):
            return roots.all_roots(self._conn)

    def count(self, table: str) -> int:
        with explained(self.path):
            return int(self._conn.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def layouts(self) -> Iterator[LayoutRow]:
        return self._rows(LayoutRow, "SELECT {} FROM layouts")

    def loras(self) -> Iterator[LoraRow]:
        return self._rows(LoraRow, "SELECT {} FROM loras ORDER BY id")

    def files(self) -> Iterator[FileRow]:
        columns = ", ".join(f"f.{name}" for name in FileRow._fields[:-1])
        with explained(self.path):
            for row in self._conn.execute(
                f"SELECT {columns}, l.content FROM files f LEFT JOIN loras l ON l.id = f.lora"
            ):
                yield FileRow(*row)

    def signatures(self, loras: np.ndarray) -> Iterator[list[SignatureRow]]:
        for start in range(0, len(loras), SIGNATURES):
            yield list(
                self._rows(
                    SignatureRow,
                    "SELECT {} FROM json_each(?) JOIN signatures ON lora = json_each.value",
                    (json.dumps(loras[start : start + SIGNATURES].tolist()),),
                )
            )

    def identities(self) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        with explained(self.path):
            for key in SERIES:
                for ids, records in self.store.chunks.scan("identity", key):
                    yield key, ids, records

    def relations(self) -> Iterator[RelationRow]:
        return self._rows(RelationRow, "SELECT {} FROM relations")

    def bases(self) -> Iterator[StoredBasis]:
        from lorafind.bases.basis import PUBLISHED

        with explained(self.path):
            for name in self.store.basis_ids():
                basis = self.store.basis(name)
                if basis is not None and basis.kind == PUBLISHED:
                    yield basis

    def _rows(self, kind: Any, query: str, parameters: tuple[Any, ...] = ()) -> Iterator[Any]:
        with explained(self.path):
            for row in self._conn.execute(query.format(", ".join(kind._fields)), parameters):
                yield kind(*row)


def _open(path: Path) -> sqlite3.Connection:
    conn = opening.connect_to_read(path)
    if schema.version(conn) < schema.VERSION:
        conn.close()
        raise IndexProblem(
            f"The index {path} was made by an older lorafind: run `lorafind ls --db {path}` once, "
            "which brings it up to date."
        )
    return conn
