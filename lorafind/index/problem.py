"""What can be wrong with an index, in one sentence that says what to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class IndexProblem(Exception):
    """The index cannot be used as asked; the message is one sentence for the user."""


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns errors of SQLite inside the block into an IndexProblem that names the index.

    Mistakes of the program (``ProgrammingError``, ``IntegrityError``, an unknown table or column)
    pass through as they are.
    """
    try:
        yield
    except (sqlite3.ProgrammingError, sqlite3.IntegrityError, sqlite3.NotSupportedError):
        raise
    except sqlite3.DatabaseError as error:
        sentence = _sentence(error, path)
        if not sentence:
            raise
        raise IndexProblem(sentence) from error


def _sentence(error: sqlite3.DatabaseError, path: Path) -> str:
    """The sentence for an error, empty where the error is the program's own."""
    # The low byte is the primary result code (https://www.sqlite.org/rescode.html).
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return (
                f"There is no room left for the index {path}: free some space and run "
                "`lorafind index` again, it goes on where it was."
            )
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return (
                f"The index {path} is damaged ({error}): move it away and run `lorafind index` "
                "again."
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return f"The index {path} is in use by another program: try again when it is done."
        case sqlite3.SQLITE_READONLY:
            return f"The index {path} is read-only: choose another place with --db."
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return f"The index {path} cannot be opened ({error}): check its permissions."
        case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_PROTOCOL:
            return (
                f"The index {path} could not be read or written ({error}): check the drive, or "
                "choose a place on a local one with --db."
            )
    return ""
