"""Walks roots and says what stands there: one :class:`Found` per file, without opening any.

Names are bytes throughout (a name need not be UTF-8); paths below a root are written with ``/``
on every system. Real folders are walked before linked ones and every folder once, so that the
same tree always gives the same paths, and a cycle of links ends.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple

from lorafind.files.mounts import stable_inodes
from lorafind.files.opening import open_regular
from lorafind.files.place import is_remote

SAFETENSORS = (b".safetensors",)
PICKLED = (b".pt", b".bin", b".ckpt", b".pth")
#: What downloads in flight are called; a neighbour so named makes an empty file a placeholder.
PARTIAL = (b".part", b".crdownload", b".tmp", b".download", b".aria2")
#: Folders that hold what was thrown away, or older states of what stands elsewhere.
PASSED_FOLDERS = frozenset(
    {b".lm-pending-delete", b".trash", b".trashes", b"$recycle.bin", b"recycler", b"recycled"}
    | {b"#recycle", b"@recycle", b"@eadir", b"system volume information"}
    | {b".stversions", b".snapshot", b".snapshots", b"#snapshot", b".zfs"}
)
#: What a probe reads: so much at both ends, and blocks between them.
PROBE = 64 * 1024
SAMPLES, SAMPLE = 14, 4096

_MAX = 2**63 - 1
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Target(NamedTuple):
    """What to walk: a root, or what is below ``prefix`` in it.

    root: absolute path. prefix: below the root, ``/``-separated, empty for all of it. single: the
    root is a file.
    """

    root: bytes
    prefix: bytes = b""
    single: bool = False


class Found(NamedTuple):
    """One path that may be a LoRA, with the facts of ``stat`` (of a link's target).

    path: below ``root``, empty where the root is itself the file. Numbers are cut to 63 bits, as
    SQLite holds them. outcome: empty for a file to look into, else ``not-a-file``, ``pickle`` or
    ``inaccessible``, with the reason in one sentence.

    Of an object in a store mtime and inode are of its :class:`~lorafind.files.remote.Facts`, and
    ctime is 0 where the store gives no version tag.
    """

    root: bytes
    path: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    device: int
    inode: int
    is_link: bool = False
    outcome: str = ""
    reason: str = ""

    @property
    def full(self) -> bytes:
        """The absolute path."""
        return join(self.root, self.path)


@dataclass
class ScanReport:
    """What a scan saw beside files; folders are absolute paths.

    missing: roots that cannot be reached → why. roots: roots that were reached → their device.
    empty: folders without any entry → their device. unreachable: folders, links to folders and
    files that could not be looked at → why. passed: part files, trash and the like. stable:
    device → inode numbers on it survive a remount. folders: how many were read.
    """

    missing: dict[bytes, str] = field(default_factory=dict)
    roots: dict[bytes, int] = field(default_factory=dict)
    empty: dict[bytes, int] = field(default_factory=dict)
    unreachable: dict[bytes, str] = field(default_factory=dict)
    passed: list[bytes] = field(default_factory=list)
    stable: dict[int, bool] = field(default_factory=dict)
    folders: int = 0


def join(root: bytes, path: bytes) -> bytes:
    """Absolute path of ``path`` below ``root``."""
    if not path:
        return root
    return root + path if root.endswith((b"/", b"\\")) else root + b"/" + path


def scan(
    targets: Iterable[Target], report: ScanReport, allow_pickle: bool = False
) -> Iterator[Found]:
    """Every possible LoRA file below the targets; ``report`` fills up on the way.

    Nothing is opened and no error ends the walk: what cannot be looked at is in the report or is
    a Found with an outcome. A single file is yielded whatever its extension.
    """
    return _Walk(report, allow_pickle).run(targets)


class _Walk:
    def __init__(self, report: ScanReport, allow_pickle: bool) -> None:
        self.report = report
        self.allow_pickle = allow_pickle
        self.seen: set[tuple[int, int] | bytes] = set()
        self.real: deque[tuple[bytes, bytes]] = deque()
        self.linked: deque[tuple[bytes, bytes]] = deque()

    def run(self, targets: Iterable[Target]) -> Iterator[Found]:
        for target in targets:
            if is_remote(target.root):
                from lorafind.files import listing

                yield from listing.scan(target, self.report, self.allow_pickle)
                continue
            start = join(target.root, target.prefix)
            try:
                facts = os.stat(start)
            except OSError as error:
                yield from self._absent(target, start, error)
                continue
            self.report.roots.setdefault(target.root, facts.st_dev & _MAX)
            if stat.S_ISDIR(facts.st_mode):
                self.real.append((target.root, target.prefix))
            else:
                yield self._file(target.root, target.prefix, facts, os.path.islink(start))
        while self.real or self.linked:
            root, path = self.real.popleft() if self.real else self.linked.popleft()
            yield from self._folder(root, path)

    def _absent(self, target: Target, start: bytes, error: OSError) -> Iterator[Found]:
        """A start that is not there: gone from a place that is, or out of reach with its place."""
        if not isinstance(error, FileNotFoundError):
            self.report.missing[target.root] = f"it cannot be reached ({error.strerror})"
        elif os.path.islink(start):
            yield self._refused(target.root, target.prefix, "the link's target does not exist")
        elif place := _place(target, start):
            # Where a drive is not mounted its mount point is there, and empty.
            try:
                if not os.listdir(place):
                    self.report.empty[place] = os.stat(place).st_dev & _MAX
            except OSError as cause:
                self.report.unreachable[place] = cause.strerror or str(cause)
        else:
            self.report.missing[target.root] = "it does not exist"

    def _folder(self, root: bytes, path: bytes) -> Iterator[Found]:
        folder = join(root, path)
        entries: list[os.DirEntry[bytes]] = []
        try:
            facts = os.stat(folder)
            identity = (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(folder)
            if identity in self.seen:
                return
            self.seen.add(identity)
            self.report.folders += 1
            with os.scandir(folder) as listing:
                entries.extend(listing)
        except OSError as error:
            self.report.unreachable[folder] = error.strerror or str(error)
        else:
            if not entries:
                self.report.empty[folder] = facts.st_dev & _MAX
        names = {entry.name for entry in entries}
        prefix = path + b"/" if path else b""
        for entry in sorted(entries, key=lambda entry: entry.name):
            yield from self._entry(entry, root, prefix + entry.name, names)

    def _entry(
        self, entry: os.DirEntry[bytes], root: bytes, path: bytes, names: set[bytes]
    ) -> Iterator[Found]:
        name = entry.name.lower()
        candidate = name.endswith(SAFETENSORS) or name.endswith(PICKLED)
        try:
            # Without a system call, but on drives whose listings do not tell what an entry is.
            link = entry.is_symlink()
            folder = not link and entry.is_dir(follow_symlinks=False)
        except OSError as error:
            self.report.unreachable[entry.path] = error.strerror or str(error)
            return
        if folder:
            if is_trash(name, path):
                self.report.passed.append(entry.path)
                return
            self.real.append((root, path))
            if candidate:
                yield self._refused(root, path, f"it is {_KINDS[stat.S_IFDIR]}")
            return
        if not candidate and not link:
            if name.endswith(PARTIAL):
                self.report.passed.append(entry.path)
            return
        try:
            # On Windows an entry's own facts lack device and inode.
            facts = os.stat(entry.path) if os.name == "nt" else entry.stat()
        except OSError as error:
            if not candidate:
                self.report.unreachable[entry.path] = error.strerror or str(error)
            elif link and not isinstance(error, PermissionError):
                why = "does not exist" if isinstance(error, FileNotFoundError) else error.strerror
                yield self._refused(root, path, f"the link's target: {why}")
            elif not isinstance(error, FileNotFoundError):
                self.report.unreachable[entry.path] = error.strerror or str(error)
                yield self._refused(root, path, f"{error.strerror}", outcome="inaccessible")
            return
        if stat.S_ISDIR(facts.st_mode):
            self.linked.append((root, path))
        if candidate:
            if is_partial(entry.name, facts.st_size, names):
                self.report.passed.append(entry.path)
            else:
                yield self._file(root, path, facts, link)

    def _file(self, root: bytes, path: bytes, facts: os.stat_result, link: bool) -> Found:
        device = facts.st_dev & _MAX
        if device not in self.report.stable:
            self.report.stable[device] = stable_inodes(join(root, path))
        outcome = reason = ""
        if not stat.S_ISREG(facts.st_mode):
            outcome = "not-a-file"
            reason = f"it is {_KINDS.get(stat.S_IFMT(facts.st_mode), 'no regular file')}"
        else:
            outcome, reason = unasked_pickle(path or root, self.allow_pickle)
        return Found(
            root,
            path,
            facts.st_size,
            max(-_MAX, min(facts.st_mtime_ns, _MAX)),
            max(-_MAX, min(facts.st_ctime_ns, _MAX)),
            device,
            facts.st_ino & _MAX,
            link,
            outcome,
            reason,
        )

    @staticmethod
    def _refused(root: bytes, path: bytes, reason: str, outcome: str = "not-a-file") -> Found:
        return Found(root, path, 0, 0, 0, 0, 0, outcome=outcome, reason=reason)


def _place(target: Target, start: bytes) -> bytes:
    """The nearest existing folder above ``start`` that belongs to the target; empty for none."""
    if target.single:
        parent = os.path.dirname(start)
        return parent if os.path.isdir(parent) else b""
    while len(start) > len(target.root):
        start = os.path.dirname(start)
        if os.path.isdir(start):
            return start
    return b""


def unasked_pickle(path: bytes, allow_pickle: bool) -> tuple[str, str]:
    """(outcome, reason) of a file that is not to be opened without its owner's word, else empty."""
    if allow_pickle or not path.lower().endswith(PICKLED):
        return "", ""
    return "pickle", "it is a pickle, which can run code when it is opened: needs --allow-pickle"


def is_trash(name: bytes, path: bytes) -> bool:
    """True for a folder of what was thrown away; ``name`` is its last part in lower case."""
    return (
        name in PASSED_FOLDERS
        or name.startswith(b".trash-")
        or path.endswith(b".local/share/Trash")
    )


def is_partial(name: bytes, size: int, names: set[bytes]) -> bool:
    """True for AppleDouble files, for what aria2 is writing, and for a browser's placeholder."""
    if name.startswith(b"._") or name + b".aria2" in names:
        return True
    return size == 0 and any(name + ending in names for ending in PARTIAL)


def probe(path: bytes | str | os.PathLike[str]) -> bytes:
    """16 bytes (BLAKE2b) that tell files of one size apart without reading them whole.

    Covers the first 8 + 64 Ki bytes, the last 64 Ki, and SAMPLES blocks of 4 KiB at equal distances
    between them: two trainings may share a header and an untrained last layer, but not all of
    those. Raises OSError where the file cannot be read, and for a URL, where every block would be a
    request.
    """
    if is_remote(path):
        raise OSError(errno.EINVAL, "an object in a store is not probed", os.fsdecode(path))
    digest = blake2b(digest_size=16)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(file.read(8 + PROBE))
        inside = size - 8 - 2 * PROBE
        for k in range(SAMPLES if inside > 0 else 0):
            file.seek(8 + PROBE + inside * k // SAMPLES)
            digest.update(file.read(SAMPLE))
        file.seek(max(0, size - PROBE))
        digest.update(file.read(PROBE))
    return digest.digest()
