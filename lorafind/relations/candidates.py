"""Which pairs are worth a proof: from identity sketches and module norms, without any file.

A pair is a candidate when one of these holds (σ² = Σ_s ‖a_s‖²·‖b_s‖²/128 is the variance of the
sketched inner product d of two strangers):

- |d| ≥ 6.5 σ and |d| ≥ 0.2·‖a‖·‖b‖ over the modules in common;
- the sketched cosine of any one segment is ≥ 0.75 (block weights, parts);
- one touches a proper subset of the other's modules, six or more, and ‖A_m‖/‖B_m‖ is the same in
  all of them to about 1 %: the exact norms find parts of any size, where the sketch, whose noise
  grows with what was left out, would not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
from threadpoolctl import threadpool_limits

#: Version of candidates and proofs: relations of another one are looked for again.
RELATION_VERSION = 2
SIGMAS = 6.5
LEAST_COSINE = 0.2
SEGMENT_COSINE = 0.75
#: Standard deviation of log(‖A_m‖²/‖B_m‖²) below which two norm profiles are one.
PROFILE = 0.02
PROFILE_MODULES = 6
DIMENSIONS = 128
#: Rows of one side that are kept converted, and the edge of a tile.
_ROWS = 4096
_TILE = 512
#: Names of modules that are looked at together.
_NAMES = 4096


@dataclass
class Identities:
    """n LoRAs of one architecture as candidates see them.

    ids: int64; layouts: int64; sketch: n × segments × 128 (any float dtype), each segment over its
    exact norm; norms: n × segments float64; modules: per LoRA ‖ΔW_m‖² in the order of its layout.
    """

    ids: np.ndarray
    layouts: np.ndarray
    sketch: np.ndarray
    norms: np.ndarray
    modules: list[np.ndarray]


def candidates(
    known: Identities,
    layouts: Mapping[int, list[str]],
    new: np.ndarray | None = None,
    *,
    apart: bool = False,
    holders: np.ndarray | None = None,
) -> Iterator[np.ndarray]:
    """Pairs of positions in ``known`` that are worth a proof, as m × 2 arrays (i > j).

    new: positions whose pairs are wanted (with everything); None for all. apart: not those between
    two of ``new``. holders: n × k labels, −1 for none; pairs that share one are left out.
    """
    seen: set[tuple[int, int]] = set()
    common = _Common(known, layouts)
    wanted = (
        np.ones(len(known.ids), bool) if new is None else np.isin(np.arange(len(known.ids)), new)
    )
    for found in chain(
        _by_sketch(known, layouts, common, wanted, apart, holders),
        _by_profile(known, common, wanted),
    ):
        if apart:
            found = [(i, j) for i, j in found if wanted[i] != wanted[j]]
        fresh = [pair for i, j in found if (pair := (max(i, j), min(i, j))) not in seen]
        seen.update(fresh)
        if fresh:
            yield np.array(sorted(set(fresh)))


class _Common:
    """What the layouts in use have in common.

    layouts: their ids, those of one model side by side; names: of the modules of each; shared: how
    many modules two of them have in common, float32.
    """

    def __init__(self, known: Identities, layouts: Mapping[int, list[str]]) -> None:
        used = np.unique(known.layouts).tolist()
        # A text encoder is that of many models: what stands beside it tells them apart.
        first = {k: min(layouts[k], key=lambda n: (n[:2] == "te", n), default="") for k in used}
        self.layouts = sorted(used, key=lambda k: (first[k], k))
        self.names = [layouts[k] for k in self.layouts]
        self.row = {k: i for i, k in enumerate(self.layouts)}
        vocabulary: dict[str, int] = {}
        columns = [
            np.array([vocabulary.setdefault(name, len(vocabulary)) for name in names], np.int64)
            for names in self.names
        ]
        self.shared = np.zeros((len(used), len(used)), np.float32)
        # Models do not share many names: a block of them concerns few layouts.
        for start in range(0, len(vocabulary), _NAMES):
            inside = [c[(c >= start) & (c < start + _NAMES)] - start for c in columns]
            rows = np.array([row for row, c in enumerate(inside) if len(c)], np.int64)
            has = np.zeros((len(rows), _NAMES), np.float32)
            for k, row in enumerate(rows.tolist()):
                has[k, inside[row]] = 1.0
            self.shared[np.ix_(rows, rows)] += has @ has.T
        self._all_meet = bool(self.shared.all())

    def rows(self, layouts: np.ndarray) -> np.ndarray:
        """Places in ``layouts`` of the layouts of some LoRAs."""
        return np.array([self.row[k] for k in layouts.tolist()], np.int64)

    def meet(self, a: np.ndarray, b: np.ndarray) -> bool:
        """True where any two of these layouts have a module in common."""
        if self._all_meet:
            return True
        ours, theirs = (self.rows(np.unique(x)) for x in (a, b))
        return bool(self.shared[np.ix_(ours, theirs)].any())


@dataclass
class _Rows:
    """Some LoRAs, ready for products.

    where: positions; unit: segments × n × 128 float32, each row over its exact norm; share:
    segments × n float32, of each segment in ‖ΔW‖.
    """

    where: np.ndarray
    unit: np.ndarray
    share: np.ndarray
    layouts: np.ndarray

    def part(self, start: int) -> _Rows:
        """A tile of it."""
        tile = slice(start, start + _TILE)
        return _Rows(self.where[tile], self.unit[:, tile], self.share[:, tile], self.layouts[tile])


def _by_sketch(
    known: Identities,
    layouts: Mapping[int, list[str]],
    common: _Common,
    wanted: np.ndarray,
    apart: bool,
    holders: np.ndarray | None,
) -> Iterator[list[tuple[int, int]]]:
    total = np.sqrt((known.norms**2).sum(1, keepdims=True))
    share = np.divide(known.norms, total, out=np.zeros_like(known.norms), where=total > 0)
    used = np.flatnonzero(np.count_nonzero(share, axis=0) > 1)
    share = share[:, used].T.astype(np.float32, order="C")

    def rows(where: np.ndarray) -> _Rows:
        unit = known.sketch[where][:, used].transpose(1, 0, 2).astype(np.float32, order="C")
        return _Rows(where, unit, share[:, where], known.layouts[where])

    # LoRAs of one layout side by side make tiles for which the quick test is enough.
    order = np.argsort(common.rows(known.layouts), kind="stable")
    mine, rest = order[wanted[order]], order[~wanted[order]]

    def column(left: _Rows, start: int, others: np.ndarray, first: int) -> list[tuple[int, int]]:
        """Candidates between all rows of ``left`` and one tile of the others."""
        where = others[first : first + _TILE]
        if not common.meet(left.layouts, known.layouts[where]):
            return []
        right = rows(where)
        return [
            pair
            for offset in range(0, len(left.where), _TILE)
            if others is rest or start + offset <= first
            if common.meet(left.layouts[offset : offset + _TILE], right.layouts)
            for pair in _tile(known, layouts, left.part(offset), right, holders)
        ]

    # One thread per core on tiles of its own beats the threads of BLAS on small matrices.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(mine), _ROWS):
            left = rows(mine[start : start + _ROWS])
            work = [(mine, first) for first in range(start, 0 if apart else len(mine), _TILE)]
            work += [(rest, first) for first in range(0, len(rest), _TILE)]
            yield from pool.map(
                lambda item, left=left, start=start: column(left, start, *item), work
            )


def _tile(
    known: Identities,
    layouts: Mapping[int, list[str]],
    left: _Rows,
    right: _Rows,
    holders: np.ndarray | None,
) -> list[tuple[int, int]]:
    """Candidates of one tile, which stays in the processor's cache."""
    d = np.zeros((len(left.where), len(right.where)), np.float32)
    cosine = np.empty_like(d)
    hits: list[tuple[int, int]] = []
    for s, (a, b) in enumerate(zip(left.unit, right.unit, strict=True)):
        np.matmul(a, b.T, out=cosine)
        if max(cosine.max(), -cosine.min()) >= SEGMENT_COSINE:
            close = np.argwhere(np.abs(cosine) >= SEGMENT_COSINE)
            hits += [(i, j) for i, j in _unheld(close, left, right, holders).tolist()]
        cosine *= left.share[s][:, None]
        cosine *= right.share[s]
        d += cosine
    one = left.layouts[0]
    uniform = bool((left.layouts == one).all() and (right.layouts == one).all())
    if not uniform or max(d.max(), -d.min()) >= LEAST_COSINE:
        variance = (left.share**2).T @ right.share**2
        variance *= SIGMAS**2 / DIMENSIONS
        close = np.argwhere((d * d >= variance) & (variance > 0))
        for i, j in _unheld(close, left, right, holders).tolist():
            x, y = int(left.where[i]), int(right.where[j])
            if x != y and abs(d[i, j]) >= LEAST_COSINE * _common(known, layouts, x, y):
                hits.append((i, j))
    pairs = [(int(left.where[i]), int(right.where[j])) for i, j in hits]
    return [(x, y) for x, y in pairs if x != y]


