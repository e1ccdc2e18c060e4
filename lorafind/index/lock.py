"""One writer per index: an operating-system lock on ``<index>.lock``.

The kernel lets go of it when the holder ends, however it ends. The file holds the pid and host
of the last holder, for the message, and stays: to remove it would let two writers lock two files.
"""

from __future__ import annotations

import os
import socket
import sys
import weakref
from pathlib import Path

from lorafind.index.problem import IndexProblem

if sys.platform == "win32":
    import msvcrt

    # A locked byte cannot be read on Windows: lock one that lies behind the text.
    _BYTE = 1 << 30

    def _take(handle: int) -> None:
        os.lseek(handle, _BYTE, os.SEEK_SET)
        msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _take(handle: int) -> None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


class WriterLock:
    """Held from construction to :meth:`release`.

    Raises IndexProblem when another process (or this one) holds it, naming pid and host, or when
    the lock file cannot be written.
    """

    def __init__(self, index: Path) -> None:
        self.path = index.with_name(index.name + ".lock")
        self._handle = -1
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            raise IndexProblem(
                f"The index {index} cannot be written ({self.path}: {error.strerror}): choose "
                "another place with --db."
            ) from error
        try:
            _take(handle)
        except OSError as error:
            holder = os.pread(handle, 500, 0) if hasattr(os, "pread") else os.read(handle, 500)
            os.close(handle)
            if not isinstance(error, (BlockingIOError, PermissionError)):
                raise IndexProblem(
                    f"The index {index} cannot be locked ({error.strerror}): choose a place on a "
                    "local drive with --db."
                ) from error
            who = holder.decode("utf-8", "replace").strip() or "another process"
            raise IndexProblem(
                f"The index {index} is being written by {who}: wait until it is done, or end it."
            ) from error
        self._handle = handle
        _held.add(self)
        os.lseek(handle, 0, os.SEEK_SET)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let go; a second call does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
            _held.discard(self)


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _close_inherited() -> None:
    # A forked worker shares the lock, and would keep it when its parent is killed.
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
