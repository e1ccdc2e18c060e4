"""θ, the paper's feature: the factors A and B of all layers as they are stored, end to end.

Order: by group, within it by canonical module name, A (down, r × n) before B (up, o × r), row by
row. Alpha does not enter: the paper's set-up has one for all. θ is a function of how ΔW is
factored, so it compares only LoRAs of one rank and one layout, started from one initialisation.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from lorafind.bases.problem import BasisProblem
from lorafind.features.matrix import Matrix
from lorafind.features.sources import Refusal, Source, told
from lorafind.files import sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import DTYPE_BITS, Header, Opened, TensorInfo, read_header
from lorafind.files.sniff import is_pickled
from lorafind.files.tensors import as_tensor
from lorafind.formats.adapter import ModulePlan
from lorafind.formats.groups import GROUPS
from lorafind.formats.plan import plan_of


class Entry(NamedTuple):
    """One module of a frame: A is rank × n, B is o × rank."""

    name: str
    group: str
    o: int
    n: int
    rank: int

    @property
    def size(self) -> int:
        """Numbers in A and B."""
        return self.rank * (self.o + self.n)


@dataclass(frozen=True)
class Frame:
    """Which modules stand where in a vector of factors; entries in its order."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Frame:
        """The frame of some modules, in order."""
        return cls(tuple(sorted(entries, key=lambda e: (GROUPS.index(e.group), e.name))))

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[Any]]) -> Frame:
        """Inverse of :meth:`to_json`."""
        return cls(tuple(Entry(*row) for row in rows))

    def to_json(self) -> list[list[Any]]:
        """Plain values."""
        return [list(entry) for entry in self.entries]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) that names the frame."""
        return hashlib.sha256(json.dumps(self.to_json()).encode()).hexdigest()

    @property
    def rank(self) -> int:
        """The highest rank."""
        return max(entry.rank for entry in self.entries)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that it has, in order."""
        return tuple(dict.fromkeys(entry.group for entry in self.entries))

    def width(self, group: str) -> int:
        """d_g."""
        return sum(entry.size for entry in self.of_group(group))

    def of_group(self, group: str) -> list[Entry]:
        """The entries of a group."""
        return [entry for entry in self.entries if entry.group == group]

    def touched(self, group: str, tile: slice) -> Iterator[tuple[Entry, int, slice]]:
        """The modules with numbers in some columns of a group.

        Yields (entry, where in the tile its first number of these stands, which of its numbers).
        """
        own = self.of_group(group)
        for entry, start in zip(own, accumulate((e.size for e in own), initial=0), strict=False):
            first, last = max(tile.start, start), min(tile.stop, start + entry.size)
            if first < last:
                yield entry, first - tile.start, slice(first - start, last - start)


class _Factor(NamedTuple):
    """A stored factor: dtype (safetensors name) and where in the data section it begins."""

    dtype: str
    begin: int


@dataclass(frozen=True)
class _File:
    """Where a source keeps its factors: module name → (its own shape, A, B)."""

    source: Source
    data_start: int
    factors: Mapping[str, tuple[Entry, _Factor, _Factor]]


def open_theta(
    sources: Sequence[Source],
    groups: Sequence[str],
    *,
    frame: Frame | None = None,
    pad: bool = False,
) -> tuple[Theta, list[Source], list[Refusal]]:
    """θ of the modules in some groups: the matrix, the sources in it, and those that are not.

    frame: what the vectors must look like; a source that differs is left out with a sentence. pad:
    modules that are missing and ranks up to the highest are filled with zeros instead (a rival for
    evaluations: it is no feature to rely on). With neither the first source that differs from most
    is a BasisProblem.
    """
    files, problems = [], []
    shared: dict[str, Mapping[str, tuple[Entry, _Factor, _Factor]]] = {}
    for source in sources:
        try:
            files.append(_locate(source, groups, shared))
        except _Unfit as error:
            problems.append((source.path, str(error)))
    if problems and not pad and frame is None:
        raise BasisProblem(problems[0][1])
    if pad:
        frame = _padded(files)
    elif frame is None:
        frame = _common(files)
    else:
        fitting = []
        for file in files:
            why = _difference(file, frame)
            if why:
                problems.append((file.source.path, f"{file.source.name} {why}"))
            else:
                fitting.append(file)
        files = fitting
    return Theta(files, frame, pad), [file.source for file in files], problems


