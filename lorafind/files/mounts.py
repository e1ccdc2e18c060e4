"""Which filesystem a path stands on: what it promises for inodes and for SQLite's WAL.

Linux tells it in ``/proc/self/mountinfo`` (proc(5)); elsewhere the answer is empty, and callers
take the careful side.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

from lorafind.files.place import is_remote, scheme_of

MOUNTINFO = Path("/proc/self/mountinfo")

#: Inode numbers on these survive a remount (exFAT, FAT, FUSE and most network drives make them up).
STABLE_INODES = frozenset(
    {"apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfsplus", "jfs", "nilfs2"}
    | {"ntfs", "ntfs3", "reiserfs", "xfs", "zfs"}
)
#: WAL needs memory that is shared between processes; network drives and user-space filesystems
#: promise none (https://www.sqlite.org/wal.html, section 1).
REMOTE = frozenset(
    {"9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fuse", "glusterfs", "gpfs", "lustre"}
    | {"ncpfs", "nfs", "nfs4", "orangefs", "prl_fs", "smb3", "smbfs", "vboxsf", "virtiofs"}
    | {"vmhgfs"}
)


def parse(text: str) -> list[tuple[bytes, str]]:
    """(mount point, type) of every line of a mountinfo file, in its order."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        if fields := left.split(" ")[4:5]:
            point = re.sub(
                rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(fields[0])
            )
            mounts.append((point, right.split(" ")[0]))
    return mounts


def kind_of(path: bytes, mounts: list[tuple[bytes, str]]) -> str:
    """Type of the mount of ``path`` (real, absolute); later mounts cover earlier ones."""
    best, kind = -1, ""
    for point, name in mounts:
        inside = path == point or path.startswith(point.rstrip(b"/") + b"/")
        if inside and len(point) >= best:
            best, kind = len(point), name
    return kind


@lru_cache(maxsize=1)
def _mounts() -> list[tuple[bytes, str]]:
    if not MOUNTINFO.exists():
        return []
    return parse(os.fsdecode(MOUNTINFO.read_bytes()))


def filesystem(path: str | bytes | os.PathLike[str]) -> str:
    """Type of the filesystem of ``path`` (``ext4``, ``nfs4``, …), empty where it is unknown.

    Of a URL its scheme. Mounts are read once per process.
    """
    if is_remote(path):
        return scheme_of(path)
    return kind_of(os.path.realpath(os.fsencode(path)), _mounts())


def remote(path: str | bytes | os.PathLike[str]) -> bool:
    """True where ``path`` is on a network drive or a user-space filesystem, as far as is known."""
    if is_remote(path) or os.fsdecode(os.path.realpath(path)).startswith("\\\\"):
        return True
    kind = filesystem(path)
    return kind in REMOTE or kind.startswith("fuse.")


def stable_inodes(path: str | bytes | os.PathLike[str]) -> bool:
    """True where an inode number still means the same file after a remount."""
    return filesystem(path) in STABLE_INODES
