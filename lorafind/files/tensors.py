"""Bytes of a file as tensors, and the precision that they really have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import FLOATS, Header, Stored, TensorInfo

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: safetensors name of a torch dtype.
NAMES = {dtype: name for name, dtype in DTYPES.items()}

#: The largest number of float32.
LARGEST = torch.finfo(torch.float32).max

#: What a tensor can be rounded to, the coarsest first.
COARSE = ("F8_E5M2", "F8_E4M3", "BF16", "F16", "F32")


def as_tensor(info: TensorInfo, raw: memoryview | bytearray) -> Tensor:
    """The tensor that the bytes hold, looking into them without a copy.

    Bytes that do not lie on a multiple of the number's size are copied. Raises NotAnAdapter
    (``unsupported``) for a dtype that torch cannot hold (F4, F6, F8_E8M0).
    """
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise NotAnAdapter("unsupported", f"weights stored as {info.dtype} cannot be read yet")
    if not len(raw):
        return torch.empty(info.shape, dtype=dtype)
    flat = torch.frombuffer(raw, dtype=torch.uint8)
    if flat.data_ptr() % dtype.itemsize:
        flat = flat.clone()
    return flat.view(dtype).view(info.shape)


def fetch_stored(stored: Stored) -> Callable[[str], Tensor]:
    """A function that gives a loaded file's tensors by key, without copies."""
    tensors, data = stored.header.tensors, stored.data
    flats: dict[str, tuple[Tensor, int]] = {}

    def flat(dtype: str) -> tuple[Tensor, int]:
        """The whole data section as numbers of one dtype, and their size."""
        kind = DTYPES[dtype]
        found = torch.frombuffer(data, dtype=kind, count=len(data) // kind.itemsize)
        flats[dtype] = found, kind.itemsize
        return flats[dtype]

    def fetch(key: str) -> Tensor:
        info = tensors[key]
        dtype, shape, begin, end = info
        if dtype not in DTYPES or begin == end:
            return as_tensor(info, data[begin:end])
        whole, size = flats.get(dtype) or flat(dtype)
        if begin % size:
            return as_tensor(info, data[begin:end])
        # The data section begins on a machine word, so the offset alone tells the alignment.
        return whole[begin // size : end // size].view(shape)

    return fetch


def runs(header: Header, data: memoryview, keys: Iterable[str]) -> list[Tensor]:
    """The floating-point tensors of ``keys`` as few flat tensors: neighbours of one dtype together.

    A check of every number of a file then costs a handful of calls.
    """
    spans: list[tuple[str, int, int]] = []
    for info in sorted((header.tensors[key] for key in keys), key=lambda i: (i.begin, i.end)):
        if info.dtype not in FLOATS or info.begin == info.end:
            continue
        if spans and spans[-1][0] == info.dtype and spans[-1][2] == info.begin:
            spans[-1] = (info.dtype, spans[-1][1], info.end)
        else:
            spans.append((info.dtype, info.begin, info.end))
    return [
        as_tensor(TensorInfo(dtype, (_count(dtype, end - begin),), begin, end), data[begin:end])
        for dtype, begin, end in spans
    ]


def _count(dtype: str, length: int) -> int:
    return length // DTYPES[dtype].itemsize


def all_finite(t: Tensor) -> bool:
    """True where no number is NaN, infinite, or beyond float32, in which signatures are made."""
    if not t.numel():
        return True
    # NaN passes through both, an infinity is one of them.
    low, high = torch.aminmax(t.to(torch.float32) if t.dtype.itemsize == 1 else t)
    return low.item() >= -LARGEST and high.item() <= LARGEST


def round_trips(t: Tensor, dtype: torch.dtype) -> bool:
    """True where every number of ``t`` comes back bit for bit from ``dtype``."""
    return bool(torch.equal(_bits(t.to(dtype).to(t.dtype)), _bits(t)))


def _bits(t: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(kinds[t.dtype.itemsize])


def effective_dtype(tensors: Sequence[Tensor], dtype: str) -> str:
    """The coarsest of :data:`COARSE` through which all tensors pass bit for bit, else ``dtype``.

    tensors: the weights, without alpha; dtype: what they are stored as (safetensors name). A sample
    of a few thousand numbers goes first, so that the common 'no' costs next to nothing.
    """
    step = max(1, len(tensors) // 16)
    samples = [piece for t in tensors[::step] for piece in _sample(t.reshape(-1))]
    for name in COARSE:
        target = DTYPES[name]
        if name == dtype:
            break
        if target.itemsize > DTYPES[dtype].itemsize:
            continue
        if all(round_trips(t, target) for t in samples) and all(
            round_trips(t, target) for t in tensors
        ):
            return name
    return dtype


def _sample(t: Tensor, count: int = 256) -> Iterable[Tensor]:
    """A few pieces of a flat tensor from its whole length."""
    if t.numel() <= 4 * count:
        return [t]
    return [t[start : start + count] for start in range(0, t.numel() - count, t.numel() // 4)]
