"""Compares what the index knows with what a scan found: what to read, and what became of the rest.

Pure logic over rows in memory (no SQL, no file access but through ``probe``). The rules:

- Known: same path, size and mtime (and inode where inodes are stable), read by this version, and
  not within two seconds of its mtime, since a later change could carry the same time stamp. An
  object of a store is known by its version tag; where it has neither tag nor time it never is.
- Moved: a file at an unknown or changed path whose size, ending and probe are those of a row
  whose path is gone, in any root. Where several rows fit, they must agree on the content.
- Linked: paths to one (device, inode) of this scan are one file, read at most once.
- Offline, not gone: what is missing below a root or folder that is out of reach, below a root that
  is empty where there were files, or below an empty folder of another device (an unmounted drive).
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorafind.files.place import is_remote
from lorafind.files.scan import Found, ScanReport, Target, join
from lorafind.index.rows import Known

#: Outcomes that time may heal.
RETRY = frozenset({"changing", "vanished", "inaccessible", "failed"})
#: Outcomes that the scan gives without reading.
UNREAD = frozenset({"pickle", "not-a-file"})
#: FAT stamps times in steps of two seconds.
SETTLED_NS = 2_000_000_000
#: An object's time below this is none: only the part that is of its digest.
NO_TIME_NS = 1_000_000_000

Probe = Callable[[Found], bytes]


class Read(NamedTuple):
    """A file to read. why: ``new``, ``changed``, ``recent``, ``version`` or ``retry``.

    links: other paths to the same file, which take over its result.
    """

    found: Found
    why: str
    links: tuple[Found, ...] = ()


class Move(NamedTuple):
    """A row whose file now stands elsewhere; ``replaces`` is the row that stood there."""

    row: Known
    found: Found
    replaces: Known | None


class Link(NamedTuple):
    """A path to the file of a row whose facts hold."""

    found: Found
    of: Known


@dataclass
class Decisions:
    """What to do, and what is so already.

    unchanged: rows that hold as they are. refreshed: rows that hold, but whose ctime, device,
    inode or presence is new. refused: outcomes of the scan itself, to record. gone, offline: rows
    whose presence changes; offline with the reason. roots: targets' roots that are offline → why.
    """

    read: list[Read] = field(default_factory=list)
    moved: list[Move] = field(default_factory=list)
    linked: list[Link] = field(default_factory=list)
    refused: list[Found] = field(default_factory=list)
    refreshed: list[Link] = field(default_factory=list)
    unchanged: list[Known] = field(default_factory=list)
    gone: list[Known] = field(default_factory=list)
    offline: list[tuple[Known, str]] = field(default_factory=list)
    roots: dict[bytes, str] = field(default_factory=dict)


def reconcile(
    known: Iterable[Known],
    found: Sequence[Found],
    report: ScanReport,
    targets: Sequence[Target],
    devices: Mapping[bytes, int | None],
    version: int,
    probe: Probe,
) -> Decisions:
    """Decide about every found path, and about every known one below the targets.

    known: all rows of the index, those of other roots too. devices: root → device when it was last
    seen. version: of reader and signature;
    rows of another one are read again. probe: gives a found file's probe, and may raise OSError
    (the file is then read).
    """
    rows = {(row.root, row.path): row for row in known}
    done = Decisions()
    reads: list[Read] = []
    holding: list[Link] = []
    present: set[tuple[bytes, bytes]] = set()
    for item in found:
        key = (item.root, item.path)
        row = rows.get(key)
        if item.outcome:
            if row is None or _supersedes(item, row):
                done.refused.append(item)
            elif row.status == item.outcome or item.outcome == "pickle":
                holding.append(Link(item, row))
            else:
                continue
        elif row is None:
            reads.append(Read(item, "new"))
        elif why := _why_read(row, item, version, report.stable.get(item.device, False)):
            reads.append(Read(item, why))
        else:
            holding.append(Link(item, row))
        present.add(key)
    for link in holding:
        if _refresh(link):
            done.refreshed.append(link)
        else:
            done.unchanged.append(link.of)
    missing = _missing(rows, present, targets)
    _judge_missing(done, missing, present, report, targets, devices)
    if reads:
        leaders = _join_links(done, reads, holding)
        lost = [row for key, row in rows.items() if row.presence == "gone" and key not in present]
        _find_moves(done, leaders, lost + done.gone, rows, version, probe)
    return done


def _why_read(row: Known, item: Found, version: int, stable: bool) -> str:
    """Why a known path must be read again; empty where its row holds."""
    if (
        row.size != item.size
        or row.mtime_ns != item.mtime_ns
        or (stable and row.inode != item.inode)
        or row.status in UNREAD
    ):
        return "changed"
    if row.status in RETRY:
        return "retry"
    if row.version != version:
        return "version"
    return "recent" if _recent(row) else ""


def _recent(row: Known) -> bool:
    if is_remote(row.root):
        if row.ctime_ns:
            # The version tag tells of every change.
            return False
        if row.mtime_ns < NO_TIME_NS:
            # Neither tag nor time: of a change to the same size nothing would tell.
            return True
    return abs(row.read_ns - row.mtime_ns) < SETTLED_NS


def _supersedes(item: Found, row: Known) -> bool:
    """True where a path that the scan refused takes the place of what was known of it.

    Not where a LoRA was read from a pickle that is still the same, and not where a path to a known
    content leads nowhere now (a dangling link): that is missing, not another thing.
    """
    if row.status == item.outcome:
        return row.reason != item.reason
    if item.outcome == "pickle":
        return (row.size, row.mtime_ns) != (item.size, item.mtime_ns)
    return row.sha256 is None


def _refresh(link: Link) -> bool:
    item, row = link
    return row.presence != "here" or (
        (row.ctime_ns, row.device, row.inode, row.is_link)
        != (item.ctime_ns, item.device, item.inode, item.is_link)
    )


def _missing(
    rows: dict[tuple[bytes, bytes], Known],
    present: set[tuple[bytes, bytes]],
    targets: Sequence[Target],
) -> list[Known]:
    """Rows below the targets that were there, or might have been, and were not found."""
    prefixes = defaultdict(list)
    for target in targets:
        prefixes[target.root].append(target.prefix)
    return [
        row
        for key, row in rows.items()
        if key not in present
        and row.root in prefixes
        and row.presence != "gone"
        and any(
            not prefix or row.path == prefix or row.path.startswith(prefix + b"/")
            for prefix in prefixes[row.root]
        )
    ]


def _judge_missing(
    done: Decisions,
    missing: list[Known],
    present: set[tuple[bytes, bytes]],
    report: ScanReport,
    targets: Sequence[Target],
    devices: Mapping[bytes, int | None],
) -> None:
    """Sort the missing into gone and offline, and name the roots that are offline."""
    for target in targets:
        if target.root in report.missing:
            done.roots[target.root] = report.missing[target.root]
        elif target.root in report.unreachable:
            why = report.unreachable[target.root]
            done.roots[target.root] = f"it cannot be read ({why})"
    still_there = {root for root, _ in present} if missing else set()
    for root in {row.root for row in missing} - done.roots.keys():
        if root in report.empty:
            done.roots[root] = "it is empty where there were files; is its drive mounted?"
        elif root not in still_there and _replaced(root, devices, report):
            done.roots[root] = "another file system stands there, with none of its files"
    for row in missing:
        if reason := done.roots.get(row.root) or _out_of_reach(row, report):
            if row.presence != "offline":
                done.offline.append((row, reason))
        else:
            done.gone.append(row)


def _replaced(root: bytes, devices: Mapping[bytes, int | None], report: ScanReport) -> bool:
    before, now = devices.get(root), report.roots.get(root)
    return before is not None and now is not None and before != now


def _out_of_reach(row: Known, report: ScanReport) -> str:
    """Why a missing file may only be out of reach; empty where its folder was looked through."""
    if not report.unreachable and not report.empty:
        return ""
    folder = join(row.root, row.path)
    while True:
        if folder in report.unreachable:
            return f"{os.fsdecode(folder)} cannot be read ({report.unreachable[folder]})"
        if report.empty.get(folder, row.device) != row.device:
            return f"{os.fsdecode(folder)} is empty; is its drive mounted?"
        parent = os.path.dirname(folder)
        if len(parent) < len(os.path.dirname(row.root)) or parent == folder:
            return ""
        folder = parent


def _identity(item: Found) -> tuple[int, int, int, int, bytes] | None:
    """What is equal for paths to one file; None where the system gives no inode."""
    if not item.inode:
        return None
    return (item.device, item.inode, item.size, item.mtime_ns, _ending(item))


def _ending(item: Found | Known) -> bytes:
    return os.path.splitext(item.path or item.root)[1].lower()


def _join_links(done: Decisions, reads: list[Read], holding: list[Link]) -> list[Read]:
    """One read per file: the rest is linked to it, or to a row that holds."""
    certain = {_identity(link.found): link.of for link in holding if not link.found.outcome}
    leaders: dict[object, Read] = {}
    for read in sorted(reads, key=lambda read: read.found.is_link):
        identity = _identity(read.found)
        if identity is not None and identity in certain:
            done.linked.append(Link(read.found, certain[identity]))
        elif identity is not None and identity in leaders:
            leader = leaders[identity]
            leaders[identity] = leader._replace(links=(*leader.links, read.found))
        else:
            leaders[identity if identity is not None else read.found] = read
    return list(leaders.values())


def _find_moves(
    done: Decisions,
    reads: list[Read],
    lost: list[Known],
    rows: dict[tuple[bytes, bytes], Known],
    version: int,
    probe: Probe,
) -> None:
    """Take reads out of which the content is known: their old path is gone."""
    candidates: dict[tuple[int, bytes, bytes], list[Known]] = defaultdict(list)
    worth_probing: set[tuple[int, bytes]] = set()
    for row in lost:
        if (
            row.probe
            and row.version == version
            and row.status not in RETRY | UNREAD
            and not _recent(row)
        ):
            candidates[row.size, _ending(row), row.probe].append(row)
            worth_probing.add((row.size, _ending(row)))
    moved: set[int] = set()
    for read in reads:
        item = read.found
        match = None
        if read.why in ("new", "changed") and (item.size, _ending(item)) in worth_probing:
            match = _take_match(item, candidates, probe)
        if match is None:
            done.read.append(read)
            continue
        moved.add(match.id)
        done.moved.append(Move(match, item, rows.get((item.root, item.path))))
        done.linked += [Link(link, match) for link in read.links]
    done.gone = [row for row in done.gone if row.id not in moved]


def _take_match(
    item: Found, candidates: dict[tuple[int, bytes, bytes], list[Known]], probe: Probe
) -> Known | None:
    """Take out the lost row that ``item`` is; None where there is none or no certain one."""
    try:
        seen = probe(item)
    except OSError:
        return None
    rows = fits = candidates.get((item.size, _ending(item), seen), [])
    if len({row.sha256 for row in fits}) > 1:
        fits = [row for row in fits if row.mtime_ns == item.mtime_ns]
    if len({row.sha256 for row in fits}) != 1:
        return None
    match = fits[0]
    rows.remove(match)
    return match


class Pruning(NamedTuple):
    """remove: rows that may go. held: root → (gone, all) where over half of it is gone."""

    remove: list[Known]
    held: dict[bytes, tuple[int, int]]


def pruning(known: Iterable[Known], force: bool = False) -> Pruning:
    """Which gone rows to remove; roots of which over half is gone only with ``force``.

    Offline rows are never among them.
    """
    by_root: dict[bytes, list[Known]] = defaultdict(list)
    for row in known:
        by_root[row.root].append(row)
    remove: list[Known] = []
    held: dict[bytes, tuple[int, int]] = {}
    for root, rows in by_root.items():
        gone = [row for row in rows if row.presence == "gone"]
        if 2 * len(gone) > len(rows) and not force:
            held[root] = (len(gone), len(rows))
        else:
            remove += gone
    return Pruning(remove, held)


def maybe_two_mounts(known: Iterable[Known]) -> list[list[Known]]:
    """Groups of rows with equal size, mtime and ctime on several devices.

    They may be one file on two mounts, of which nothing may be deleted.
    """
    groups: dict[tuple[int, int, int], list[Known]] = defaultdict(list)
    for row in known:
        if row.presence == "here" and row.status not in UNREAD:
            groups[row.size, row.mtime_ns, row.ctime_ns].append(row)
    return [rows for rows in groups.values() if len({row.device for row in rows}) > 1]
