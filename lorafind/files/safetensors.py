"""safetensors files: the header checked before a tensor is touched, the data read in one pass.

Layout (huggingface/safetensors README): 8 bytes N, little-endian; N bytes of JSON, name →
``{"dtype", "shape", "data_offsets": [begin, end]}`` and ``__metadata__`` (texts by name); then
the data section, which the tensors cover exactly. Offsets count from its start.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import PurePath
from typing import Any, NamedTuple, NoReturn

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.sniff import SAMPLE, sniff

#: The longest header that is read, as in the reference implementation.
MAX_HEADER = 100_000_000
#: Files above this many bytes are read tensor by tensor.
STREAM_ABOVE = 256 * 2**20
#: Bytes per read: still in the cache when the two digests pass over them.
CHUNK = 2**20

#: Bits of one number of every dtype that the format knows.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

#: Dtypes in which weights can be read.
FLOATS = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)

Path = str | os.PathLike[str]


class TensorInfo(NamedTuple):
    """One tensor as the header describes it; begin and end are offsets in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. tensors are in the order of their bytes."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int

    @cached_property
    def names_digest(self) -> str:
        """SHA-256 (hex) of the JSON array of [name, dtype, shape, begin, end] in byte order."""
        rows = [(name, *info) for name, info in self.tensors.items()]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def content(self, data_sha256: str) -> str:
        """What identifies the tensors: SHA-256 (hex) of data digest and names digest, as text."""
        return hashlib.sha256((data_sha256 + self.names_digest).encode()).hexdigest()


def parse_header(head: bytes | bytearray | memoryview, size: int, path: Path = "it") -> Header:
    """Check a header. ``head`` begins at the file's first byte and holds at least the header.

    Raises NotAnAdapter: ``unreadable`` where the format is broken, ``empty`` where there is no
    tensor, or what the file is instead (``lfs-pointer``, ``html``, ``json``, ``text``, ``pickle``).
    """
    length = header_length(head, size, path)
    if len(head) < 8 + length:
        raise ValueError(f"head has {len(head)} bytes, the header needs {8 + length}")
    fail = _Refusal(head, size, path)
    try:
        text = str(memoryview(head)[8 : 8 + length], "utf-8")
    except UnicodeDecodeError:
        fail("its header is not UTF-8")
    try:
        found = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_number,
            parse_float=_no_number,
        )
    except _Duplicate as error:
        fail(f"its header has the name {error.args[0]!r} twice")
    except (ValueError, RecursionError):
        fail("its header is not JSON")
    if type(found) is not dict:
        fail("its header is no JSON object")
    metadata = found.pop("__metadata__", None) or {}
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        fail("its metadata is not a list of texts")
    if "\\u" in text and not _encodes([*found, *metadata, *metadata.values()]):
        fail("its header is not UTF-8")
    tensors = _tensors(found, size - 8 - length, fail)
    if not tensors:
        raise NotAnAdapter("empty", f"{fail.name} is a valid file with no tensor in it")
    return Header(tensors, metadata, 8 + length, size)


def header_length(head: bytes | bytearray | memoryview, size: int, path: Path = "it") -> int:
    """The header's length N from the first 8 bytes, within the file and :data:`MAX_HEADER`."""
    fail = _Refusal(head, size, path)
    if size == 0:
        fail("it has no bytes")
    if size < 8:
        fail("it is shorter than the 8 bytes that begin every safetensors file")
    length = int.from_bytes(head[:8], "little")
    if length > MAX_HEADER:
        fail(f"it claims a header of {length:,} bytes, the limit is {MAX_HEADER:,}")
    if length > size - 8:
        fail("its header is longer than the file: an interrupted download?")
    return length


