"""Reading safetensors files: the data in one pass, with both digests, while the world moves.

The header is checked first (:mod:`lorafind.files.header`).
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from pathlib import PurePath

from lorafind.files.header import DTYPE_BITS as DTYPE_BITS
from lorafind.files.header import FLOATS as FLOATS
from lorafind.files.header import MAX_HEADER as MAX_HEADER
from lorafind.files.header import Header as Header
from lorafind.files.header import Path as Path
from lorafind.files.header import TensorInfo as TensorInfo
from lorafind.files.header import header_length as header_length
from lorafind.files.header import parse_header as parse_header
from lorafind.files.opening import NotAFile, open_anywhere
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import is_remote
from lorafind.files.sniff import SAMPLE

#: Files above this many bytes are read tensor by tensor.
STREAM_ABOVE = 256 * 2**20
#: Bytes per read: still in the cache when the two digests pass over them.
CHUNK = 2**20


def refused(path: Path, error: OSError) -> NotAnAdapter:
    """What an operating system's error says of a file."""
    name = PurePath(path).name
    if isinstance(error, NotAFile):
        return NotAnAdapter("not-a-file", f"{name} is not a regular file")
    absent = error.errno == errno.ENOENT
    if error.errno == errno.ELOOP or (absent and os.path.islink(path)):
        return NotAnAdapter("not-a-file", f"{name} is a link that leads to no file")
    if absent or error.errno == errno.ENOTDIR:
        return NotAnAdapter("vanished", f"{name} is no longer there")
    why = error.strerror or str(error)
    return NotAnAdapter("inaccessible", f"{name} cannot be read: {why}")


class Opened:
    """A regular file, or an object in a store, opened for reading, with the state that it had.

    until: no byte after this one will be read, None for the whole file.
    """

    def __init__(self, path: Path, until: int | None = None) -> None:
        self.path = path
        try:
            self.file, self._state = open_anywhere(path, until)
        except OSError as error:
            raise self.refused(error) from error
        try:
            self.before = self._state()
        except OSError as error:
            self.file.close()
            raise self.refused(error) from error
        self.size = self.before.st_size

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if isinstance(error, NotAnAdapter) and is_remote(self.path):
                # Between two requests one object may have become another.
                self.settle()
        finally:
            self.file.close()

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    def refused(self, error: OSError) -> NotAnAdapter:
        """What an operating system's error says of the file."""
        return refused(self.path, error)

    def fill(self, view: memoryview) -> None:
        """Read exactly ``len(view)`` bytes."""
        done = 0
        while done < len(view):
            try:
                count = self.file.readinto(view[done:])
            except OSError as error:
                raise self.refused(error) from error
            if not count:
                raise self.changed()
            done += count

    def changed(self) -> NotAnAdapter:
        return NotAnAdapter(
            "changing", f"{self.name} changed while it was read: index it again when it is finished"
        )

    def head(self) -> tuple[memoryview, Header]:
        """The bytes up to the data section, and the header in them."""
        sample = bytearray(min(SAMPLE, self.size))
        self.fill(memoryview(sample))
        start = 8 + header_length(sample, self.size, self.path)
        head = bytearray(max(start, len(sample)))
        head[: len(sample)] = sample
        self.fill(memoryview(head)[len(sample) :])
        header = parse_header(head, self.size, self.path)
        self.seek(start)
        return memoryview(head)[:start], replace(header, mtime_ns=self.before.st_mtime_ns)

    def seek(self, position: int) -> None:
        """Go to a byte of the file."""
        try:
            self.file.seek(position)
        except OSError as error:
            raise self.refused(error) from error

    def settle(self) -> None:
        """Raise ``changing`` where the file is not as it was when it was opened."""
        try:
            after = self._state()
        except OSError as error:
            raise self.refused(error) from error
        if (after.st_size, after.st_mtime_ns) != (self.before.st_size, self.before.st_mtime_ns):
            raise self.changed()


def read_header(path: Path) -> Header:
    """The checked header of a file; no tensor is read. Raises NotAnAdapter."""
    with Opened(path) as opened:
        return opened.head()[1]


@dataclass(frozen=True)
class Stored:
    """A file read whole. ``data`` is its data section, valid until its buffer is reused."""

    header: Header
    sha256: str
    data_sha256: str
    data: memoryview

    @property
    def content(self) -> str:
        """See :meth:`Header.content`."""
        return self.header.content(self.data_sha256)

    def raw(self, key: str) -> memoryview:
        """The bytes of one tensor."""
        info = self.header.tensors[key]
        return self.data[info.begin : info.end]


