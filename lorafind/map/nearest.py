"""The nearest neighbours of every point, by the same scores as ``similar``."""

from __future__ import annotations

import numpy as np

from lorafind.formats import groups as group_bits
from lorafind.index.progress import Progress, Silent
from lorafind.map.points import Embedded

#: Rows that are compared with all others at a time: 256 × 50,000 float32 are 51 MB.
BLOCK = 256


def nearest(
    found: Embedded, count: int = 8, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(positions, scores) of the nearest of every LoRA, n × m int32 and float32, m ≤ count.

    Scores are those of :func:`lorafind.search.scores.by_basis`: over the groups that both have
    (DESIGN 4). Where fewer are comparable a position is −1 and its score NaN. Ties go to the lower
    position. Memory: BLOCK × n scores, and n × k numbers per pair of group masks.
    """
    progress = progress or Silent()
    n = len(found.ids)
    count = min(count, n - 1)
    positions = np.full((n, count), -1, np.int32)
    scores = np.full((n, count), np.nan, np.float32)
    model = set(found.basis.spaces["model"].groups)
    kinds = [int(bits) for bits in np.unique(found.groups)]
    rows_of = {bits: np.flatnonzero(found.groups == bits) for bits in kinds}
    have = {bits: model & set(group_bits.names(bits)) for bits in kinds}
    progress.stage("neighbours", n, 0)
    for mine in kinds:
        theirs = {}
        for other in kinds:
            common = tuple(sorted(have[mine] & have[other]))
            if common:
                theirs[other] = (common, _vectors(found, rows_of[other], other, common))
        own = {
            common: _vectors(found, rows_of[mine], mine, common) for common, _ in theirs.values()
        }
        for start in range(0, len(rows_of[mine]), BLOCK):
            rows = rows_of[mine][start : start + BLOCK]
            table = np.full((len(rows), n), -np.inf, np.float32)
            for other, (common, vectors) in theirs.items():
                table[:, rows_of[other]] = _scores(
                    found, own[common][start : start + BLOCK], vectors
                )
            table[np.arange(len(rows)), rows] = -np.inf
            best = _best(table, count)
            values = np.take_along_axis(table, best, 1)
            known = np.isfinite(values)
            positions[rows] = np.where(known, best, -1)
            scores[rows] = np.where(known, values, np.nan)
            progress.advance(len(rows), 0)
    return positions, scores


def _vectors(found: Embedded, rows: np.ndarray, bits: int, common: tuple[str, ...]) -> np.ndarray:
    """Vectors over the common groups: the stored ones where these are all that a LoRA has."""
    model = set(found.basis.spaces["model"].groups)
    if set(common) == model & set(group_bits.names(bits)):
        return found.vectors[rows]
    seen = found.seen[rows] if found.basis.distinguishes else None
    return found.basis.vectors(found.parts[rows], common, seen).astype(np.float32)


def _scores(found: Embedded, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    if not found.basis.euclidean:
        return mine @ theirs.T
    return np.stack([found.basis.scores(theirs, one) for one in mine])


def _best(table: np.ndarray, count: int) -> np.ndarray:
    """Columns of the highest of every row, the highest first."""
    edge = table.shape[1] - count
    picked = np.argpartition(table, edge, axis=1)[:, edge:]
    picked.sort(1)
    order = np.argsort(-np.take_along_axis(table, picked, 1), axis=1, kind="stable")
    return np.take_along_axis(picked, order, 1)
