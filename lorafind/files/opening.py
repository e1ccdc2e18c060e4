"""Opening what a folder lists, which need not be a file, or what a store holds."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable
from typing import Protocol

from lorafind.files.place import AnyPath, State, is_remote


class NotAFile(OSError):
    """A path leads to a folder, a FIFO, a socket or a device."""


class Readable(Protocol):
    """Of a file what reading it needs; the calls are those of :class:`io.RawIOBase`."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...

    def seek(self, position: int, /) -> int: ...

    def close(self) -> None: ...


def open_regular(path: str | bytes | os.PathLike[str]) -> io.FileIO:
    """Open a regular file to read, unbuffered.

    Raises NotAFile for anything else, which is not opened (a device may do something when it is),
    and never blocks; OSError where the file cannot be opened.
    """
    _check(os.stat(path), path)
    # A FIFO that has come in its place since would block here for ever without O_NONBLOCK.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    file = open(os.open(path, flags), "rb", buffering=0)  # noqa: SIM115
    try:
        _check(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def open_anywhere(
    path: AnyPath, until: int | None = None
) -> tuple[Readable, Callable[[], os.stat_result | State]]:
    """A file of this machine or an object of a store, and what tells its state at any moment.

    until: no byte after this one will be read. Raises OSError as :func:`open_regular` does.
    """
    if is_remote(path):
        from lorafind.files.remote import RemoteFile

        try:
            far = RemoteFile(os.fsdecode(path))
        except IsADirectoryError as error:
            raise NotAFile(errno.EINVAL, "it is not a regular file", os.fsdecode(path)) from error
        if until is not None:
            far.expect(until)
        return far, far.state
    file = open_regular(os.fsdecode(path))
    return file, lambda: os.fstat(file.fileno())


def read_at_most(path: AnyPath, most: int) -> bytes:
    """All of a small file, cut after ``most`` bytes; raises OSError."""
    if is_remote(path):
        from lorafind.files.remote import read

        return read(os.fsdecode(path), 0, most)
    data = bytearray()
    with open_regular(os.fsdecode(path)) as file:
        # A read may give less than was asked for, and a file may grow.
        while len(data) < most and (piece := file.read(most - len(data))):
            data += piece
    return bytes(data)


def _check(facts: os.stat_result, path: str | bytes | os.PathLike[str]) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise NotAFile(errno.EINVAL, "it is not a regular file", os.fsdecode(path))
