"""Copies of objects on this machine, for what reads a file by its tensors in any order.

A proof of a relation asks for hundreds of tensors, of one file against many others: each would be
a request. So an object comes whole, once, into a temporary folder that ends with the process.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

from lorafind.files import remote

#: Bytes of all copies together, at most, and at most half of what the disk has left; the one that
#: was used longest ago goes first.
ROOM = 8 * 2**30


class Copy:
    """A copy; its file is there as long as this object is.

    path: ends in the name of the object.
    """

    def __init__(self, path: str, size: int) -> None:
        self.path, self.size = path, size
        # On Windows a file that something still maps cannot be removed, and stays.
        weakref.finalize(self, _remove, os.path.dirname(path), os.getpid())


def _remove(folder: str, process: int) -> None:
    # A process that was forked off has no copies of its own.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


class _Copies:
    """The copies that are kept, by URL and state."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._kept: OrderedDict[tuple[str, int], Copy] = OrderedDict()
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, url: str, check: Callable[[], object]) -> Copy:
        with self._lock:
            own = self._locks.setdefault(url, threading.Lock())
        # Two threads that want one object load it once.
        with own:
            facts = remote.facts(url)
            with self._lock:
                found = self._kept.get((url, facts.mark))
                if found is not None:
                    self._kept.move_to_end((url, facts.mark))
                    return found
            if facts.size > remote.WHOLE:
                check()
            with self._lock:
                self._make_room(facts.size)
            made = _fetched(facts)
            with self._lock:
                self._kept[url, facts.mark] = made
            return made

    def _make_room(self, size: int) -> None:
        used = sum(copy.size for copy in self._kept.values())
        # The place may be a small one, or in memory.
        room = min(self.room, used + shutil.disk_usage(tempfile.gettempdir()).free // 2)
        while self._kept and used + size > room:
            used -= self._kept.popitem(last=False)[1].size


@cache
def _copies() -> _Copies:
    return _Copies(ROOM)


def copy_of(url: str, check: Callable[[], object] = lambda: None) -> Copy:
    """The object at a URL as a file of this machine, loaded now where there is no copy of it.

    check: called before a large one is loaded; what it raises ends that. Raises OSError, also where
    the object changes while it is loaded, and where the disk is full.
    """
    return _copies().get(url, check)


def _fetched(facts: remote.Facts) -> Copy:
    folder = tempfile.mkdtemp(prefix="lorafind-")
    name = facts.url.rpartition("/")[2]
    # A name of a store may be none that a file can have.
    path = os.path.join(folder, "".join(c if c.isalnum() or c in "._- " else "_" for c in name))
    copy = Copy(path, facts.size)
    with open(path, "xb") as out:
        while (begin := out.tell()) < facts.size:
            piece = remote.read(facts.url, begin, min(begin + remote.BLOCK, facts.size))
            if not piece:
                break
            out.write(piece)
    if remote.facts(facts.url).mark != facts.mark:
        raise OSError(errno.EAGAIN, "it changed while it was read", facts.url)
    return copy
