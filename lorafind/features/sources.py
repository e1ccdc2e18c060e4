"""Files read for a feature: what every one holds, and its ΔW again module by module."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lorafind.bases.problem import BasisProblem
from lorafind.files import pickled, safetensors, sidecars
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import Header, TensorInfo
from lorafind.files.scan import Found, ScanReport, Target, scan
from lorafind.files.sniff import is_pickled
from lorafind.files.tensors import as_tensor
from lorafind.formats.adapter import Fetch, ModulePlan
from lorafind.formats.plan import plan_of
from lorafind.index.classes import OTHER, Model, comparable, kinds
from lorafind.index.progress import Progress
from lorafind.index.rows import Module

if TYPE_CHECKING:
    from lorafind.formats.delta import Delta
    from lorafind.index.examine import Lora

#: (path, sentence): a file that a matrix does not hold, and why.
Refusal = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Source:
    """A file that holds an adapter.

    row: its position among the paths asked for; content: as the index names it; architecture: may
    leave open several (``sd1-or-sd2``); layout: digest as in the index; modules: those with ΔW ≠ 0;
    norms: ‖ΔW_m‖² of them; size and mtime_ns: of the file when it was read.
    """

    row: int
    path: str
    content: str
    architecture: str
    layout: str
    modules: tuple[Module, ...]
    norms: np.ndarray
    size: int
    mtime_ns: int

    @property
    def name(self) -> str:
        """The file's name."""
        return os.path.basename(self.path)

    def has(self, groups: Iterable[str]) -> bool:
        """True where a matrix of one of the groups has ΔW ≠ 0."""
        return any(m.group in groups and not m.vector for m in self.modules)


def read_sources(
    paths: Sequence[str | os.PathLike[str]],
    *,
    device: str = "cpu",
    allow_pickle: bool = False,
    linear: bool = False,
    watch: Progress,
    take: Callable[[Source, Lora], None] = lambda source, lora: None,
) -> tuple[list[Source], list[Refusal]]:
    """Read every file once, as ``index`` does: digests, every number looked at, signature.

    take: gets the signature of every file. linear: signatures are of ΔW itself instead of style.
    Returns the adapters in the order of the paths, and what holds none with a sentence each; never
    raises for a bad file.
    """
    from lorafind.index.reconcile import Read
    from lorafind.index.store import layout_digest
    from lorafind.index.workers import workers
    from lorafind.signatures.device import choose

    rows: defaultdict[Found, list[int]] = defaultdict(list)
    refused: list[Refusal] = []
    names = [os.path.abspath(path) for path in paths]
    for row, path in enumerate(names):
        found = _find(path, allow_pickle)
        if isinstance(found, str):
            refused.append((path, f"{os.path.basename(path)}: {found}"))
        else:
            rows[found].append(row)
    watch.stage("Reading", len(rows), sum(found.size for found in rows))
    sources: list[Source] = []
    shared: dict[str, tuple[Module, ...]] = {}
    reads = [Read(found, "new") for found in rows]
    with workers(reads, choose(device), allow_pickle, lambda content: False, linear) as results:
        for done in results:
            lora, found = done.lora, done.found
            watch.advance(1, found.size)
            if lora is None:
                for row in rows[found]:
                    name = os.path.basename(names[row])
                    told = done.reason if name in done.reason else f"{name}: {done.reason}"
                    refused.append((names[row], told))
                continue
            assert lora.modules is not None and lora.norms is not None
            layout = layout_digest(lora.architecture, lora.modules)
            modules = shared.setdefault(layout, tuple(lora.modules))
            for row in rows[found]:
                source = Source(
                    row,
                    names[row],
                    lora.content,
                    lora.architecture,
                    layout,
                    modules,
                    lora.norms,
                    found.size,
                    found.mtime_ns,
                )
                sources.append(source)
                take(source, lora)
    order = {path: row for row, path in reversed(list(enumerate(names)))}
    refused.sort(key=lambda pair: order[pair[0]])
    return sorted(sources, key=lambda s: s.row), refused