def load(
    path: Path,
    buffer: bytearray | None = None,
    check: Callable[[Header], object] | None = None,
) -> Stored:
    """Read a file in one pass, with both digests.

    buffer: reused for the data section and grown where it is too small; whatever still looks into
    it then sees the new file. check: called with the header before any data is read; what it
    raises ends the reading. Raises NotAnAdapter, ``changing`` where size or modification time moved
    meanwhile.
    """
    with Opened(path) as opened:
        head, header = opened.head()
        if check is not None:
            check(header)
        length = header.size - header.data_start
        view = _room(buffer, length)
        whole, data = hashlib.sha256(head), hashlib.sha256()
        for begin in range(0, length, CHUNK):
            piece = view[begin : begin + CHUNK]
            opened.fill(piece)
            whole.update(piece)
            data.update(piece)
        opened.settle()
    return Stored(header, whole.hexdigest(), data.hexdigest(), view)


def _room(buffer: bytearray | None, length: int) -> memoryview:
    if buffer is None:
        buffer = bytearray(length)
    elif len(buffer) < length:
        try:
            buffer.extend(bytes(length - len(buffer)))
        except BufferError:
            # A tensor of an earlier file still looks into it.
            buffer = bytearray(length)
    return memoryview(buffer)[:length]


class Stream:
    """A file read tensor by tensor in one sequential pass; see :func:`stream`.

    ``header`` is there at once, the digests when the iteration has ended.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._sha256: str | None = None
        self._data_sha256: str | None = None

    def __iter__(self) -> Iterator[tuple[str, memoryview]]:
        return self.read()

    def read(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, memoryview]]:
        """(key, bytes) of the wanted tensors, of all for None, in file order.

        What is not wanted is read for the digests alone and never held.
        """
        with Opened(self.path) as opened:
            head, header = opened.head()
            if header != self.header:
                raise opened.changed()
            whole, data = hashlib.sha256(head), hashlib.sha256()
            passing = memoryview(bytearray(CHUNK))
            for key, info in header.tensors.items():
                length = info.end - info.begin
                kept = wanted is None or key in wanted
                view = memoryview(bytearray(length)) if kept else None
                for begin in range(0, length, CHUNK):
                    stop = min(length, begin + CHUNK)
                    piece = passing[: stop - begin] if view is None else view[begin:stop]
                    opened.fill(piece)
                    whole.update(piece)
                    data.update(piece)
                if view is not None:
                    yield key, view
            opened.settle()
        self._sha256, self._data_sha256 = whole.hexdigest(), data.hexdigest()

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the whole file."""
        return self._ended(self._sha256)

    @property
    def data_sha256(self) -> str:
        """SHA-256 (hex) of the data section."""
        return self._ended(self._data_sha256)

    @property
    def content(self) -> str:
        """See :meth:`Header.content`."""
        return self.header.content(self.data_sha256)

    @staticmethod
    def _ended(digest: str | None) -> str:
        if digest is None:
            raise RuntimeError("the digests are known when the stream has been read to its end")
        return digest


def stream(path: Path) -> Stream:
    """Iterate over (key, bytes) in file order, one tensor in memory at a time.

    Raises NotAnAdapter as :func:`load` does, during the iteration too.
    """
    return Stream(path)


def fetch_from(path: Path, header: Header) -> Callable[[str], memoryview]:
    """A function that reads the bytes of one tensor by position.

    The file is opened at each call: nothing stays open between two modules. It raises NotAnAdapter,
    ``changing`` where the file is no longer the one whose header was read.
    """

    def fetch(key: str) -> memoryview:
        info = header.tensors[key]
        with _again(path, header, info.begin, info.end) as opened:
            view = memoryview(bytearray(info.end - info.begin))
            opened.fill(view)
            opened.settle()
            return view

    return fetch


def pieces(path: Path, header: Header, begin: int, end: int) -> Iterator[memoryview]:
    """The bytes from ``begin`` to ``end`` of the data section, a CHUNK at a time.

    Each piece is valid until the next. Raises NotAnAdapter as :func:`fetch_from` does.
    """
    view = memoryview(bytearray(min(CHUNK, end - begin)))
    with _again(path, header, begin, end) as opened:
        for at in range(begin, end, CHUNK):
            piece = view[: end - at]
            opened.fill(piece)
            yield piece
        opened.settle()


def _again(path: Path, header: Header, begin: int, end: int) -> Opened:
    """The file whose header was read, opened again, for bytes of its data section."""
    opened = Opened(path, header.data_start + end)
    state = header.size, header.mtime_ns
    try:
        if state not in ((opened.size, opened.before.st_mtime_ns), (opened.size, None)):
            raise opened.changed()
        opened.seek(header.data_start + begin)
    except NotAnAdapter:
        opened.file.close()
        raise
    return opened
