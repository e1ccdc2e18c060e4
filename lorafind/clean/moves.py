"""Moves that lose nothing: never over an existing file, the source there until the target is.

On one drive a move is a second name and then one name less, so that no moment is without the file
(link(2), unlink(2)). Across drives the bytes are copied beside the target, synced, read again and
compared by SHA-256 before the copy gets its name and the source goes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from contextlib import suppress
from pathlib import Path

from lorafind.files.opening import open_regular

#: A file system or its owner says so where it has no hard links.
NO_LINKS = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES}
)
CHUNK = 2**20


class Changed(OSError):
    """A file changed while it was read."""


def digest(path: str) -> tuple[str, os.stat_result]:
    """SHA-256 (hex) of a regular file and its facts; raises Changed, NotAFile or OSError."""
    with open_regular(path) as file:
        before = os.fstat(file.fileno())
        found = hashlib.file_digest(file, "sha256").hexdigest()
        after = os.fstat(file.fileno())
    if state(before) != state(after):
        raise Changed(errno.EBUSY, "it changes while it is read", path)
    return found, after


def state(facts: os.stat_result) -> tuple[int, int, int, int]:
    """What differs after a file was written: device, inode, size, time of change (ns)."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def sync_folder(folder: str) -> None:
    """Make the names of a folder survive a power cut, where the system can."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: str) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    if not os.path.isdir(folder):
        above = os.path.dirname(folder)
        make_folder(above)
        os.makedirs(folder, exist_ok=True)
        sync_folder(above)


def part_of(target: str, token: str) -> str:
    """Where the copy for a target grows; the scan passes such names over."""
    return os.path.join(os.path.dirname(target), f".lorafind-{token}.part")


def move(source: str, target: str, token: str, sha256: str) -> None:
    """Move a regular file to a path that is free, on this or another drive.

    token: names the part file of a copy; sha256: of the source. Raises FileExistsError where the
    target is taken, Changed where the source is not what it was, OSError where the system refuses;
    then the source stands where it stood and nothing of ours at the target.
    """
    if not os.access(os.path.dirname(source), os.W_OK):
        raise PermissionError(errno.EACCES, "the folder cannot be written", os.path.dirname(source))
    make_folder(os.path.dirname(target))
    try:
        rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        part = part_of(target, token)
        before = copy(source, part, sha256)
        try:
            rename(part, target)
        except OSError:
            os.unlink(part)
            raise
        _leave(source, target, before)
    sync_folder(os.path.dirname(source))


def rename(source: str, target: str) -> None:
    """Rename on one drive, never over a file: FileExistsError instead."""
    if os.name == "nt":
        os.rename(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _rename_over_own(source, target)
        return
    sync_folder(os.path.dirname(target))
    try:
        os.unlink(source)
    except OSError:
        os.unlink(target)
        raise


def _rename_over_own(source: str, target: str) -> None:
    """Without hard links: take the name with an empty file of our own, then rename over that."""
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    try:
        os.rename(source, target)
    except OSError:
        os.unlink(target)
        raise
    sync_folder(os.path.dirname(target))


def copy(source: str, part: str, sha256: str) -> tuple[int, int, int, int]:
    """Copy with times and mode, sync, read the copy again; returns the source's state.

    A part file of an earlier try is replaced. Raises Changed where the bytes are not those of
    sha256; the part is then removed.
    """
    if os.path.lexists(part):
        os.unlink(part)
    try:
        with open_regular(source) as file:
            before = state(os.fstat(file.fileno()))
            with open(part, "xb", buffering=0) as out:
                while piece := file.read(CHUNK):
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[out.write(rest) :]
                # Not every drive has a place for rights.
                with suppress(PermissionError):
                    shutil.copystat(source, part)
                os.fsync(out.fileno())
                if hasattr(os, "posix_fadvise"):
                    # So that the bytes are compared as the drive has them, not as memory has.
                    os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if digest(part)[0] != sha256:
            raise Changed(errno.EBUSY, "its copy is not what the file was", source)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return before


def _leave(source: str, target: str, before: tuple[int, int, int, int]) -> None:
    """Remove a source that stands at the target, unless it changed since it was copied."""
    try:
        if state(os.stat(source, follow_symlinks=False)) != before:
            raise Changed(errno.EBUSY, "it changed while it was copied", source)
        os.unlink(source)
    except OSError:
        os.unlink(target)
        raise