def _find(path: str, allow_pickle: bool) -> Found | str:
    """The facts of a file, or why it is not looked into."""
    if os.path.isdir(path):
        return "it is a folder: name the files in it"
    target = Target(os.fsencode(path), b"", True)
    found = next(iter(scan([target], ScanReport(), allow_pickle)), None)
    if found is None:
        return "it does not exist"
    return found.reason if found.outcome else found


def agree(sources: Sequence[Source]) -> tuple[str, list[Source], list[Refusal]]:
    """The architecture that most files may be of, those files, and the others with a sentence.

    Layouts of unknown models are joined as in the index (see ``index/classes.py``).
    """
    sources = _joined(sources)
    votes = Counter(kind for s in sources for kind in kinds(s.architecture))
    most = min(votes, key=lambda kind: (-votes[kind], kind))
    kept = [s for s in sources if comparable(s.architecture, most)]
    refused = [
        (s.path, f"{s.name} is for {s.architecture}, most of the files are for {most}")
        for s in sources
        if not comparable(s.architecture, most)
    ]
    return most, kept, refused


def _joined(sources: Sequence[Source]) -> list[Source]:
    layouts = {s.layout: s for s in sources if s.architecture.startswith(OTHER)}
    found: list[Model] = []
    names: dict[str, str] = {}
    for layout, source in sorted(
        layouts.items(), key=lambda item: (-len(item[1].modules), item[0])
    ):
        model = next((m for m in found if m.takes(source.modules)), None)
        if model is None:
            model = Model(source.architecture)
            found.append(model)
        model.shapes.update({m.name: (m.o, m.n) for m in source.modules})
        names[layout] = model.name
    return [replace(s, architecture=names.get(s.layout, s.architecture)) for s in sources]


@contextmanager
def one_thread() -> Iterator[None]:
    """Small products one after the other: handing each to several threads costs more than it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def told(source: Source) -> Iterator[None]:
    """Turns what goes wrong while a source is read again into a BasisProblem."""
    try:
        yield
    except NotAnAdapter as error:
        raise BasisProblem(f"{error.reason}; start again when the files stay as they are") from None


class Adapters:
    """The ΔW of sources again, a module at a time.

    Tensors are read from the disk when they are asked for; only a pickle, which cannot be read in
    parts, stays in memory whole. read_bytes: what has been read of them so far.
    """

    def __init__(self, sources: Sequence[Source], allow_pickle: bool = False) -> None:
        self.sources = sources
        self.read_bytes = 0
        self._tensors: dict[str, dict[str, TensorInfo]] = {}
        self._opened = [self._open(source, allow_pickle) for source in sources]

    def plan(self, k: int, name: str) -> ModulePlan | None:
        """How source k writes a module; None where it has none of that name."""
        return self._opened[k][0].get(name)

    def delta(self, k: int, name: str) -> Delta:
        """ΔW of a module of source k. Raises BasisProblem where the file is gone or has changed."""
        plans, fetch = self._opened[k]
        with told(self.sources[k]):
            return plans[name].bind(fetch)

    def _open(self, source: Source, allow_pickle: bool) -> tuple[dict[str, ModulePlan], Fetch]:
        with told(source):
            config = sidecars.adapter_config(source.path)
            if is_pickled(source.path):
                found = pickled.load(source.path, allow_pickle)
                plan, fetch = plan_of(found.header, config), found.tensors.__getitem__
            else:
                header = safetensors.read_header(source.path)
                plan = plan_of(header, config)
                # Files of one tool have equal headers: their descriptions are kept once.
                tensors = self._tensors.setdefault(header.names_digest, header.tensors)
                fetch = self._positional(
                    source.path, Header(tensors, {}, header.data_start, header.size)
                )
        return {module.name: module for module in plan.modules}, fetch

    def _positional(self, path: str, header: Header) -> Fetch:
        raw = safetensors.fetch_from(path, header)

        def fetch(key: str) -> Tensor:
            data = raw(key)
            self.read_bytes += len(data)
            return as_tensor(header.tensors[key], data)

        return fetch
