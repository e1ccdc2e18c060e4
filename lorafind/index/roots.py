"""From the paths that a user names to roots of the index, without overlaps.

A path below a known root is a part of that root; a known root below a new one is taken into it,
files and all. Overlaps are judged on real paths, those of URLs on their text; roots are kept as
they were named.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lorafind.files.place import absolute, below, is_remote, scheme_of
from lorafind.files.scan import Target, join
from lorafind.index.problem import IndexProblem


class Root(NamedTuple):
    """A row of ``roots`` (see ``schema.py``)."""

    id: int
    path: bytes
    single: bool
    device: int | None
    filesystem: str
    seen_ns: int
    offline: str

    @property
    def target(self) -> Target:
        """All of it."""
        return Target(self.path, b"", self.single)


def all_roots(conn: sqlite3.Connection) -> list[Root]:
    """Every root, by path."""
    rows = conn.execute(
        "SELECT id, path, single, device, filesystem, seen_ns, offline FROM roots ORDER BY path"
    )
    return [Root(row[0], row[1], bool(row[2]), *row[3:]) for row in rows]


def resolve(
    conn: sqlite3.Connection, paths: Sequence[str | bytes | os.PathLike[str]]
) -> list[Target]:
    """What to walk for these paths, all known roots for none; new roots are added.

    Runs inside a transaction. Raises IndexProblem for a path that neither exists nor is known (of
    a URL: that cannot be listed now), and where no path is given and no root is known.
    """
    targets: list[Target] = []
    for path in paths:
        try:
            place = os.fsencode(absolute(path) if scheme_of(path) else os.path.abspath(path))
        except OSError as error:
            raise IndexProblem(f"{error.filename}: {error.strerror}.") from error
        target = _resolve_url(conn, place) if is_remote(place) else _resolve(conn, place)
        if target not in targets:
            targets.append(target)
    if not paths:
        targets = [root.target for root in all_roots(conn)]
        if not targets:
            raise IndexProblem("No folder is indexed yet: run `lorafind index FOLDER`.")
    # A later path may have taken an earlier one's root into its own.
    known = {root.path for root in all_roots(conn)}
    targets = [target for target in targets if target.root in known]
    return [t for t in targets if not any(_covers(other, t) for other in targets)]


def _resolve(conn: sqlite3.Connection, path: bytes) -> Target:
    real = os.path.realpath(path)
    roots = [
        (root, os.path.realpath(root.path)) for root in all_roots(conn) if not is_remote(root.path)
    ]
    for root, place in roots:
        if real == place:
            return root.target
        if not root.single and (inside := _below(real, place)):
            return Target(root.path, inside)
    if not os.path.lexists(path):
        raise IndexProblem(f"{os.fsdecode(path)} does not exist: check the path.")
    single = not os.path.isdir(path)
    taken = [(root, inside) for root, place in roots if (inside := _below(place, real))]
    return _new(conn, path, single, taken)


def _resolve_url(conn: sqlite3.Connection, url: bytes) -> Target:
    """As :func:`_resolve`; the text of a URL is all that tells what is below what."""
    from lorafind.files.listing import kind_of

    roots = [root for root in all_roots(conn) if is_remote(root.path)]
    for root in roots:
        if url == root.path:
            return root.target
        if not root.single and (inside := below(url, root.path)):
            return Target(root.path, inside)
    shown = os.fsdecode(url)
    try:
        single = kind_of(shown) == "file"
    except FileNotFoundError as error:
        raise IndexProblem(f"Nothing is at {shown}: check the URL.") from error
    except OSError as error:
        raise IndexProblem(f"{shown} cannot be reached: {error.strerror}.") from error
    taken = [(root, inside) for root in roots if (inside := below(root.path, url))]
    return _new(conn, url, single, taken)


def _new(
    conn: sqlite3.Connection, path: bytes, single: bool, taken: Iterable[tuple[Root, bytes]]
) -> Target:
    """Add a root, and take those that are below it into it."""
    conn.execute("INSERT INTO roots (path, single) VALUES (?, ?)", (path, single))
    (new,) = conn.execute("SELECT id FROM roots WHERE path = ?", (path,)).fetchone()
    for root, inside in taken:
        _take_in(conn, root, new, inside)
    return Target(path, b"", single)


def _take_in(conn: sqlite3.Connection, root: Root, new: int, prefix: bytes) -> None:
    rows = conn.execute("SELECT id, path FROM files WHERE root = ?", (root.id,)).fetchall()
    conn.executemany(
        "UPDATE files SET root = ?, path = ? WHERE id = ?",
        ((new, join(prefix, path), file) for file, path in rows),
    )
    conn.execute("DELETE FROM roots WHERE id = ?", (root.id,))


def _below(path: bytes, folder: bytes) -> bytes:
    """``path`` relative to ``folder``, with ``/``; empty where it is not below it."""
    start = folder if folder.endswith(os.fsencode(os.sep)) else folder + os.fsencode(os.sep)
    if not path.startswith(start):
        return b""
    inside = path[len(start) :]
    return inside.replace(b"\\", b"/") if os.sep == "\\" else inside


def _covers(other: Target, target: Target) -> bool:
    """True where ``other`` walks all of ``target``, and more."""
    if other.root != target.root or other.prefix == target.prefix:
        return False
    return not other.prefix or target.prefix.startswith(other.prefix + b"/")
