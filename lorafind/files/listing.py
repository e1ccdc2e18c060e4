"""Walks what a store holds below a URL, as :mod:`lorafind.files.scan` walks folders.

Stores have no folders, only names with slashes: a folder exists as long as something is in it. So
what lists nothing has been deleted, or belongs to another account, or has lost its name; where a
whole root lists nothing, or cannot be listed, its files are out of reach and not gone.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from lorafind.files import remote
from lorafind.files.place import folder_of, scheme_of
from lorafind.files.remote import Entry, Facts
from lorafind.files.scan import (
    PARTIAL,
    PICKLED,
    SAFETENSORS,
    Found,
    ScanReport,
    Target,
    is_partial,
    is_trash,
    join,
    unasked_pickle,
)

#: Folders that are listed at the same time, where the store's library can.
LISTS = 8


def kind_of(url: str) -> str:
    """``file`` or ``folder``; raises OSError, FileNotFoundError where nothing is there."""
    # To a web server everything is a file, the page that lists a folder too.
    page = scheme_of(url) in ("http", "https")
    if not page or os.fsencode(url).lower().endswith((*SAFETENSORS, *PICKLED)):
        try:
            remote.facts(url)
        except IsADirectoryError:
            pass
        else:
            return "file"
    if not remote.listing(url):
        raise FileNotFoundError(errno.ENOENT, "nothing is listed there", url)
    return "folder"


def scan(target: Target, report: ScanReport, allow_pickle: bool) -> Iterator[Found]:
    """Every possible LoRA file below a target in a store; ``report`` fills up on the way."""
    return _Walk(target, report, allow_pickle).run()


class _Walk:
    def __init__(self, target: Target, report: ScanReport, allow_pickle: bool) -> None:
        self.target, self.report, self.allow_pickle = target, report, allow_pickle
        self.start = os.fsdecode(join(target.root, target.prefix))
        self.device = device_of(os.fsdecode(target.root))

    def run(self) -> Iterator[Found]:
        target, report = self.target, self.report
        try:
            found = self._first()
        except FileNotFoundError:
            self._absent()
            return
        except OSError as error:
            report.missing[target.root] = f"it cannot be reached ({error.strerror})"
            return
        report.roots.setdefault(target.root, self.device)
        report.stable[self.device] = True
        if isinstance(found, Facts):
            yield self._file(target.prefix, found)
        elif found:
            yield from self._tree(found)
        else:
            self._absent()

    def _first(self) -> Facts | list[Entry]:
        """What the start is: a file, or a folder with entries."""
        if self.target.single:
            return remote.facts(self.start)
        try:
            return self._list(self.start)
        except NotADirectoryError:
            return remote.facts(self.start)

    def _list(self, url: str) -> list[Entry]:
        self.report.folders += 1
        return remote.listing(url)

    def _absent(self) -> None:
        """A start that lists nothing: gone where the root lists something, else out of reach."""
        target, report = self.target, self.report
        root = os.fsdecode(target.root)
        place = folder_of(root) if target.single else root
        try:
            there = bool((target.single or target.prefix) and remote.listing(place))
        except OSError:
            # The report below says what is missing; why, the next listing of the root would say.
            there = False
        if there:
            report.roots.setdefault(target.root, self.device)
        else:
            report.missing[target.root] = (
                "nothing is listed there; is it the right place, and the right account?"
            )

    def _tree(self, first: list[Entry]) -> Iterator[Found]:
        """Folder by folder, the nearest to the start first, several listed together."""
        waiting: deque[tuple[bytes, str]] = deque()
        yield from self._folder(self.target.prefix, first, waiting)
        threads = LISTS if waiting and remote.many_at_once(self.start) else 1
        with ThreadPoolExecutor(threads) as pool:
            while waiting:
                some = [waiting.popleft() for _ in range(min(threads, len(waiting)))]
                listed = pool.map(self._tried, [url for _, url in some])
                for (prefix, _), entries in zip(some, listed, strict=True):
                    yield from self._folder(prefix, entries, waiting)

    def _tried(self, url: str) -> list[Entry]:
        try:
            return self._list(url)
        except FileNotFoundError:
            # It has been emptied meanwhile, and with that it is no more.
            return []
        except OSError as error:
            self.report.unreachable[os.fsencode(url)] = error.strerror or str(error)
            return []

    def _folder(
        self, prefix: bytes, entries: list[Entry], waiting: deque[tuple[bytes, str]]
    ) -> Iterator[Found]:
        names = {os.fsencode(entry.name) for entry in entries}
        for entry in entries:
            name = os.fsencode(entry.name)
            path = prefix + b"/" + name if prefix else name
            lower = name.lower()
            if entry.facts is None:
                if is_trash(lower, path):
                    self.report.passed.append(os.fsencode(entry.url))
                else:
                    waiting.append((path, entry.url))
            elif not lower.endswith((*SAFETENSORS, *PICKLED)):
                if lower.endswith(PARTIAL):
                    self.report.passed.append(os.fsencode(entry.url))
            elif is_partial(name, entry.facts.size, names):
                self.report.passed.append(os.fsencode(entry.url))
            else:
                yield self._file(path, entry.facts)

    def _file(self, path: bytes, facts: Facts) -> Found:
        outcome, reason = unasked_pickle(path or self.target.root, self.allow_pickle)
        state = facts.state
        return Found(
            self.target.root,
            path,
            state.st_size,
            state.st_mtime_ns,
            state.st_mtime_ns if facts.tagged else 0,
            self.device,
            facts.mark,
            outcome=outcome,
            reason=reason,
        )


def device_of(url: str) -> int:
    """A number for scheme and bucket (host, repository's owner), 63 bits of a digest."""
    scheme = scheme_of(url)
    first = url[len(scheme) + 3 :].partition("/")[0]
    text = f"{scheme}://{first}".encode(errors="surrogateescape")
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "big") >> 1