class _Unfit(Exception):
    """A source has no θ; says why."""


def _locate(
    source: Source,
    groups: Sequence[str],
    shared: dict[str, Mapping[str, tuple[Entry, _Factor, _Factor]]],
) -> _File:
    if is_pickled(source.path):
        raise _Unfit(f"{source.name} is a PyTorch file: θ is read piece by piece from safetensors")
    with told(source):
        header = read_header(source.path)
    factors = shared.get(header.names_digest)
    if factors is None:
        with told(source):
            plan = plan_of(header, sidecars.adapter_config(source.path))
        found = {}
        for module in plan.modules:
            if module.place.group in groups and not module.place.vector:
                found[module.name] = _plain(source, header, module)
        factors = shared[header.names_digest] = found
    return _File(source, header.data_start, factors)


def _plain(source: Source, header: Header, module: ModulePlan) -> tuple[Entry, _Factor, _Factor]:
    """A and B of a module; raises _Unfit where it is not written as such."""
    keys = [key for key in module.keys if key != module.alpha]
    infos = [header.tensors[key] for key in keys]
    (o, n), rank = module.shape, module.rank
    if (
        module.family != "lora"
        or len(infos) != 2
        or infos[0].shape[0] != o
        or infos[1].shape[0] != rank
        or _numbers(infos[0]) != o * rank
        or _numbers(infos[1]) != rank * n
    ):
        written = module.family if module.family != "lora" else "more than A and B"
        raise _Unfit(f"{source.name} writes {module.name} as {written}: θ is made of A and B alone")
    up, down = (_Factor(info.dtype, info.begin) for info in infos)
    return Entry(module.name, module.place.group, o, n, rank), down, up


def _numbers(info: TensorInfo) -> int:
    return (info.end - info.begin) * 8 // DTYPE_BITS[info.dtype]


def _padded(files: Sequence[_File]) -> Frame:
    """Every module that any file has, at the highest rank that it has anywhere."""
    found: dict[tuple[str, int, int], Entry] = {}
    for factors in {id(file.factors): file.factors for file in files}.values():
        for entry, _, _ in factors.values():
            key = entry.name, entry.o, entry.n
            if key not in found or found[key].rank < entry.rank:
                found[key] = entry
    return Frame.of(list(found.values()))


def _common(files: Sequence[_File]) -> Frame:
    """The frame of most files; raises BasisProblem with what another file has instead."""
    frames = {id(f.factors): Frame.of([e for e, _, _ in f.factors.values()]) for f in files}
    counts = Counter(frames[id(file.factors)] for file in files)
    frame = max(counts, key=lambda f: (counts[f], f.digest))
    for file in files:
        why = _difference(file, frame)
        if why:
            others = len(files) - counts[frame]
            more = f" ({others:,} of {len(files):,} files differ from the others)"
            raise BasisProblem(
                f"{file.source.name} {why}{more}: θ compares LoRAs of one rank and one layout "
                "only; take those files out, or use --feature style"
            )
    return frame


def _difference(file: _File, frame: Frame) -> str:
    """In what a file's vector differs from a frame; empty where it does not."""
    own = file.factors
    wanted = {entry.name for entry in frame.entries}
    for entry in frame.entries:
        if entry.name not in own:
            missing = sum(name not in own for name in wanted)
            return f"lacks {missing:,} of the {len(wanted):,} modules, {entry.name} first"
        mine = own[entry.name][0]
        if mine.rank != entry.rank:
            return f"has rank {mine.rank} where the others have {entry.rank}, at {entry.name}"
        if mine != entry:
            return (
                f"has {mine.o} × {mine.n} where the others have {entry.o} × {entry.n}, "
                f"at {entry.name}"
            )
    extra = [name for name in own if name not in wanted]
    if extra:
        return f"has {len(extra):,} modules that the others lack, {extra[0]} first"
    return ""


