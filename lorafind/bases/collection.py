"""The collection's own basis: means per layout and joint principal components of style.

Every group of a LoRA is brought to unit length, the mean of its layout in the collection is taken
off (shrunk to the pooled mean where the layout has few families), groups are weighted and the
principal components are taken over all of them jointly (``kernel.py``). The sketches themselves are
read block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorafind.bases import kernel
from lorafind.bases.kernel import Kernel
from lorafind.bases.selection import Choice, choose
from lorafind.bases.selection import bend as bend
from lorafind.formats.groups import GROUPS

#: Below this many families a collection has no components of its own.
FEWEST = 30
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
_BLOCK = 256


@dataclass
class Sample:
    """What a basis is fitted on: n LoRAs, one space.

    styles: group → n × 32,768 int8 (rows of zeros where the LoRA lacks the group);
    layouts: layout id per LoRA; weights: 1/|family| per LoRA; heads: n bools, one LoRA of every
    family (default: all are).
    """

    styles: Mapping[str, np.ndarray]
    layouts: np.ndarray
    weights: np.ndarray
    heads: np.ndarray | None = None


@dataclass
class Space:
    """One fitted space.

    components: group → k × 32,768 floats (jointly orthonormal over the groups), empty where a
    stored basis was opened for queries only;
    grams: group → k × k, V_g·V_gᵀ; means: (layout id, or −1 for the pooled mean) → group → k
    numbers ω_g·V_g·μ_g; eigenvalues: all of them, falling; weights: ω per group; choice: what the
    coordinates are multiplied with, None for nothing.
    """

    groups: tuple[str, ...]
    components: dict[str, np.ndarray]
    grams: dict[str, np.ndarray]
    means: dict[int, dict[str, np.ndarray]]
    eigenvalues: np.ndarray = field(default_factory=lambda: np.zeros(0))
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)
    choice: Choice | None = None

    @property
    def size(self) -> int:
        """The number of components k."""
        return next(iter(self.grams.values())).shape[0]

    def project(self, group: str, rows: np.ndarray) -> np.ndarray:
        """ω_g·V_g·x for rows of unit length (n × 32,768 float32) → n × k."""
        return self.weights[group] * (rows @ self.components[group].T.astype(np.float32))

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


def fit(sample: Sample, groups: Sequence[str], components: int | None = None) -> Space:
    """Means and joint principal components of the groups that the sample has.

    components: their number; by default :func:`lorafind.bases.selection.choose` says.
    """
    present = {g: np.asarray(sample.styles[g].any(1)) for g in groups if g in sample.styles}
    cosines = Kernel({g: gram(sample.styles[g]) for g in present if present[g].any()}, present)
    fitted = kernel.fit(cosines, sample.layouts, sample.weights, WEIGHTS)
    if components is None:
        # Copies agree in all their groups, and in their noise as well.
        heads = (
            np.arange(len(sample.layouts)) if sample.heads is None else sample.heads.nonzero()[0]
        )
        views = [view[np.ix_(heads, heads)] for view in fitted.views.values()]
        choice = choose(fitted.eigenvalues, fitted.vectors[heads], views, MOST_COMPONENTS)
    else:
        ones = np.ones(min(components, fitted.size))
        choice = Choice(ones, ones)
    k = choice.count
    space = Space(fitted.groups, {}, {}, {}, fitted.eigenvalues, choice=choice)
    for group in space.groups:
        styles, mix = sample.styles[group], fitted.mix[group][:k].astype(np.float32)
        v = np.zeros((k, styles.shape[1]), np.float32)
        for i in range(0, len(styles), _BLOCK):
            v += mix[:, i : i + _BLOCK] @ unit_rows(styles[i : i + _BLOCK])
        space.components[group] = v
        space.grams[group] = (v @ v.T).astype(np.float64)
        for layout, row in fitted.index[group].items():
            centre = fitted.centres[group][row, :k].astype(np.float32)
            space.means.setdefault(layout, {})[group] = centre
    for per_group in space.means.values():
        for group in space.groups:
            per_group.setdefault(group, space.means[-1][group])
    return space


def coordinates(space: Space, parts: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Least-squares coordinates from the parts of some groups.

    parts: n × len(space.groups) × k; returns n × k.
    """
    shared = np.array([group in groups for group in space.groups])
    grams = [space.grams[group] for group in space.groups]
    return kernel.solve(grams, parts, np.broadcast_to(shared, parts.shape[:2]), space.size)
