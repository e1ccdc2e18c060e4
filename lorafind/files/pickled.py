"""PyTorch files (``.pt``, ``.bin``, ``.ckpt``, ``.pth``): only when asked, and never executed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor

from lorafind.files.hashes import WRITTEN
from lorafind.files.header import MAX_NAME
from lorafind.files.outcome import NotAnAdapter, shown
from lorafind.files.place import is_remote, state
from lorafind.files.safetensors import (
    CHUNK,
    STREAM_ABOVE,
    Header,
    Opened,
    Path,
    TensorInfo,
    refused,
)
from lorafind.files.sniff import SAMPLE, sniff
from lorafind.files.tensors import NAMES

#: Keys under which whole trainings keep the weights.
CONTAINERS = ("state_dict", "model_state_dict", "model", "weights", "lora")
#: The most dictionaries in one another, and the most tensors.
DEPTH, MAX_TENSORS = 16, 200_000


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
    if is_remote(path) and allow_pickle and state(path).st_size > STREAM_ABOVE:
        # PyTorch maps a large file into memory, which an object in a store cannot be.
        from lorafind.files.spool import copy_of

        try:
            copy = copy_of(os.fspath(path))
        except OSError as error:
            raise refused(path, error) from error
        return load(copy.path, allow_pickle)
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
        opened.seek(0)
        if opened.size > STREAM_ABOVE:
            digest = hashlib.sha256()
            piece = memoryview(bytearray(CHUNK))
            for begin in range(0, opened.size, CHUNK):
                part = piece[: opened.size - begin]
                opened.fill(part)
                digest.update(part)
            _check_archive(path, name, opened.size)
            found = _unpickle(path, name, mmap=True)
        else:
            data = io.BytesIO(bytes(opened.size))
            with data.getbuffer() as view:
                opened.fill(view)
                digest = hashlib.sha256(view)
            _check_archive(data, name, opened.size)
            data.seek(0)
            found = _unpickle(data, name, mmap=False)
        opened.settle()
    collector = _Collector(name, 4 * opened.size + 2**20)
    collector.take(_weights(found))
    tensors = collector.tensors
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
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise NotAnAdapter("unreadable", f"{name} is no whole PyTorch file: {first}") from error


@dataclass
class _Collector:
    """The tensors of what a pickle made, by name.

    A pickle of a few bytes can name one tensor a million times, spread one number over any shape,
    or hold itself: ``room`` is what the file can honestly hold, in bytes.
    """

    name: str
    room: int
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, found: object, prefix: str = "", depth: int = 0) -> None:
        """Enter a tensor, or all that a list or dictionary holds."""
        if isinstance(found, Tensor):
            self._enter(prefix or "0", found)
        elif isinstance(found, list | tuple):
            for i, t in enumerate(found):
                if isinstance(t, Tensor):
                    self._enter(f"{prefix}.{i}" if prefix else str(i), t)
        elif isinstance(found, Mapping):
            if depth > DEPTH:
                raise self._refused("its dictionaries are nested too deeply")
            for key, value in found.items():
                if isinstance(value, Tensor | Mapping | list | tuple):
                    if not isinstance(key, str | int) or len(str(key)) > MAX_NAME:
                        raise self._refused("the name of a tensor is no short text")
                    self.take(value, f"{prefix}.{key}" if prefix else str(key), depth + 1)

    def _enter(self, key: str, t: Tensor) -> None:
        if key in self.tensors:
            raise self._refused(f"it has the name {shown(key)} twice")
        try:
            key.encode()
        except UnicodeEncodeError as error:
            raise self._refused(f"the name {shown(key)} is no text") from error
        plain = t.layout == torch.strided and not (t.is_quantized or t.is_nested)
        if not plain or t.dtype not in NAMES or t.device.type != "cpu":
            kind = "quantised" if t.is_quantized else f"{t.layout}, {t.dtype}, {t.device.type}"
            raise self._refused(f"the tensor {shown(key)} is stored as {kind}, which is not read")
        self.room -= t.numel() * t.dtype.itemsize
        if self.room < 0 or len(self.tensors) >= MAX_TENSORS:
            raise self._refused("its tensors are larger together than the file")
        self.tensors[key] = t.detach().resolve_conj().resolve_neg().contiguous()

    def _refused(self, why: str) -> NotAnAdapter:
        return NotAnAdapter("unsupported", f"{self.name} is not read: {why}")


def _weights(found: object) -> object:
    """The part of a whole training that holds the weights."""
    if not isinstance(found, Mapping):
        return found
    for key in CONTAINERS:
        inner = found.get(key)
        if isinstance(inner, Mapping) and any(isinstance(t, Tensor) for t in inner.values()):
            return inner
    return found


def _check_archive(source: Path | io.BytesIO, name: str, size: int) -> None:
    """Raise for an archive that unpacks to more than its size: PyTorch compresses nothing."""
    try:
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        # PyTorch's older format is no archive, and of a broken one torch says what is wrong.
        unpacked = 0
    if unpacked > size:
        why = f"it unpacks to {unpacked:,} bytes, more than it has"
        raise NotAnAdapter("unsupported", f"{name} is not read: {why}")


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