class Theta(Matrix):
    """θ of n LoRAs, read from the disk a tile of columns at a time.

    frame: see :class:`Frame`; payload: bytes of all factors; read_bytes: what has been read of them
    so far. Every pass over the tiles reads each byte once (padded ones some of them twice).
    """

    def __init__(self, files: Sequence[_File], frame: Frame, pad: bool) -> None:
        self.feature = "theta"
        self.count = len(files)
        self.frame = frame
        self.groups = frame.groups
        self.widths = {group: frame.width(group) for group in self.groups}
        self.read_bytes = 0
        self._files = files
        has = [{e.group for e, _, _ in file.factors.values()} for file in files]
        self.present = {g: np.array([g in own for own in has], bool) for g in self.groups}
        contents = [file.source.content for file in files]
        told_of = ["theta", self.groups, frame.digest, pad, contents]
        self.fingerprint = hashlib.sha256(json.dumps(told_of).encode()).hexdigest()

    @cached_property
    def payload(self) -> int:
        """Bytes of A and B of all files."""
        return sum(
            (
                entry.rank * entry.n * DTYPE_BITS[a.dtype]
                + entry.rank * entry.o * DTYPE_BITS[b.dtype]
            )
            // 8
            for file in self._files
            for entry, a, b in file.factors.values()
        )

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """Raises BasisProblem where a file is gone or has changed since it was opened."""
        out = np.zeros((self.count, tile.stop - tile.start), np.float32)
        pieces = list(self.frame.touched(group, tile))
        for row, file in zip(out, self._files, strict=True):
            with told(file.source), Opened(file.source.path) as opened:
                state = opened.before
                if (state.st_size, state.st_mtime_ns) != (file.source.size, file.source.mtime_ns):
                    raise NotAnAdapter("changing", f"{file.source.name} has changed meanwhile")
                for entry, at, numbers in pieces:
                    own = file.factors.get(entry.name)
                    if own is not None and own[0][:4] == entry[:4]:
                        self._copy(opened, file, entry, numbers, row[at:])
                opened.settle()
        return out

    def _copy(
        self, opened: Opened, file: _File, entry: Entry, numbers: slice, out: np.ndarray
    ) -> None:
        """Some numbers of a module to the beginning of ``out``."""
        own, a, b = file.factors[entry.name]
        edge = entry.rank * entry.n
        first, last = numbers.start, min(numbers.stop, edge)
        if first < last:
            # Rows of A that a lower rank lacks stand at the end.
            held = min(last, own.rank * own.n)
            if first < held:
                out[: held - first] = self._read(opened, file, a, first, held)
        start, stop = max(numbers.start, edge) - edge, numbers.stop - edge
        if start >= stop:
            return
        where = edge + start - numbers.start
        if own.rank == entry.rank:
            out[where : where + stop - start] = self._read(opened, file, b, start, stop)
            return
        top, end = start // entry.rank, -(-stop // entry.rank)
        rows = np.zeros((end - top, entry.rank), np.float32)
        stored = self._read(opened, file, b, top * own.rank, end * own.rank)
        rows[:, : own.rank] = stored.reshape(-1, own.rank)
        offset = top * entry.rank
        out[where : where + stop - start] = rows.ravel()[start - offset : stop - offset]

    def _read(
        self, opened: Opened, file: _File, factor: _Factor, first: int, last: int
    ) -> np.ndarray:
        """Numbers first … last − 1 of a stored factor, float32."""
        size = DTYPE_BITS[factor.dtype] // 8
        opened.file.seek(file.data_start + factor.begin + first * size)
        view = memoryview(bytearray((last - first) * size))
        opened.fill(view)
        self.read_bytes += len(view)
        info = TensorInfo(factor.dtype, (last - first,), 0, len(view))
        return as_tensor(info, view).to(torch.float32).numpy()
