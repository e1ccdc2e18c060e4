"""Roots of several indexes under one: united by path, without overlaps.

As in :mod:`lorafind.index.roots`, a root below another is a part of it. Here paths are compared as
they are written, since those of another machine lead nowhere on this one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from lorafind.files.scan import join
from lorafind.index.roots import Root, all_roots
from lorafind.index.store import Store

#: A source's root id → root id of the store, and what its paths begin with there.
Homes = dict[int, tuple[int, bytes]]


def unite(store: Store, roots: Iterable[Root]) -> Homes:
    """Add what is new of these roots to the store, in one transaction."""
    homes: Homes = {}
    with store.batch():
        # A folder comes before what lies below it.
        for root in sorted(roots, key=lambda root: root.path):
            homes[root.id] = _home(store, root)
    return homes


def look(store: Store, roots: Iterable[Root]) -> None:
    """Take over how each root was last seen, from whoever saw it last. Inside a batch."""
    store.conn.executemany(
        "UPDATE roots SET device = ?, filesystem = ?, seen_ns = ?3, offline = ? "
        "WHERE path = ? AND seen_ns < ?3",
        [(r.device, r.filesystem, r.seen_ns, r.offline, r.path) for r in roots],
    )


def _home(store: Store, root: Root) -> tuple[int, bytes]:
    known = all_roots(store.conn)
    for other in known:
        if other.path == root.path:
            return other.id, b""
        if not other.single and (inside := _below(root.path, other.path)):
            return other.id, inside
    store.conn.execute("INSERT INTO roots (path, single) VALUES (?, ?)", (root.path, root.single))
    (new,) = store.conn.execute("SELECT id FROM roots WHERE path = ?", (root.path,)).fetchone()
    for other in known:
        if not root.single and (inside := _below(other.path, root.path)):
            _move(store, other.id, int(new), inside)
    return int(new), b""


def _move(store: Store, old: int, new: int, prefix: bytes) -> None:
    rows = store.conn.execute("SELECT id, path FROM files WHERE root = ?", (old,)).fetchall()
    store.conn.executemany(
        "UPDATE files SET root = ?, path = ? WHERE id = ?",
        ((new, join(prefix, path), file) for file, path in rows),
    )
    store.conn.execute("DELETE FROM roots WHERE id = ?", (old,))


def _below(path: bytes, folder: bytes) -> bytes:
    """``path`` relative to ``folder``, with ``/``; empty where it is not below it."""
    for separator in {b"/", os.fsencode(os.sep)}:
        start = folder if folder.endswith(separator) else folder + separator
        if path.startswith(start):
            return path[len(start) :].replace(os.fsencode(os.sep), b"/")
    return b""
