"""The canonical form of the factors: θ without the ambiguity of how ΔW is factored.

In the manner of W2T (Han et al., arXiv 2603.15990): thin QR of both sides, B = Q_B·R_B and
Aᵀ = Q_A·R_A, then the singular value decomposition of the small R_B·R_Aᵀ = U'·Σ·V'ᵀ, which gives
that of ΔW: U = Q_B·U', V = Q_A·V'. Every singular vector is defined up to a sign that it shares
with its partner; as there, the number of largest absolute value in each column of U is made
positive. W2T hands U, V and Σ to a network as tokens. A vector for principal components needs
them in one scale, so here Σ is split evenly: the module's factors are (V·√Σ)ᵀ, in the place of A,
and U·√Σ, in the place of B, ordered as θ; lower ranks are filled up with zeros.

It is a function of ΔW alone, alpha included, wherever singular values differ; where two are equal
their vectors are arbitrary, and where they are near they turn with little noise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lorafind.features.matrix import Matrix
from lorafind.features.sources import Adapters, Refusal, Source, one_thread
from lorafind.features.theta import Entry, Frame
from lorafind.formats.adapter import ModulePlan


def canonical(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """(U·√Σ, √Σ·Vᵀ) of B·A: o × k and k × n with k = min(o, n, r), the strongest first."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    left, right = q_b @ u, q_a @ vh.T
    strongest = left.abs().argmax(0, keepdim=True)
    signs = torch.where(left.gather(0, strongest) < 0, -1.0, 1.0)
    root = signs * s.sqrt()
    return left * root, (right * root).T


def open_canonical(
    sources: Sequence[Source],
    groups: Sequence[str],
    *,
    frame: Frame | None = None,
    allow_pickle: bool = False,
) -> tuple[Canonical, list[Source], list[Refusal]]:
    """Canonical forms of the modules in some groups: matrix, the sources in it, and the others.

    A source with a module that has no low rank (``full``) is left out with a sentence. frame: what
    the vectors must look like, for vectors that are compared with older ones: modules that it lacks
    are left away, and of a higher rank the strongest directions stay. By default every module that
    any source has, at the highest rank.
    """
    adapters = Adapters(sources, allow_pickle)
    kept: list[int] = []
    refused: list[Refusal] = []
    widest: dict[tuple[str, int, int], Entry] = {}
    for k, source in enumerate(sources):
        try:
            own = list(_entries(adapters, k, groups))
        except _NoFactors as error:
            told = f"{source.name} has no low-rank factors at {error}: it has no canonical form"
            refused.append((source.path, told))
            continue
        kept.append(k)
        for entry in own:
            key = entry.name, entry.o, entry.n
            if key not in widest or widest[key].rank < entry.rank:
                widest[key] = entry
    frame = frame or Frame.of(list(widest.values()))
    return Canonical(adapters, kept, frame), [sources[k] for k in kept], refused


class _NoFactors(Exception):
    """A module has no low rank."""


def _entries(adapters: Adapters, k: int, groups: Sequence[str]) -> Iterator[Entry]:
    """The matrices of source k in some groups, with their ranks; raises _NoFactors."""
    for module in adapters.sources[k].modules:
        if module.group not in groups or module.vector:
            continue
        rank = _rank(adapters, k, module.name)
        if rank is None:
            raise _NoFactors(module.name)
        rank = min(rank, module.o, module.n)
        yield Entry(module.name, module.group, module.o, module.n, rank)


def _rank(adapters: Adapters, k: int, name: str) -> int | None:
    """How many columns the factors of a module have; None where there are no factors."""
    plan = adapters.plan(k, name)
    assert plan is not None
    if _is_plain(plan):
        return plan.rank
    pair = adapters.delta(k, name).factors(torch.float32)
    return None if pair is None else pair[1].shape[0]


def _is_plain(plan: ModulePlan) -> bool:
    return plan.family == "lora" and len(plan.keys) - (plan.alpha is not None) == 2


class Canonical(Matrix):
    """Canonical forms of n LoRAs, made from the files tile by tile.

    A module that is cut by a tile is decomposed for each of its pieces again: it costs time, and
    memory stays within two tiles. frame: see :class:`Frame`.
    """

    def __init__(self, adapters: Adapters, kept: Sequence[int], frame: Frame) -> None:
        self.feature = "canonical"
        self.frame = frame
        self.count = len(kept)
        self.groups = frame.groups
        self.widths = {group: frame.width(group) for group in self.groups}
        self.adapters = adapters
        self._kept = kept
        wanted = {(e.name, e.o, e.n) for e in frame.entries}
        self._own = [
            wanted & {(m.name, m.o, m.n) for m in adapters.sources[k].modules if not m.vector}
            for k in kept
        ]
        self.present = {}
        for group in self.groups:
            keys = {(e.name, e.o, e.n) for e in frame.of_group(group)}
            self.present[group] = np.array([bool(keys & own) for own in self._own], bool)
        contents = [adapters.sources[k].content for k in kept]
        told_of = ["canonical", self.groups, frame.digest, contents]
        self.fingerprint = hashlib.sha256(json.dumps(told_of).encode()).hexdigest()

    def columns(self, group: str, tile: slice) -> np.ndarray:
        """Raises BasisProblem where a file is gone or has changed since it was opened."""
        out = np.zeros((self.count, tile.stop - tile.start), np.float32)
        pieces = list(self.frame.touched(group, tile))
        for row, k, own in zip(out, self._kept, self._own, strict=True):
            for entry, at, numbers in pieces:
                if (entry.name, entry.o, entry.n) in own:
                    made = self._vector(k, entry)[numbers]
                    row[at : at + len(made)] = made
        return out

    def _vector(self, k: int, entry: Entry) -> np.ndarray:
        """The numbers of one module, float32."""
        pair = self.adapters.delta(k, entry.name).factors()
        assert pair is not None
        with one_thread():
            left, right = canonical(*pair)
        rank = min(entry.rank, left.shape[1])
        a = torch.zeros(entry.rank, entry.n)
        b = torch.zeros(entry.o, entry.rank)
        a[:rank], b[:, :rank] = right[:rank], left[:, :rank]
        return torch.cat([a.ravel(), b.ravel()]).numpy()
