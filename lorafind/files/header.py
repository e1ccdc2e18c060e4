"""The header of a safetensors file, checked before a tensor is touched.

Layout (huggingface/safetensors README): 8 bytes N, little-endian; N bytes of JSON, name →
``{"dtype", "shape", "data_offsets": [begin, end]}`` and ``__metadata__`` (texts by name); then
the data section, which the tensors cover exactly. Offsets count from its start.

A header may be made to be large where it is parsed and small where it is stored: what it lists is
counted before anything is built of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import PurePath
from typing import Any, NamedTuple, NoReturn

from lorafind.files.outcome import NotAnAdapter, shown
from lorafind.files.sniff import SAMPLE, sniff

#: The longest header that is read, as in the reference implementation.
MAX_HEADER = 100_000_000
#: The most lists, objects and commas in a header, and the most bytes of it as text in memory. The
#: adapter of a language model with 128 experts in 94 layers has 600,000 of the former.
MAX_PARTS, MAX_TEXT = 1_500_000, 256 * 2**20
#: The longest name of a tensor, in characters.
MAX_NAME = 4096
#: The most dimensions of a tensor, as in numpy and torch.
MAX_DIMENSIONS = 64

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
#: Dtypes that torch has tensors of.
READABLE = DTYPE_BITS.keys() - {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}

Path = str | os.PathLike[str]


class TensorInfo(NamedTuple):
    """One tensor as the header describes it; begin and end are offsets in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """A checked header. tensors are in the order of their bytes.

    data_start: of the data section in the file; size: of the file; mtime_ns: when the file was last
    changed, None where the header is not of a file on a disk.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    data_start: int
    size: int
    mtime_ns: int | None = None

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
    tensor, ``unsupported`` where it lists more than any adapter needs, or what the file is instead
    (``lfs-pointer``, ``html``, ``json``, ``text``, ``pickle``).
    """
    length = header_length(head, size, path)
    if len(head) < 8 + length:
        raise ValueError(f"head has {len(head)} bytes, the header needs {8 + length}")
    fail = _Refusal(head, size, path)
    if _parts(head, length) > MAX_PARTS:
        why = f"its header lists more than {MAX_PARTS:,} things, which no adapter needs"
        fail(why, "unsupported")
    try:
        text = str(memoryview(head)[8 : 8 + length], "utf-8")
    except UnicodeDecodeError:
        fail("its header is not UTF-8")
    if sys.getsizeof(text) > MAX_TEXT:
        fail(f"the texts in its header need more than {MAX_TEXT:,} bytes", "unsupported")
    try:
        found = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_no_number,
            parse_float=_no_number,
        )
    except _Duplicate as error:
        fail(f"its header has the name {shown(error.args[0])} twice")
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


_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def _parts(head: bytes | bytearray | memoryview, length: int) -> int:
    """How many lists, objects and commas the JSON has, at most, and at most a few too many.

    Each is an object in memory of up to a hundred bytes. Those inside of texts are counted too,
    unless there are so many that they decide.
    """
    if length <= MAX_PARTS:
        return length
    data = bytes(head) if isinstance(head, memoryview) else head

    def count(begin: int, end: int) -> int:
        return sum(data.count(part, begin, end) for part in (b"[", b"{", b","))

    stop = 8 + length
    total = count(8, stop)
    if total <= MAX_PARTS:
        return total
    total, position = 0, 8
    for text in _STRING.finditer(data, 8, stop):
        begin, end = text.span()
        # Between most texts stands one character, and a colon does not matter.
        total += 1 if begin - position < 2 else count(position, begin)
        position = end
        if total > MAX_PARTS:
            return total
    return total + count(position, stop)


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
            if type(begin) is not int or type(end) is not int:
                raise _Impossible("has offsets that are no numbers")
        except _Impossible as error:
            fail(f"the tensor {shown(name)} {error}")
        except (TypeError, KeyError, ValueError):
            fail(f"the tensor {shown(name)} is not described as the format asks")
        if backwards:
            fail(f"the tensor {shown(name)} ends before it begins")
        if length != end - begin:
            fail(f"the tensor {shown(name)} has a shape that disagrees with its number of bytes")
        if len(name) > MAX_NAME:
            fail(f"the tensor {shown(name)} has a name of {len(name):,} characters", "unsupported")
        tensors.append((begin, end, name, TensorInfo(dtype, shape, begin, end)))
    tensors.sort(key=itemgetter(0, 1, 2))
    position = 0
    for begin, end, name, _ in tensors:
        if begin != position:
            kind = "shares bytes with another" if begin < position else "leaves a hole before it"
            fail(f"the tensor {shown(name)} {kind}")
        position = end
    if position > available:
        missing = position - available
        fail(f"its last {missing:,} bytes are missing: an interrupted download; download it again")
    if position < available:
        fail(f"it has {available - position:,} bytes after the last tensor")
    return {name: info for _, _, name, info in tensors}


class _Impossible(ValueError):
    pass


def _length(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises _Impossible for what no tensor can be."""
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise _Impossible(f"has the unknown dtype {shown(dtype)}")
    if any(type(n) is not int or n < 0 for n in shape):
        raise _Impossible("has an impossible shape")
    if len(shape) > MAX_DIMENSIONS:
        raise _Impossible(f"has {len(shape):,} dimensions")
    # A number of thousands of digits is compared in no time, and multiplied in hours.
    if max(shape, default=0) >= 2**63 or math.prod(filter(None, shape)) >= 2**63:
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


def _encodes(texts: Iterable[str]) -> bool:
    """False where a text holds half a surrogate pair, which no UTF-8 can."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Refusal:
    """Raises the outcome, or what the file is instead where its first bytes tell."""

    head: bytes | bytearray | memoryview
    size: int
    path: Path

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    def __call__(self, why: str, outcome: str = "unreadable") -> NoReturn:
        if outcome != "unreadable":
            raise NotAnAdapter(outcome, f"{self.name} is not read: {why}")
        other = sniff(bytes(self.head[:SAMPLE]), self.size, self.path)
        raise other or NotAnAdapter(outcome, f"{self.name} is no safetensors file: {why}")