def _tensors(found: dict[str, Any], available: int, fail: _Refusal) -> dict[str, TensorInfo]:
    tensors = []
    # The layers of a network repeat: every shape is checked once.
    lengths: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, entry in found.items():
        try:
            dtype, shape, (begin, end) = (
                entry["dtype"],
                tuple(entry["shape"]),
                entry["data_offsets"],
            )
            length = lengths.get((dtype, shape))
            if length is None:
                length = lengths[dtype, shape] = _length(dtype, shape)
            backwards = not 0 <= begin <= end
        except _Impossible as error:
            fail(f"the tensor {name!r} {error}")
        except (TypeError, KeyError, ValueError):
            fail(f"the tensor {name!r} is not described as the format asks")
        if backwards:
            fail(f"the tensor {name!r} ends before it begins")
        if length != end - begin:
            fail(f"the tensor {name!r} has a shape that disagrees with its number of bytes")
        tensors.append((begin, end, name, TensorInfo(dtype, shape, begin, end)))
    tensors.sort(key=itemgetter(0, 1, 2))
    position = 0
    for begin, end, name, _ in tensors:
        if begin != position:
            kind = "shares bytes with another" if begin < position else "leaves a hole before it"
            fail(f"the tensor {name!r} {kind}")
        position = end
    if position > available:
        missing = position - available
        fail(f"its last {missing:,} bytes are missing: an interrupted download; download it again")
    if tensors and position < available:
        fail(f"it has {available - position:,} bytes after the last tensor")
    return {name: info for _, _, name, info in tensors}


class _Impossible(ValueError):
    pass


def _length(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises _Impossible for what no tensor can be."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise _Impossible(f"has the unknown dtype {dtype!r}")
    if any(type(n) is not int or n < 0 for n in shape):
        raise _Impossible("has an impossible shape")
    if math.prod(filter(None, shape)) >= 2**63:
        raise _Impossible("has a shape beyond 64 bits, which disagrees with its number of bytes")
    whole, rest = divmod(math.prod(shape) * bits, 8)
    if rest:
        raise _Impossible("ends inside a byte")
    return whole


class _Duplicate(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(k for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} stands in no header")


def _encodes(texts: list[str]) -> bool:
    """False where a text holds half a surrogate pair, which no UTF-8 can."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Refusal:
    """Raises ``unreadable``, or what the file is instead where its first bytes tell."""

    head: bytes | bytearray | memoryview
    size: int
    path: Path

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    def __call__(self, why: str) -> NoReturn:
        other = sniff(bytes(self.head[:SAMPLE]), self.size, self.path)
        raise other or NotAnAdapter("unreadable", f"{self.name} is no safetensors file: {why}")


# ---------------------------------------------------------------------------- reading


class Opened:
    """A regular file opened for reading, with the state that it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A FIFO would block here for ever without O_NONBLOCK.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise NotAnAdapter("not-a-file", f"{self.name} is not a regular file")
            self.file = open(os.open(path, flags), "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self.refused(error) from error
        self.before = os.fstat(self.file.fileno())
        self.size = self.before.st_size

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    @property
    def name(self) -> str:
        return PurePath(os.fspath(self.path)).name

    def refused(self, error: OSError) -> NotAnAdapter:
        """What an operating system's error says of the file."""
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return NotAnAdapter("vanished", f"{self.name} is no longer there")
        why = error.strerror or str(error)
        return NotAnAdapter("inaccessible", f"{self.name} cannot be read: {why}")

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

    def head(self) -> tuple[bytearray, Header]:
        """The bytes up to the data section, and the header in them."""
        head = bytearray(min(SAMPLE, self.size))
        self.fill(memoryview(head))
        start = 8 + header_length(head, self.size, self.path)
        rest = bytearray(max(0, start - len(head)))
        self.fill(memoryview(rest))
        head += rest
        header = parse_header(head, self.size, self.path)
        self.file.seek(start)
        return head[:start], header

    def settle(self) -> None:
        """Raise ``changing`` where the file is not as it was when it was opened."""
        after = os.fstat(self.file.fileno())
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
        with Opened(self.path) as opened:
            head, header = opened.head()
            if header != self.header:
                raise opened.changed()
            whole, data = hashlib.sha256(head), hashlib.sha256()
            for key, info in header.tensors.items():
                view = memoryview(bytearray(info.end - info.begin))
                for begin in range(0, len(view), CHUNK):
                    piece = view[begin : begin + CHUNK]
                    opened.fill(piece)
                    whole.update(piece)
                    data.update(piece)
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
    ``changing`` where the file no longer has the header's length.
    """

    def fetch(key: str) -> memoryview:
        info = header.tensors[key]
        with Opened(path) as opened:
            if opened.size != header.size:
                raise opened.changed()
            opened.file.seek(header.data_start + info.begin)
            view = memoryview(bytearray(info.end - info.begin))
            opened.fill(view)
            opened.settle()
            return view

    return fetch
