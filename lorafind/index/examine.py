"""One file → everything that the index keeps of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lorafind.files import safetensors, sidecars
from lorafind.files.outcome import NotAnAdapter, one_line
from lorafind.files.place import folder_of, is_remote
from lorafind.files.safetensors import STREAM_ABOVE
from lorafind.files.scan import Found, probe
from lorafind.files.sniff import is_pickled
from lorafind.files.tensors import DTYPES
from lorafind.formats.adapter import ModulePlan
from lorafind.formats.delta import Delta
from lorafind.formats.groups import GROUPS
from lorafind.formats.read import Reading, read
from lorafind.index.rows import Module, StoredSignature
from lorafind.signatures.constants import IDENTITY, SIGNATURE_VERSION, TOO_LARGE
from lorafind.signatures.features import Signature, signature
from lorafind.signatures.sketch import Sketcher

#: Bytes of factors that wait before they are sketched together.
_BATCH = 64 * 2**20


@dataclass(frozen=True)
class Lora:
    """The content of a file as the index stores it. norms: ‖ΔW_m‖² in the order of modules.

    modules, identity and signature are None for a content that the index holds already.
    """

    content: str
    data_sha256: str
    architecture: str
    family: str
    spelling: str
    ranks: dict[str, int]
    alphas: dict[str, int]
    dtype: str
    effective_dtype: str
    facts: dict[str, Any]
    notes: list[str]
    unknown_keys: list[str]
    extras: dict[str, str]
    modules: list[Module] | None = None
    norms: np.ndarray | None = None
    identity: np.ndarray | None = None
    signature: StoredSignature | None = None


@dataclass(frozen=True)
class Examined:
    """What one reading gave. outcome and reason as in :class:`Reading`."""

    found: Found
    links: tuple[Found, ...]
    outcome: str
    reason: str
    sha256: str | None
    probe: bytes | None
    read_ns: int
    lora: Lora | None


def examine(
    found: Found,
    links: tuple[Found, ...],
    *,
    device: torch.device,
    allow_pickle: bool,
    buffer: bytearray,
    gate: AbstractContextManager[Any],
    is_known: Callable[[str], bool],
    linear: bool = False,
) -> Examined:
    """Read a file and sketch what it holds; never raises for bad input.

    gate: held during the arithmetic, never while a file is waited for. is_known: content → True
    where the index holds its signature, which is then not made again. linear: the signature is of
    ΔW itself instead of style; the index keeps none such.
    """
    path = os.fsdecode(found.full)
    read_ns = time.time_ns()
    sketching = _Sketching(device, gate, linear)
    try:
        mark = probe(found.full)
    except OSError:
        mark = None
    streamed = found.size > STREAM_ABOVE
    lora = None
    try:
        size = found.size if is_remote(path) else None
        reading = read(path, allow_pickle, buffer, sketching.visit if streamed else None, size)
        if reading.outcome == "lora":
            made = _make(path, reading, sketching, streamed, is_known)
            if isinstance(made, Lora):
                lora = made
            else:
                reading = Reading(*made, sha256=reading.sha256)
    except NotAnAdapter as error:
        # A large file is read again for what does not fit the one pass: it may be another by then.
        reading = Reading(error.outcome, error.reason)
    except Exception as error:
        # One file must not keep all others from being indexed, be it by a fault of ours.
        what = one_line(f"{type(error).__name__}: {error}")
        reading = Reading("failed", f"lorafind failed on {os.path.basename(path)}: {what}")
    return Examined(
        found, links, reading.outcome, reading.reason, reading.sha256, mark, read_ns, lora
    )


class _Sketching:
    """A Sketcher that takes the gate for its arithmetic."""

    def __init__(
        self, device: torch.device, gate: AbstractContextManager[Any], linear: bool
    ) -> None:
        self.device = device
        self.sketcher = Sketcher(device, linear)
        self.gate = gate
        self._waiting: list[tuple[Any, Delta]] = []
        self._bytes = 0
        self.scales: list[tuple[str, float]] = []
        self.alphas: list[str] = []
        self.ranks: list[str] = []

    def visit(self, module: ModulePlan, delta: Delta) -> None:
        """Take a module in."""
        if module.alpha is not None and not module.place.vector:
            self.alphas.append(f"{delta.scale * delta.rank:g}")
        elif delta.scale != 1.0:
            self.scales.append((module.name, delta.scale))
        if not module.place.vector:
            self.ranks.append(str(delta.rank))
        self._waiting.append((module.place, delta))
        self._bytes += 4 * delta.rank * sum(delta.shape)
        if self._bytes > _BATCH:
            self.flush()

    def flush(self) -> None:
        """Sketch what has been taken in."""
        with self.gate:
            self.sketcher.add(self._waiting)
        self._waiting, self._bytes = [], 0


def _make(
    path: str,
    reading: Reading,
    sketching: _Sketching,
    streamed: bool,
    is_known: Callable[[str], bool],
) -> Lora | tuple[str, str]:
    adapter = reading.adapter
    assert adapter is not None and reading.content is not None and reading.data_sha256 is not None
    if not streamed:
        for module in adapter.plan.modules:
            sketching.visit(module, module.bind(adapter.fetch))
    content = reading.content
    if sketching.scales:
        # The same tensors mean another ΔW where alpha stands outside of them.
        text = json.dumps([content, sorted(sketching.scales)])
        content = hashlib.sha256(text.encode()).hexdigest()
    facts = _facts(path, reading)
    plan = adapter.plan
    lora = Lora(
        content,
        reading.data_sha256,
        plan.architecture,
        plan.family,
        plan.spelling,
        _histogram(sketching.ranks),
        _histogram(sketching.alphas),
        adapter.dtype,
        adapter.effective_dtype,
        facts,
        list(plan.notes),
        plan.unknown_keys,
        _digests(path, reading, streamed),
    )
    if not streamed and is_known(content):
        return lora
    sketching.flush()
    with sketching.gate:
        made = signature(sketching.sketcher)
    # NaN, of infinity times zero, compares as false.
    large = np.flatnonzero(~(made.norms < TOO_LARGE))
    if large.size:
        bad = made.places[int(large[0])].name
        return "invalid", f"its numbers at {bad} are too large to be weights: it is broken"
    shapes = {m.name: m.shape for m in plan.modules}
    order = sorted(
        (i for i in range(len(made.places)) if made.norms[i] > 0), key=lambda i: made.places[i].name
    )
    if not order:
        return "zero", "its ΔW is zero: it changes nothing (saved before the first step?)"
    modules = [
        Module(p.name, p.group, *shapes[p.name], p.vector, p.late)
        for p in (made.places[i] for i in order)
    ]
    return Lora(
        **{name: getattr(lora, name) for name in list(Lora.__dataclass_fields__)[:13]},
        modules=modules,
        norms=made.norms[order].astype(np.float32),
        identity=_identity(made),
        signature=_stored(made),
    )


def _facts(path: str, reading: Reading) -> dict[str, Any]:
    """Name, trigger words, base model and training facts, as far as anything says them."""
    assert reading.header is not None
    inside = sidecars.facts_from_metadata(reading.header.metadata)
    beside = sidecars.read_sidecars(path, _neighbours(path))
    told = {key: value for key, value in asdict(inside).items() if value}
    told["name"] = sidecars.display_name(path, beside, inside)
    words = dict.fromkeys((*beside.trigger_words, *inside.trigger_words))
    if words:
        told["trigger_words"] = list(words)
    if beside.base_model:
        told["base_model"] = beside.base_model
    told["sidecar"] = {key: value for key, value in asdict(beside).items() if value}
    return told


_listing = threading.Lock()


def _neighbours(path: str) -> set[str]:
    """The names in a file's folder."""
    if not is_remote(path):
        return _names(os.path.dirname(path), time.time() // 2)
    # A listing of a store is a request for every thousand names: one thread asks for all.
    with _listing:
        return _names(folder_of(path), time.time() // 60)


@lru_cache(maxsize=64)
def _names(folder: str, moment: float) -> set[str]:
    """What stands in a folder, listed once for a moment and not for every file in it."""
    try:
        return sidecars.names_in(folder)
    except OSError:
        return set()


def _histogram(values: Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _digests(path: str, reading: Reading, streamed: bool) -> dict[str, str]:
    """SHA-256 over dtype, shape and bytes of every extra; a large file's are never held."""
    assert reading.adapter is not None and reading.header is not None
    plan, header = reading.adapter.plan, reading.header
    found = {}
    for name, key in plan.extras.items():
        info = header.tensors[key]
        if not streamed or is_pickled(path) or info.dtype not in DTYPES:
            tensor = reading.adapter.extra(name).contiguous()
            digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        else:
            start, stop = plan.cuts.get(name, (0, info.shape[0] if info.shape else 1))
            shape = (stop - start, *info.shape[1:]) if info.shape else ()
            row = (info.end - info.begin) // max(1, math.prod(info.shape[:1]))
            digest = hashlib.sha256(f"{DTYPES[info.dtype]}{shape}".encode())
            begin, end = info.begin + start * row, info.begin + stop * row
            for piece in safetensors.pieces(path, header, begin, end):
                digest.update(piece)
        found[name] = digest.hexdigest()
    return found


def _identity(made: Signature) -> np.ndarray:
    """The record of the ``identity`` series (:data:`IDENTITY`)."""
    record = np.zeros((), IDENTITY)
    record["norms"] = made.segment_norms
    record["sketch"] = made.identity.astype(np.float16)
    return record


def _stored(made: Signature) -> StoredSignature:
    groups = [g for g in GROUPS if g in made.style]
    scales = np.array([np.abs(made.style[g]).max() / 127 for g in groups], np.float32)
    style = np.array(
        [np.rint(made.style[g] / s) for g, s in zip(groups, scales, strict=True)], np.int8
    )
    return StoredSignature(
        SIGNATURE_VERSION,
        sum(1 << GROUPS.index(g) for g in groups),
        scales,
        np.array([made.votes[g] for g in groups]),
        style.reshape(len(groups), -1 if groups else 0),
    )


class Buffers:
    """Reusable read buffers and the byte budget that all files in flight share."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._used = 0
        self._free: list[bytearray] = []
        self._changed = threading.Condition()

    def take(self, size: int) -> bytearray:
        """Wait until ``size`` bytes fit (a larger file goes alone), and get a buffer."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._total)
            self._used += size
            return self._free.pop() if self._free else bytearray()

    def give(self, size: int, buffer: bytearray) -> None:
        """Return what :meth:`take` gave."""
        with self._changed:
            self._used -= size
            if sum(map(len, self._free)) + len(buffer) <= self._total // 2:
                self._free.append(buffer)
            self._changed.notify_all()
