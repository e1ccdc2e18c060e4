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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

#: Version of candidates and proofs: relations of another one are looked for again.
RELATION_VERSION = 1
SIGMAS = 6.5
LEAST_COSINE = 0.2
SEGMENT_COSINE = 0.75
#: Standard deviation of log(‖A_m‖²/‖B_m‖²) below which two norm profiles are one.
PROFILE = 0.02
PROFILE_MODULES = 6
DIMENSIONS = 128
_ROWS = 1024


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
    known: Identities, layouts: Mapping[int, list[str]], new: np.ndarray | None = None
) -> Iterator[np.ndarray]:
    """Pairs of positions in ``known`` that are worth a proof, as m × 2 arrays (i > j).

    new: positions whose pairs are wanted (with everything); None for all.
    """
    seen: set[tuple[int, int]] = set()
    wanted = (
        np.ones(len(known.ids), bool) if new is None else np.isin(np.arange(len(known.ids)), new)
    )
    for found in (*_by_sketch(known, layouts, wanted), *_by_profile(known, layouts, wanted)):
        fresh = [pair for i, j in found if (pair := (max(i, j), min(i, j))) not in seen]
        seen.update(fresh)
        if fresh:
            yield np.array(sorted(set(fresh)))


def _by_sketch(
    known: Identities, layouts: Mapping[int, list[str]], wanted: np.ndarray
) -> Iterator[list[tuple[int, int]]]:
    n = len(known.ids)
    total = np.sqrt((known.norms**2).sum(1, keepdims=True))
    share = np.divide(known.norms, total, out=np.zeros_like(known.norms), where=total > 0)
    share = share.astype(np.float32)
    rows = np.flatnonzero(wanted)
    segments = [s for s in range(share.shape[1]) if np.count_nonzero(share[:, s]) > 1]
    for start in range(0, len(rows), _ROWS):
        left = rows[start : start + _ROWS]
        a = known.sketch[left].astype(np.float32)
        for begin in range(0, n, _ROWS):
            right = np.arange(begin, min(begin + _ROWS, n))
            if wanted[right].all() and right[0] > left[-1]:
                continue
            b = known.sketch[right].astype(np.float32)
            yield _block(known, layouts, share, segments, (left, a), (right, b), wanted)


def _block(
    known: Identities,
    layouts: Mapping[int, list[str]],
    share: np.ndarray,
    segments: list[int],
    one: tuple[np.ndarray, np.ndarray],
    two: tuple[np.ndarray, np.ndarray],
    wanted: np.ndarray,
) -> list[tuple[int, int]]:
    (left, a), (right, b) = one, two
    squares = share[left] ** 2, share[right] ** 2
    d = _flat(a * share[left][:, :, None]) @ _flat(b * share[right][:, :, None]).T
    variance = squares[0] @ squares[1].T
    variance *= SIGMAS**2 / DIMENSIONS
    hits = (d * d >= variance) & (variance > 0)
    pairs = []
    for i, j in np.argwhere(hits).tolist():
        x, y = int(left[i]), int(right[j])
        if _once(x, y, wanted) and abs(d[i, j]) >= LEAST_COSINE * _common(known, layouts, x, y):
            pairs.append((x, y))
    for s in segments:
        cosine = a[:, s] @ b[:, s].T
        if max(cosine.max(), -cosine.min()) < SEGMENT_COSINE:
            continue
        for i, j in np.argwhere(np.abs(cosine) >= SEGMENT_COSINE).tolist():
            if _once(x := int(left[i]), y := int(right[j]), wanted):
                pairs.append((x, y))
    return pairs


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1)


def _once(x: int, y: int, wanted: np.ndarray) -> bool:
    """True for one of the two orders in which a pair comes up."""
    return x > y or (x < y and not wanted[y])


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
    known: Identities, layouts: Mapping[int, list[str]], wanted: np.ndarray
) -> Iterator[list[tuple[int, int]]]:
    present = [k for k in layouts if (known.layouts == k).any()]
    vocabulary: dict[str, int] = {}
    for k in present:
        for name in layouts[k]:
            vocabulary.setdefault(name, len(vocabulary))
    has = np.zeros((len(present), len(vocabulary)), np.float32)
    for row, k in enumerate(present):
        has[row, [vocabulary[name] for name in layouts[k]]] = 1.0
    shared, sizes = has @ has.T, has.sum(1)
    for small, large in np.argwhere((shared == sizes[:, None]) & (sizes[:, None] < sizes)).tolist():
        if sizes[small] < PROFILE_MODULES:
            continue
        order = {name: i for i, name in enumerate(layouts[present[large]])}
        columns = [order[name] for name in layouts[present[small]]]
        part = np.flatnonzero(known.layouts == present[small])
        whole = np.flatnonzero(known.layouts == present[large])
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
