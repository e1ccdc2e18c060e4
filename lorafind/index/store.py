"""The index as an object: one open SQLite file, its transactions and its tables.

Reading needs no lock and never blocks; writing holds the lock of ``lock.py`` and happens in
batches, each one transaction: after a kill, a crash or a full disk every batch is there whole or
not at all. Tables: ``schema.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from lorafind.files.mounts import filesystem
from lorafind.files.scan import Found, ScanReport, Target
from lorafind.index import opening, roots, schema
from lorafind.index.chunks import Chunks, dtype_from_text, dtype_to_text
from lorafind.index.lock import WriterLock
from lorafind.index.problem import IndexProblem, explained
from lorafind.index.reconcile import Decisions
from lorafind.index.rows import (
    FileFacts,
    Known,
    LoraFacts,
    Module,
    Relation,
    StoredBasis,
    StoredSignature,
    readable,
    to_text,
)

if TYPE_CHECKING:
    from sqlite_utils import Database

__all__ = ["IndexProblem", "Store"]

_STAT = "root, path, size, mtime_ns, ctime_ns, device, inode, is_link"
_FACTS = "probe, status, reason, sha256, lora, version, read_ns, presence"
_UPSERT = (
    f"INSERT INTO files ({_STAT}, {_FACTS}) %s ON CONFLICT (root, path) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in f"{_STAT}, {_FACTS}".split(", ")[2:])
)


class Store:
    """One open index; :meth:`open` makes it, and leaving its ``with`` block closes it.

    conn: the connection (autocommit; use :meth:`batch` to write). chunks: the vectors. An error of
    SQLite that leaves the ``with`` block becomes an IndexProblem.
    """

    def __init__(self, path: Path, conn: sqlite3.Connection, lock: WriterLock | None) -> None:
        self.path = path
        self.conn = conn
        self.chunks = Chunks(conn)
        self._lock = lock

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        mode: Literal["read", "write"] = "read",
    ) -> Self:
        """Open the index at ``path`` (see :func:`~lorafind.index.opening.location`).

        ``write`` makes it where there is none, brings it up to date and keeps every other writer
        out. ``read`` brings an older one up to date too, which needs the right to write once.
        Raises IndexProblem: no index, not an index, damaged, newer, locked, not writable.
        """
        place = opening.location(path)
        if mode == "write":
            return cls._open_to_write(place)
        with explained(place):
            conn = opening.connect_to_read(place)
            if schema.version(conn) < schema.VERSION:
                conn.close()
                cls._open_to_write(place).close()
                conn = opening.connect_to_read(place)
        return cls(place, conn, None)

    @classmethod
    def _open_to_write(cls, place: Path) -> Self:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise IndexProblem(
                f"The folder {place.parent} cannot be made ({error.strerror}): choose another "
                "place with --db."
            ) from error
        lock = WriterLock(place)
        try:
            with explained(place):
                store = cls(place, opening.connect_to_write(place), lock)
                if schema.version(store.conn) < schema.VERSION:
                    schema.migrate(store.db)
        except BaseException:
            lock.release()
            raise
        return store

    @cached_property
    def db(self) -> Database:
        """The same connection as a sqlite-utils database."""
        from sqlite_utils import Database

        return Database(self.conn, execute_plugins=False, recursive_triggers=False)

    def close(self) -> None:
        """Close the file and let go of the lock."""
        self.conn.close()
        if self._lock:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
        if isinstance(error, sqlite3.Error):
            with explained(self.path):
                raise error

    @contextmanager
    def batch(self) -> Iterator[None]:
        """One write transaction, committed at the end, rolled back on any exception.

        Raises IndexProblem for errors of SQLite (a full disk: nothing of the batch is kept).
        """
        with explained(self.path):
            self.conn.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.chunks.seal()
                self.conn.execute("COMMIT")
            except BaseException:
                self.chunks.rolled_back()
                # A full disk may have rolled back by itself.
                if self.conn.in_transaction:
                    self.conn.execute("ROLLBACK")
                raise

    def get_meta(self, key: str, default: Any = None) -> Any:
        """A value of the ``meta`` table."""
        row = self.conn.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return json.loads(row[0]) if row else default

    def set_meta(self, key: str, value: Any) -> None:
        """Set a value (JSON) of the ``meta`` table."""
        self.conn.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, to_text(value)))

    # Roots and files

    def roots(self) -> list[roots.Root]:
        """Every root, by path."""
        return roots.all_roots(self.conn)

    def targets(self, paths: Sequence[str | bytes | os.PathLike[str]] = ()) -> list[Target]:
        """What to scan for these paths, all roots for none; see :func:`roots.resolve`."""
        with self.batch():
            return roots.resolve(self.conn, paths)

    def forget_root(self, path: bytes) -> int:
        """Remove a root and its files, and the LoRAs that only it had; returns their number."""
        with self.batch():
            self.conn.execute("DELETE FROM roots WHERE path = ?", (path,))
            return self._drop_orphans()

    def known(self) -> list[Known]:
        """Every row of ``files``."""
        paths = {root.id: root.path for root in self.roots()}
        rows = self.conn.execute(f"SELECT id, {_STAT}, {_FACTS} FROM files")
        return [Known(row[0], paths[row[1]], *row[2:]) for row in rows]

    def apply(self, decisions: Decisions, report: ScanReport) -> None:
        """Record what a scan showed without reading, in one transaction."""
        now = time.time_ns()
        with self.batch():
            ids = self._root_ids()
            self.conn.executemany(
                "DELETE FROM files WHERE id = ?",
                [(move.replaces.id,) for move in decisions.moved if move.replaces],
            )
            for row, found in (
                *((move.row, move.found) for move in decisions.moved),
                *((link.of, link.found) for link in decisions.refreshed),
            ):
                self.conn.execute(
                    f"UPDATE files SET ({_STAT}, presence) = (?, ?, ?, ?, ?, ?, ?, ?, 'here') "
                    "WHERE id = ?",
                    (*_stat(found, ids), row.id),
                )
            self.conn.executemany(
                _UPSERT % f"SELECT ?, ?, ?, ?, ?, ?, ?, ?, {_FACTS} FROM files WHERE id = ?",
                [(*_stat(link.found, ids), link.of.id) for link in decisions.linked],
            )
            for found in decisions.refused:
                self._put_file(found, FileFacts(found.outcome, 0, now, found.reason), ids)
            self.conn.executemany(
                "UPDATE files SET presence = 'gone' WHERE id = ?",
                [(row.id,) for row in decisions.gone],
            )
            self.conn.executemany(
                "UPDATE files SET presence = 'offline' WHERE id = ?",
                [(row.id,) for row, _ in decisions.offline],
            )
            self.conn.executemany(
                "UPDATE roots SET device = ?, filesystem = ?, seen_ns = ?, offline = '' "
                "WHERE path = ?",
                [
                    (device, filesystem(path), now, path)
                    for path, device in report.roots.items()
                    if path not in decisions.roots
                ],
            )
            self.conn.executemany(
                "UPDATE roots SET offline = ? WHERE path = ?",
                [(readable(why), path) for path, why in decisions.roots.items()],
            )

    def put_file(self, found: Found, facts: FileFacts, links: Iterable[Found] = ()) -> None:
        """Record what the reading of a file gave, for every path to it. Inside a batch."""
        ids = self._root_ids()
        for path in (found, *links):
            self._put_file(path, facts, ids)

    def _put_file(self, found: Found, facts: FileFacts, ids: Mapping[bytes, int]) -> None:
        self.conn.execute(
            _UPSERT % f"VALUES ({', '.join('?' * 16)})",
            (
                *_stat(found, ids),
                facts.probe,
                facts.status,
                readable(facts.reason),
                facts.sha256,
                facts.lora_id,
                facts.version,
                facts.read_ns,
                "here",
            ),
        )

    def _root_ids(self) -> dict[bytes, int]:
        return {root.path: root.id for root in self.roots()}

    def remove_files(self, rows: Iterable[Known]) -> int:
        """Remove rows of files and the LoRAs that have no other; returns the number of LoRAs."""
        with self.batch():
            self.conn.executemany("DELETE FROM files WHERE id = ?", [(row.id,) for row in rows])
            return self._drop_orphans()

    def drop_orphans(self) -> int:
        """Remove LoRAs without files (overwritten ones); returns their number."""
        with self.batch():
            return self._drop_orphans()

    def _drop_orphans(self) -> int:
        orphans = [
            lora
            for (lora,) in self.conn.execute(
                "SELECT id FROM loras WHERE NOT EXISTS (SELECT 1 FROM files WHERE lora = loras.id)"
            )
        ]
        if orphans:
            # Signatures and relations go along by their foreign keys.
            self.chunks.delete(orphans)
            self.conn.executemany("DELETE FROM loras WHERE id = ?", [(i,) for i in orphans])
            self.conn.execute("DELETE FROM layouts WHERE id NOT IN (SELECT layout FROM loras)")
        return len(orphans)

    # LoRAs

    def put_layout(self, architecture: str, modules: Sequence[Module]) -> int:
        """The id of a layout, which is added where it is new. Inside a batch."""
        digest = layout_digest(architecture, modules)
        row = self.conn.execute("SELECT id FROM layouts WHERE digest = ?", (digest,)).fetchone()
        if row:
            return int(row[0])
        stored = {
            "digest": digest,
            "architecture": architecture,
            "modules": zlib.compress(to_text(modules).encode()),
        }
        return self._insert("layouts", stored)

    def layout(self, layout_id: int) -> tuple[str, list[Module]]:
        """Architecture and modules of a layout."""
        architecture, blob = self.conn.execute(
            "SELECT architecture, modules FROM layouts WHERE id = ?", (layout_id,)
        ).fetchone()
        return architecture, [
            Module(name, group, o, n, bool(vector), bool(late))
            for name, group, o, n, vector, late in json.loads(zlib.decompress(blob))
        ]

    def _insert(self, table: str, row: dict[str, Any]) -> int:
        made = self.db.table(table).insert(row, pk="id").last_pk
        assert isinstance(made, int)
        return made

    def find_lora(self, content: str) -> tuple[int, int] | None:
        """(id, version) of the LoRA with this content."""
        row = self.conn.execute(
            "SELECT id, version FROM loras WHERE content = ?", (content,)
        ).fetchone()
        return (row[0], row[1]) if row else None

    def contents(self, version: int) -> dict[str, int]:
        """Content → id of every LoRA of a version."""
        return dict(
            self.conn.execute("SELECT content, id FROM loras WHERE version = ?", (version,))
        )

    def put_lora(self, facts: LoraFacts) -> int:
        """Add a LoRA, or bring the one of the same content up to date; its id. Inside a batch."""
        texts = ("ranks", "alphas", "facts", "notes", "unknown_keys", "extras")
        row: dict[str, Any] = {name: getattr(facts, name) for name in facts.__dataclass_fields__}
        row |= {name: to_text(row[name]) for name in texts}
        row |= {"norms": np.asarray(facts.norms, "<f4").tobytes(), "norm": float(facts.norm)}
        if existing := self.find_lora(facts.content):
            self.db.table("loras").update(existing[0], row)
            return existing[0]
        return self._insert("loras", row)

    def put_signature(self, lora_id: int, signature: StoredSignature) -> None:
        """Set the style signature of a LoRA. Inside a batch."""
        self.conn.execute(
            "INSERT OR REPLACE INTO signatures (lora, version, groups, scales, votes, style) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (
                lora_id,
                signature.version,
                signature.groups,
                np.asarray(signature.scales, "<f4").tobytes(),
                np.asarray(signature.votes, "<f8").tobytes(),
                np.ascontiguousarray(signature.style, "i1").tobytes(),
            ),
        )

    def signatures(
        self, version: int, lora_ids: Iterable[int] | None = None
    ) -> Iterator[tuple[int, StoredSignature]]:
        """(LoRA, signature) of one version, of all LoRAs or of some, streamed one by one."""
        columns = "lora, version, groups, scales, votes, style"
        if lora_ids is None:
            rows = self.conn.execute(
                f"SELECT {columns} FROM signatures WHERE version = ? ORDER BY lora", (version,)
            )
        else:
            rows = self.conn.execute(
                f"SELECT {columns} FROM json_each(?) JOIN signatures ON lora = json_each.value "
                "WHERE version = ?",
                (json.dumps([int(i) for i in lora_ids]), version),
            )
        for lora, made, groups, scales, votes, style in rows:
            present = groups.bit_count()
            yield (
                lora,
                StoredSignature(
                    made,
                    groups,
                    np.frombuffer(scales, "<f4"),
                    np.frombuffer(votes, "<f8"),
                    np.frombuffer(style, "i1").reshape(present, -1 if present else 0),
                ),
            )

    # Relations

    def put_relations(self, relations: Iterable[Relation]) -> None:
        """Record proofs, in place of older ones of the same pairs. Inside a batch."""
        self.conn.executemany(
            "INSERT OR REPLACE INTO relations (x, y, version, grade, direction, steps, numbers) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                (r.x, r.y, r.version, r.grade, r.direction, to_text(r.steps), to_text(r.numbers))
                for r in relations
            ),
        )

    def relations(self, version: int, lora_id: int | None = None) -> Iterator[Relation]:
        """What was proved by this version, of all LoRAs or of one; empty grades are left out."""
        query = (
            "SELECT x, y, version, grade, direction, steps, numbers FROM relations "
            "WHERE version = ?1 AND grade != ''"
        )
        parameters: tuple[int, ...] = (version,)
        if lora_id is not None:
            query = f"{query} AND x = ?2 UNION ALL {query} AND y = ?2"
            parameters = (version, lora_id)
        for x, y, made, grade, direction, steps, numbers in self.conn.execute(query, parameters):
            yield Relation(x, y, made, grade, direction, json.loads(steps), json.loads(numbers))

    def checked_pairs(self, version: int) -> np.ndarray:
        """n × 2 int64: every pair x < y that this version has looked at, in order."""
        rows = self.conn.execute(
            "SELECT x, y FROM relations WHERE version = ? ORDER BY x, y", (version,)
        )
        flat = np.fromiter((i for pair in rows for i in pair), np.int64)
        return flat.reshape(-1, 2)

    # Bases

    def put_basis(self, basis: StoredBasis) -> None:
        """Set a basis; embeddings made with an older one of this id are dropped. Inside a batch."""
        self.drop_basis(basis.id)
        row = {
            "id": basis.id,
            "architecture": basis.architecture,
            "kind": basis.kind,
            "version": basis.version,
            "facts": to_text(basis.facts),
            "made_ns": basis.made_ns or time.time_ns(),
        }
        self.db.table("bases").insert(row)
        self.conn.executemany(
            "INSERT INTO basis_parts (basis, name, dtype, shape, data) VALUES (?, ?, ?, ?, ?)",
            (
                (
                    basis.id,
                    name,
                    dtype_to_text(part.dtype),
                    json.dumps(part.shape),
                    np.ascontiguousarray(part, part.dtype.newbyteorder("<")).tobytes(),
                )
                for name, part in basis.parts.items()
            ),
        )

    def basis(self, basis_id: str, without: str | None = None) -> StoredBasis | None:
        """A basis with its arrays (read-only), None where there is none of this id.

        without: arrays whose names end so are left out.
        """
        row = self.conn.execute(
            "SELECT architecture, kind, version, facts, made_ns FROM bases WHERE id = ?",
            (basis_id,),
        ).fetchone()
        if row is None:
            return None
        parts = {
            name: np.frombuffer(data, dtype_from_text(dtype)).reshape(json.loads(shape))
            for name, dtype, shape, data in self.conn.execute(
                "SELECT name, dtype, shape, data FROM basis_parts "
                "WHERE basis = ? AND (?2 IS NULL OR substr(name, -length(?2)) != ?2)",
                (basis_id, without),
            )
        }
        architecture, kind, version, facts, made_ns = row
        return StoredBasis(basis_id, architecture, kind, version, json.loads(facts), parts, made_ns)

    def basis_ids(self, architecture: str | None = None) -> list[str]:
        """Ids of all bases, or of those for one architecture, the newest first."""
        rows = self.conn.execute(
            "SELECT id FROM bases WHERE ?1 IS NULL OR architecture = ?1 ORDER BY made_ns DESC, id",
            (architecture,),
        )
        return [basis for (basis,) in rows]

    def drop_basis(self, basis_id: str) -> None:
        """Remove a basis and the embeddings made with it. Inside a batch."""
        for kind in ("embedding", "parts"):
            self.chunks.drop(kind, basis_id)
        self.conn.execute("DELETE FROM bases WHERE id = ?", (basis_id,))


def layout_digest(architecture: str, modules: Sequence[Module]) -> str:
    """What names a layout: SHA-256 (hex) of architecture and modules."""
    text = json.dumps([architecture, modules], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _stat(found: Found, ids: Mapping[bytes, int]) -> tuple[int | bytes, ...]:
    return (ids[found.root], *found[1:8])
