"""Finds and opens the SQLite file of an index, for reading or for writing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorafind.files.mounts import remote
from lorafind.index import schema
from lorafind.index.problem import IndexProblem

#: How long a statement waits for another process, seconds (only where WAL cannot be had).
TIMEOUT = 30.0
_CACHE_KIB = 64 * 1024
_WAL_LIMIT = 64 * 1024 * 1024


def location(path: str | os.PathLike[str] | None = None) -> Path:
    """The index to use: ``path``, else LORAFIND_DB, else the one in the user's data folder."""
    if path is None:
        path = os.environ.get("LORAFIND_DB") or None
    if path is None:
        import platformdirs

        return platformdirs.user_data_path("lorafind", appauthor=False) / "lorafind.db"
    return Path(os.path.abspath(path))


def connect_to_write(path: Path) -> sqlite3.Connection:
    """A connection to a new or existing index; the caller holds the lock.

    Raises IndexProblem for a file of another program or of a newer lorafind.
    """
    conn = _connect(path, "mode=rwc")
    try:
        if schema.version(conn) == 0:
            # Only before the first table; without effect afterwards.
            conn.execute(f"PRAGMA page_size = {schema.PAGE_SIZE}")
        check(conn, path)
        choose_journal(conn, remote(path.parent))
        conn.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        conn.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")
        conn.execute("PRAGMA foreign_keys = ON")
    except BaseException:
        conn.close()
        raise
    return conn


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that never writes and needs no right to.

    Raises IndexProblem where there is no index, or as :func:`connect_to_write`.
    """
    if not path.exists():
        raise IndexProblem(f"There is no index at {path} yet: run `lorafind index FOLDER` first.")
    conn = _connect(path, "mode=rw")
    try:
        try:
            schema.version(conn)
        except sqlite3.OperationalError as error:
            # A WAL index in a folder where its -shm file cannot be made.
            if error.sqlite_errorcode & 0xFF not in (
                sqlite3.SQLITE_CANTOPEN,
                sqlite3.SQLITE_READONLY,
            ):
                raise
            conn.close()
            conn = _unchanging(path)
        conn.execute("PRAGMA query_only = ON")
        check(conn, path)
        if schema.version(conn) == 0:
            raise IndexProblem(f"The index {path} is empty: run `lorafind index FOLDER` first.")
    except BaseException:
        conn.close()
        raise
    return conn


def check(conn: sqlite3.Connection, path: Path) -> None:
    """Raises IndexProblem for a file of another program or of a newer lorafind."""
    if not schema.belongs(conn):
        raise IndexProblem(
            f"{path} is an SQLite file of another program: choose another place with --db."
        )
    if (found := schema.version(conn)) > schema.VERSION:
        raise IndexProblem(
            f"The index {path} was made by a newer lorafind (its version is {found}, this one "
            f"reads up to {schema.VERSION}): update lorafind."
        )


def choose_journal(conn: sqlite3.Connection, is_remote: bool) -> str:
    """Set the journal mode, WAL where it works, else DELETE; returns the mode in force."""
    mode = ""
    if not is_remote:
        try:
            (mode,) = conn.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError:
            # No shared memory, or a reader keeps the present mode: DELETE works in both cases.
            mode = ""
    if mode != "wal":
        (mode,) = conn.execute("PRAGMA journal_mode = DELETE").fetchone()
    conn.execute(f"PRAGMA synchronous = {'NORMAL' if mode == 'wal' else 'FULL'}")
    return str(mode)


def _connect(path: Path, how: str) -> sqlite3.Connection:
    # Transactions are begun and ended by hand; one thread at a time may use the connection.
    return sqlite3.connect(
        f"{path.as_uri()}?{how}",
        uri=True,
        timeout=TIMEOUT,
        isolation_level=None,
        check_same_thread=False,
    )


def _unchanging(path: Path) -> sqlite3.Connection:
    """An index in a folder that this user cannot write to, so that nothing may change it."""
    wal = path.with_name(path.name + "-wal")
    if wal.exists() and wal.stat().st_size:
        raise IndexProblem(
            f"The index {path} has unfinished work in {wal.name}, and its folder is read-only: "
            "copy both to a folder that you can write to."
        )
    return _connect(path, "mode=ro&immutable=1")


@contextmanager
def snapshot(conn: sqlite3.Connection) -> Iterator[None]:
    """All statements of the block see the index as it stood at the first of them.

    Keep it short: without WAL (network drives) a writer waits for its end.
    """
    if conn.in_transaction:
        yield
        return
    conn.execute("BEGIN")
    try:
        yield
    finally:
        conn.execute("ROLLBACK")
