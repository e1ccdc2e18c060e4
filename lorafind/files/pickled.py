"""PyTorch files (``.pt``, ``.bin``, ``.ckpt``, ``.pth``): only when asked, and never executed."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from lorafind.files.hashes import WRITTEN
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import (
    CHUNK,
    STREAM_ABOVE,
    Header,
    Opened,
    Path,
    TensorInfo,
)
from lorafind.files.sniff import SAMPLE, sniff
from lorafind.files.tensors import NAMES

#: Keys under which whole trainings keep the weights.
CONTAINERS = ("state_dict", "model_state_dict", "model", "weights", "lora")


@dataclass(frozen=True)
class Pickled:
    """The tensors of a PyTorch file.

    header and data_sha256 are those that the safetensors writer would give the same tensors, so
    that a converted file has the same content. Keys of nested dictionaries are joined with dots,
    a bare list's tensors are called ``0``, ``1``, …
    """

    header: Header
    tensors: dict[str, Tensor]
    sha256: str
    data_sha256: str

    @property
    def content(self) -> str:
        """See :meth:`Header.content`."""
        return self.header.content(self.data_sha256)


def load(path: Path, allow_pickle: bool = False) -> Pickled:
    """Read a PyTorch file with ``torch.load(weights_only=True)``.

    Raises NotAnAdapter: ``pickle`` where it is not allowed, or asks for more than tensors;
    ``empty``, ``unreadable``, or what the file is instead.
    """
    name = PurePath(path).name
    with Opened(path) as opened:
        sample = bytearray(min(SAMPLE, opened.size))
        opened.fill(memoryview(sample))
        other = sniff(bytes(sample), opened.size, path)
        if other is not None and other.outcome in ("lfs-pointer", "html", "json", "text"):
            raise other
        if not opened.size:
            raise NotAnAdapter("unreadable", f"{name} has no bytes")
        if not allow_pickle:
            raise NotAnAdapter(
                "pickle", f"{name} is a PyTorch file: it needs --allow-pickle to be read"
            )
        opened.file.seek(0)
        if opened.size > STREAM_ABOVE:
            digest = hashlib.sha256()
            while piece := opened.file.read(CHUNK):
                digest.update(piece)
            found = _unpickle(path, name, mmap=True)
        else:
            data = bytearray(opened.size)
            opened.fill(memoryview(data))
            digest = hashlib.sha256(data)
            found = _unpickle(io.BytesIO(data), name, mmap=False)
        opened.settle()
    tensors = _flat(found)
    if not tensors:
        raise NotAnAdapter("empty", f"{name} holds no tensor")
    header, data_sha256 = _as_written(tensors, opened.size)
    ordered = {key: tensors[key] for key in header.tensors}
    return Pickled(header, ordered, digest.hexdigest(), data_sha256)


def _unpickle(source: Any, name: str, mmap: bool) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise NotAnAdapter(
            "pickle", f"{name} is refused: its pickle asks for more than tensors{what}"
        ) from error
    except Exception as error:
        # A broken pickle can raise anything.
        first = (str(error).splitlines() or [""])[0]
        raise NotAnAdapter(
            "unreadable", f"{name} is no whole PyTorch file: {type(error).__name__}: {first}"
        ) from error


def _flat(found: object) -> dict[str, Tensor]:
    if isinstance(found, Tensor):
        return {"0": _plain(found)}
    if isinstance(found, list | tuple):
        return {str(i): _plain(t) for i, t in enumerate(found) if isinstance(t, Tensor)}
    if not isinstance(found, Mapping):
        return {}
    for key in CONTAINERS:
        inner = found.get(key)
        if isinstance(inner, Mapping) and any(isinstance(t, Tensor) for t in inner.values()):
            found = inner
            break
    tensors: dict[str, Tensor] = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            tensors[str(key)] = _plain(value)
        elif isinstance(value, Mapping | list | tuple):
            tensors |= {f"{key}.{inner}": t for inner, t in _flat(value).items()}
    return tensors


def _plain(t: Tensor) -> Tensor:
    if t.layout != torch.strided or t.is_quantized or t.dtype not in NAMES:
        kind = "quantised" if t.is_quantized else f"{t.layout}, {t.dtype}"
        raise NotAnAdapter("unsupported", f"a tensor in it is stored as {kind}, which is not read")
    return t.detach().resolve_conj().contiguous()


def _as_written(tensors: Mapping[str, Tensor], size: int) -> tuple[Header, str]:
    order = sorted(tensors, key=lambda key: (-WRITTEN.index(NAMES[tensors[key].dtype]), key))
    infos: dict[str, TensorInfo] = {}
    digest = hashlib.sha256()
    position = 0
    for key in order:
        t = tensors[key]
        end = position + t.numel() * t.dtype.itemsize
        infos[key] = TensorInfo(NAMES[t.dtype], tuple(t.shape), position, end)
        if t.numel():
            digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
        position = end
    return Header(infos, {}, 0, size), digest.hexdigest()