def _unheld(pairs: np.ndarray, left: _Rows, right: _Rows, holders: np.ndarray | None) -> np.ndarray:
    """The pairs (rows of left and right) that share no holder."""
    if holders is None or not len(pairs):
        return pairs
    one, two = holders[left.where[pairs[:, 0]]], holders[right.where[pairs[:, 1]]]
    shared = (one[:, :, None] == two[:, None, :]) & (one[:, :, None] >= 0)
    return pairs[~shared.any((1, 2))]


def _common(known: Identities, layouts: Mapping[int, list[str]], x: int, y: int) -> float:
    """‖a_c‖·‖b_c‖ over the modules in common, for a and b at unit norm."""
    kx, ky = int(known.layouts[x]), int(known.layouts[y])
    if kx == ky:
        return 1.0
    names = set(layouts[kx]) & set(layouts[ky])

    def part(position: int, layout: int) -> float:
        norms = known.modules[position]
        kept = sum(
            float(v) for name, v in zip(layouts[layout], norms, strict=True) if name in names
        )
        return (kept / max(float(norms.sum()), 1e-300)) ** 0.5

    return part(x, kx) * part(y, ky)


def _by_profile(
    known: Identities, common: _Common, wanted: np.ndarray
) -> Iterator[list[tuple[int, int]]]:
    shared, sizes = common.shared, np.array([len(names) for names in common.names], np.float32)
    for small, large in np.argwhere((shared == sizes[:, None]) & (sizes[:, None] < sizes)).tolist():
        if sizes[small] < PROFILE_MODULES:
            continue
        order = {name: i for i, name in enumerate(common.names[large])}
        columns = [order[name] for name in common.names[small]]
        part = np.flatnonzero(known.layouts == common.layouts[small])
        whole = np.flatnonzero(known.layouts == common.layouts[large])
        y = _profile([known.modules[i] for i in part])
        for start in range(0, len(whole), _ROWS):
            block = whole[start : start + _ROWS]
            x = _profile([known.modules[i][columns] for i in block])
            distance = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
            close = np.argwhere(distance <= PROFILE**2 * len(columns))
            yield [
                (int(block[i]), int(part[j]))
                for i, j in close.tolist()
                if wanted[block[i]] or wanted[part[j]]
            ]


def _profile(norms: list[np.ndarray]) -> np.ndarray:
    """Logarithms of squared module norms, centred per row, float64."""
    logs = np.log(np.maximum(np.asarray(norms, np.float64), 1e-300))
    return logs - logs.mean(1, keepdims=True)


def estimate(known: Identities, layouts: Mapping[int, list[str]], x: int, y: int) -> float:
    """The sketched cosine of two LoRAs over the modules in common, cut to [−1, 1]."""
    a, b = known.sketch[x].astype(np.float64), known.sketch[y].astype(np.float64)
    d = float(((a * b).sum(1) * known.norms[x] * known.norms[y]).sum())
    size = float(np.linalg.norm(known.norms[x]) * np.linalg.norm(known.norms[y]))
    size *= _common(known, layouts, x, y)
    return float(np.clip(d / size, -1.0, 1.0)) if size > 0 else 0.0
