"""Opening what a folder lists, which need not be a file."""

from __future__ import annotations

import errno
import io
import os
import stat


class NotAFile(OSError):
    """A path leads to a folder, a FIFO, a socket or a device."""


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


def _check(facts: os.stat_result, path: str | bytes | os.PathLike[str]) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise NotAFile(errno.EINVAL, "it is not a regular file", os.fsdecode(path))
