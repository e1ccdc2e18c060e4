"""The collection's own basis: means per layout and joint principal components of style.

Every group of a LoRA is brought to unit length, the mean of its layout in the collection is taken
off (shrunk to the pooled mean where the layout has few families), groups are weighted and the
principal components are taken over all of them jointly. All of it is done on the n × n Gram
matrices of the sample, so that the sketches themselves are read block by block.

Embedding of a LoRA: per group g the k numbers p_g = ω_g·V_g·(x_g − μ_g). With a set M of groups
that two LoRAs share, the coordinates of both are the least-squares solution on these groups alone,
c_M = (Σ_M V_g·V_gᵀ)⁺ · Σ_M p_g; over all groups of the basis that is the plain projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafind.formats.groups import GROUPS

#: Below this many families a collection has no components of its own.
FEWEST = 30
#: A layout with fewer families than this shares the pooled mean in proportion.
SHRINK = 30
#: A sample of this many families fits a basis.
SAMPLE = 2048
MOST_COMPONENTS = 128
#: Weights of the groups; two spaces, because text encoders are compared on request only.
WEIGHTS = {
    "self_attn": 1.0,
    "cross_attn": 0.5,
    "ff": 1.0,
    "conv": 1.0,
    "other": 1.0,
    "text": 0.5,
}
SPACES: dict[str, tuple[str, ...]] = {
    "model": tuple(g for g in GROUPS if g != "text"),
    "text": ("text",),
}
#: Singular values below this share of the largest are left out of a masked least squares.
RCOND = 1e-3
_BLOCK = 256


@dataclass
class Sample:
    """What a basis is fitted on: n LoRAs, one space.

    styles: group → n × 32,768 int8 (rows of zeros where the LoRA lacks the group);
    layouts: layout id per LoRA; weights: 1/|family| per LoRA.
    """

    styles: Mapping[str, np.ndarray]
    layouts: np.ndarray
    weights: np.ndarray


@dataclass
class Space:
    """One fitted space.

    components: group → k × 32,768 floats (jointly orthonormal over the groups), empty where a
    stored basis was opened for queries only;
    grams: group → k × k, V_g·V_gᵀ; means: (layout id, or −1 for the pooled mean) → group → k
    numbers ω_g·V_g·μ_g; eigenvalues: all of them, falling; total: their sum.
    """

    groups: tuple[str, ...]
    components: dict[str, np.ndarray]
    grams: dict[str, np.ndarray]
    means: dict[int, dict[str, np.ndarray]]
    eigenvalues: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def size(self) -> int:
        """The number of components k."""
        return next(iter(self.grams.values())).shape[0]

    def project(self, group: str, rows: np.ndarray) -> np.ndarray:
        """ω_g·V_g·x for rows of unit length (n × 32,768 float32) → n × k."""
        return WEIGHTS[group] * (rows @ self.components[group].T.astype(np.float32))

    def centre(self, group: str, layout: int) -> np.ndarray:
        """The projected mean to take off, k numbers."""
        return self.means.get(layout, self.means[-1])[group]


def unit_rows(styles: np.ndarray) -> np.ndarray:
    """int8 sketches → float32 rows of unit length; rows of zeros stay zero."""
    rows = styles.astype(np.float32)
    size = np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return np.divide(rows, size, out=rows, where=size > 0)


def gram(styles: np.ndarray) -> np.ndarray:
    """Cosines of all pairs of rows, n × n float64, block by block."""
    n = len(styles)
    out = np.zeros((n, n))
    for i in range(0, n, _BLOCK):
        left = unit_rows(styles[i : i + _BLOCK])
        for j in range(0, i + 1, _BLOCK):
            right = left if i == j else unit_rows(styles[j : j + _BLOCK])
            out[i : i + len(left), j : j + len(right)] = left @ right.T
    lower = np.tril(out, -1)
    return lower + lower.T + np.diag(np.diag(out))


def bend(eigenvalues: np.ndarray) -> int:
    """The number of components to keep.

    Half of the eigenvalues and more belong to what LoRAs do not share; they lie near a straight
    line over their rank. The line through their median and upper quartile is followed to the
    first rank; what lies above stands out. At least 2, at most MOST_COMPONENTS.
    """
    values = eigenvalues[eigenvalues > 1e-9 * max(eigenvalues.max(initial=0.0), 1e-30)]
    if len(values) < 4:
        return min(2, len(values))
    middle, upper = np.quantile(values, [0.5, 0.75])
    above = int((values > middle + 2 * (upper - middle)).sum())
    return int(np.clip(above, 2, min(MOST_COMPONENTS, len(values) - 1)))


def _means(sample: Sample, present: np.ndarray) -> tuple[np.ndarray, dict[int, int], np.ndarray]:
    """Averaging weights for one group: (rows, layout → row, row of every LoRA).

    Row 0 is the pooled mean; a row of a layout is its shrunk mean.
    """
    weights = sample.weights * present
    pooled = weights / weights.sum()
    rows, index = [pooled], {-1: 0}
    for layout in np.unique(sample.layouts[present]).tolist():
        own = weights * (sample.layouts == layout)
        share = min(1.0, own.sum() / SHRINK)
        index[layout] = len(rows)
        rows.append(share * own / own.sum() + (1 - share) * pooled)
    which = np.array([index.get(layout, 0) for layout in sample.layouts.tolist()])
    return np.array(rows), index, which


def fit(sample: Sample, groups: Sequence[str], components: int | None = None) -> Space:
    """Means and joint principal components of the groups that the sample has.

    components: their number; by default :func:`bend` of the eigenvalues.
    """
    n = len(sample.layouts)
    present = {g: np.asarray(sample.styles[g].any(1)) for g in groups if g in sample.styles}
    groups = tuple(g for g in groups if g in present and present[g].any())
    root = np.sqrt(sample.weights)
    total = np.zeros((n, n))
    spread: dict[str, np.ndarray] = {}
    averages: dict[str, tuple[np.ndarray, dict[int, int]]] = {}
    for group in groups:
        rows, index, which = _means(sample, present[group])
        # J takes the mean of its layout off every LoRA that has the group.
        centring = (np.eye(n) - rows[which]) * present[group][:, None]
        spread[group] = root[:, None] * centring
        averages[group] = rows, index
        cosines = gram(sample.styles[group])
        total += WEIGHTS[group] ** 2 * (spread[group] @ cosines @ spread[group].T)
    values, vectors = np.linalg.eigh(total)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    k = min(components, int((values > 0).sum())) if components else bend(values)
    mix = (vectors[:, :k] / np.sqrt(values[:k])).T
    space = Space(groups, {}, {}, {}, values)
    for group in groups:
        coefficients = (WEIGHTS[group] * mix @ spread[group]).astype(np.float32)
        v = np.zeros((k, sample.styles[group].shape[1]), np.float32)
        rows, index = averages[group]
        projected = np.zeros((len(rows), k))
        for i in range(0, n, _BLOCK):
            v += coefficients[:, i : i + _BLOCK] @ unit_rows(sample.styles[group][i : i + _BLOCK])
        for i in range(0, n, _BLOCK):
            block = unit_rows(sample.styles[group][i : i + _BLOCK])
            projected += rows[:, i : i + _BLOCK] @ (WEIGHTS[group] * (block @ v.T))
        space.components[group] = v
        space.grams[group] = (v @ v.T).astype(np.float64)
        for layout, row in index.items():
            space.means.setdefault(layout, {})[group] = projected[row].astype(np.float32)
    for per_group in space.means.values():
        for group in groups:
            per_group.setdefault(group, space.means[-1][group])
    return space


def coordinates(space: Space, parts: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Least-squares coordinates from the parts of some groups.

    parts: n × len(space.groups) × k; returns n × k.
    """
    picked = [i for i, group in enumerate(space.groups) if group in groups]
    summed = parts[:, picked].sum(1)
    if len(picked) == len(space.groups):
        return summed
    inverse = np.linalg.pinv(
        sum(space.grams[space.groups[i]] for i in picked), rcond=RCOND, hermitian=True
    )
    return summed @ inverse.T
