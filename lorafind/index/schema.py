"""The index file: one SQLite database that any program can read.

``application_id`` is 0x4C4F5241 ("LORA"), ``user_version`` the number of the last migration. JSON
columns are text; BLOBs of numbers are little-endian and C-contiguous; paths are the bytes of the
file system; times are nanoseconds since 1970, UTC.

roots      id; path (absolute); single: the root is a file; device, filesystem: when last seen;
           seen_ns; offline: why it could not be reached, empty when it could.
files      id; root; path (below the root, ``/``-separated, empty for a single file); size,
           mtime_ns, ctime_ns, device, inode of the file behind a link; is_link; probe: 16 bytes
           of BLAKE2b over samples (``files/scan.py``); status: ``lora`` or why not
           (``zero``, ``invalid``, ``checkpoint``, …); reason: a sentence; sha256 of the whole
           file, hex; lora; version of the reader that looked; read_ns: when the reading began;
           presence: ``here``, ``gone`` (deleted on disk) or ``offline`` (its root or folder is
           out of reach).
layouts    id; digest: SHA-256 hex of architecture and modules; architecture; modules: zlib of the
           JSON list of [canonical name, group, o, n, vector, late] per module, in stored order.
loras      id, never used twice; content: SHA-256 hex of data digest and names digest;
           data_sha256 (AutoV3); architecture; family; spelling; ranks, alphas (JSON); dtype as
           stored; effective_dtype; layout; norm: ‖ΔW‖; norms: float32 ‖ΔW_m‖² per module in the
           order of the layout; facts: JSON shown to people, never trusted; notes: JSON list of
           sentences; unknown_keys: JSON list; extras: JSON, name → digest; version of the
           signature.
signatures lora; version; groups: bit mask over (self_attn, cross_attn, ff, conv, text, other);
           scales: float32, votes: float64, one per group present; style: int8, 32,768 per group
           present, all in the order of the bits. A group's sketch is scale · style.
series     id; kind (``identity``, ``embedding``, …); key (an architecture, a basis id, …);
           dtype: JSON of numpy's descr; shape: JSON. One vector per LoRA, kept in chunks.
chunks     id; series; rows; min_lora, max_lora; ids: int64 × rows; data: rows × shape of dtype.
           Immutable. Row k belongs to LoRA ids[k] unless (chunk, k) is a tombstone:
           ``np.frombuffer(data, dtype).reshape(rows, *shape)``.
tombstones chunk; position.
pending    id; series; lora; payload: shape of dtype. Rows that wait until 4,096 make a chunk.
relations  x < y: LoRA ids; version of the proof; grade, empty where the pair was checked and
           nothing found; direction: 1 when x is the larger or better, −1 when y is, 0 neither;
           steps (JSON list); numbers (JSON).
families   lora; family: the lowest LoRA id among those that relations connect; only for LoRAs that
           have relatives.
bases      id; architecture; kind; version of the signatures it stands on; facts (JSON);
           made_ns.
basis_parts basis; name; dtype: JSON of numpy's descr; shape: JSON; data.
meta       key; value (JSON).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlite_utils import Database

APPLICATION_ID = 0x4C4F5241
#: Whole BLOBs are read in one sweep: pages of 16 KiB nearly double the speed of 4 KiB ones.
PAGE_SIZE = 16384


def _first(db: Database) -> None:
    for statement in (
        """CREATE TABLE roots (
            id INTEGER PRIMARY KEY,
            path BLOB NOT NULL UNIQUE,
            single INTEGER NOT NULL,
            device INTEGER,
            filesystem TEXT NOT NULL DEFAULT '',
            seen_ns INTEGER NOT NULL DEFAULT 0,
            offline TEXT NOT NULL DEFAULT ''
        ) STRICT""",
        """CREATE TABLE layouts (
            id INTEGER PRIMARY KEY,
            digest TEXT NOT NULL UNIQUE,
            architecture TEXT NOT NULL,
            modules BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE loras (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            content TEXT NOT NULL UNIQUE,
            data_sha256 TEXT NOT NULL,
            architecture TEXT NOT NULL,
            family TEXT NOT NULL,
            spelling TEXT NOT NULL,
            ranks TEXT NOT NULL,
            alphas TEXT NOT NULL,
            dtype TEXT NOT NULL,
            effective_dtype TEXT NOT NULL,
            layout INTEGER NOT NULL REFERENCES layouts(id),
            norm REAL NOT NULL,
            norms BLOB NOT NULL,
            facts TEXT NOT NULL,
            notes TEXT NOT NULL,
            unknown_keys TEXT NOT NULL,
            extras TEXT NOT NULL,
            version INTEGER NOT NULL
        ) STRICT""",
        "CREATE INDEX loras_architecture ON loras(architecture)",
        "CREATE INDEX loras_layout ON loras(layout)",
        "CREATE INDEX loras_data ON loras(data_sha256)",
        """CREATE TABLE files (
            id INTEGER PRIMARY KEY,
            root INTEGER NOT NULL REFERENCES roots(id) ON DELETE CASCADE,
            path BLOB NOT NULL,
            size INTEGER NOT NULL,
            mtime_ns INTEGER NOT NULL,
            ctime_ns INTEGER NOT NULL,
            device INTEGER NOT NULL,
            inode INTEGER NOT NULL,
            is_link INTEGER NOT NULL,
            probe BLOB,
            status TEXT NOT NULL,
            reason TEXT NOT NULL,
            sha256 TEXT,
            lora INTEGER REFERENCES loras(id),
            version INTEGER NOT NULL,
            read_ns INTEGER NOT NULL,
            presence TEXT NOT NULL CHECK (presence IN ('here', 'gone', 'offline')),
            UNIQUE (root, path)
        ) STRICT""",
        "CREATE INDEX files_lora ON files(lora)",
        "CREATE INDEX files_sha256 ON files(sha256)",
        """CREATE TABLE signatures (
            lora INTEGER PRIMARY KEY REFERENCES loras(id) ON DELETE CASCADE,
            version INTEGER NOT NULL,
            groups INTEGER NOT NULL,
            scales BLOB NOT NULL,
            votes BLOB NOT NULL,
            style BLOB NOT NULL
        ) STRICT""",
        """CREATE TABLE series (
            id INTEGER PRIMARY KEY,
            kind TEXT NOT NULL,
            key TEXT NOT NULL,
            dtype TEXT NOT NULL,
            shape TEXT NOT NULL,
            UNIQUE (kind, key)
        ) STRICT""",
        """CREATE TABLE chunks (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            series INTEGER NOT NULL REFERENCES series(id) ON DELETE CASCADE,
            rows INTEGER NOT NULL,
            min_lora INTEGER NOT NULL,
            max_lora INTEGER NOT NULL,
            ids BLOB NOT NULL,
            data BLOB NOT NULL
        ) STRICT""",
        "CREATE INDEX chunks_series ON chunks(series, min_lora, max_lora, rows)",
        """CREATE TABLE tombstones (
            chunk INTEGER NOT NULL REFERENCES chunks(id) ON DELETE CASCADE,
            position INTEGER NOT NULL,
            PRIMARY KEY (chunk, position)
        ) STRICT, WITHOUT ROWID""",
        """CREATE TABLE pending (
            id INTEGER PRIMARY KEY,
            series INTEGER NOT NULL REFERENCES series(id) ON DELETE CASCADE,
            lora INTEGER NOT NULL,
            payload BLOB NOT NULL,
            UNIQUE (series, lora)
        ) STRICT""",
        """CREATE TABLE relations (
            x INTEGER NOT NULL REFERENCES loras(id) ON DELETE CASCADE,
            y INTEGER NOT NULL REFERENCES loras(id) ON DELETE CASCADE,
            version INTEGER NOT NULL,
            grade TEXT NOT NULL,
            direction INTEGER NOT NULL,
            steps TEXT NOT NULL,
            numbers TEXT NOT NULL,
            PRIMARY KEY (x, y),
            CHECK (x < y)
        ) STRICT, WITHOUT ROWID""",
        "CREATE INDEX relations_y ON relations(y)",
        """CREATE TABLE families (
            lora INTEGER PRIMARY KEY REFERENCES loras(id) ON DELETE CASCADE,
            family INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE bases (
            id TEXT PRIMARY KEY,
            architecture TEXT NOT NULL,
            kind TEXT NOT NULL,
            version INTEGER NOT NULL,
            facts TEXT NOT NULL,
            made_ns INTEGER NOT NULL
        ) STRICT""",
        """CREATE TABLE basis_parts (
            basis TEXT NOT NULL REFERENCES bases(id) ON DELETE CASCADE,
            name TEXT NOT NULL,
            dtype TEXT NOT NULL,
            shape TEXT NOT NULL,
            data BLOB NOT NULL,
            PRIMARY KEY (basis, name)
        ) STRICT""",
        "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    ):
        db.execute(statement)


#: Migration k takes an index from user_version k to k + 1; only ever add to the end.
MIGRATIONS: tuple[Callable[[Database], None], ...] = (_first,)
VERSION = len(MIGRATIONS)


def version(conn: sqlite3.Connection) -> int:
    """The ``user_version`` of an index."""
    return int(conn.execute("PRAGMA user_version").fetchone()[0])


def belongs(conn: sqlite3.Connection) -> bool:
    """True for an index, or for a file in which nothing was made yet."""
    if conn.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        return True
    return version(conn) == 0 and not conn.execute("SELECT 1 FROM sqlite_schema LIMIT 1").fetchone()


def migrate(
    db: Database, migrations: tuple[Callable[[Database], None], ...] = MIGRATIONS
) -> list[int]:
    """Bring an index up to date, one transaction per migration; the numbers that were applied."""
    applied = []
    for number in range(version(db.conn), len(migrations)):
        with db.atomic():
            migrations[number](db)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {number + 1}")
        applied.append(number + 1)
    return applied
