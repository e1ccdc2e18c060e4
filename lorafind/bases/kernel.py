"""Joint principal components from inner products alone.

Everything that a basis does to LoRAs (centring, components, coordinates where groups are missing)
is a function of the n × n inner products of each group. Bases are fitted on them and `eval` never
builds a component; a component itself is only a combination of the rows of the feature,
V_g = mix_g · X_g, made once, when a basis is written.

Coordinates: per group the K numbers p_g = ω_g·V_g·(x_g − μ_g). With a set M of groups that LoRAs
share, the coordinates are the least-squares solution on these groups alone,
c_M = (Σ_M V_g·V_gᵀ)⁺ · Σ_M p_g; over all groups of the basis that is the plain projection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

#: A layout with fewer LoRAs (or families) than this shares the pooled mean in proportion.
SHRINK = 30
#: Singular values below this share of the largest are left out of a masked least squares.
RCOND = 1e-3


@dataclass(frozen=True)
class Kernel:
    """Inner products of n LoRAs. grams: group → n × n float64; present: group → n bools."""

    grams: Mapping[str, np.ndarray]
    present: Mapping[str, np.ndarray]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in order."""
        return tuple(self.grams)

    @property
    def count(self) -> int:
        """n."""
        return len(next(iter(self.present.values())))

    def only(self, groups: Sequence[str]) -> Kernel:
        """Some of the groups."""
        kept = [g for g in self.grams if g in groups]
        return Kernel({g: self.grams[g] for g in kept}, {g: self.present[g] for g in kept})

    def take(self, rows: np.ndarray) -> Kernel:
        """Some of the LoRAs."""
        return Kernel(
            {g: gram[np.ix_(rows, rows)] for g, gram in self.grams.items()},
            {g: has[rows] for g, has in self.present.items()},
        )

    def unit(self) -> Kernel:
        """Every LoRA at unit length in every group: the inner products become cosines."""
        grams = {}
        for group, gram in self.grams.items():
            size = np.sqrt(np.maximum(np.diag(gram), 0.0))
            scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
            grams[group] = gram * scale[:, None] * scale
        return Kernel(grams, self.present)


@dataclass(frozen=True)
class Fitted:
    """Principal components of some LoRAs of a kernel, as combinations of their rows.

    train: the rows of the kernel that were fitted; weights: ω of every group; eigenvalues: all of
    them, falling; mix: group → K × n_train; grams: group → K × K, V_g·V_gᵀ; averages: group →
    weights of the means, one row each over the n_train LoRAs; index: group → (layout, −1 for the
    pooled mean) → row of ``averages``; centres: group → rows × K, the projected means; vectors:
    n_train × K, the eigenvectors; views: group → n_train × n_train, its share of the matrix whose
    eigenvectors they are.
    """

    train: np.ndarray
    weights: Mapping[str, float]
    eigenvalues: np.ndarray
    mix: Mapping[str, np.ndarray]
    grams: Mapping[str, np.ndarray]
    averages: Mapping[str, np.ndarray]
    index: Mapping[str, Mapping[int, int]]
    centres: Mapping[str, np.ndarray]
    vectors: np.ndarray
    views: Mapping[str, np.ndarray]

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups, in order."""
        return tuple(self.mix)

    @property
    def size(self) -> int:
        """K, the number of components at hand."""
        return len(next(iter(self.mix.values())))

    def parts(self, kernel: Kernel, layouts: np.ndarray) -> np.ndarray:
        """p_g of every LoRA of the kernel: n × groups × K; 0 where it lacks the group."""
        out = np.zeros((kernel.count, len(self.groups), self.size))
        for position, group in enumerate(self.groups):
            has, index = kernel.present[group], self.index[group]
            rows = np.array([index.get(layout, index[-1]) for layout in layouts.tolist()])
            made = self.weights[group] * (kernel.grams[group][:, self.train] @ self.mix[group].T)
            out[has, position] = (made - self.centres[group][rows])[has]
        return out

    def coordinates(self, kernel: Kernel, layouts: np.ndarray, k: int) -> np.ndarray:
        """The first k coordinates of every LoRA, from the groups that it has: n × k."""
        return solve(
            [self.grams[g] for g in self.groups],
            self.parts(kernel, layouts),
            np.stack([kernel.present[g] for g in self.groups], 1),
            k,
        )


def solve(
    grams: Sequence[np.ndarray], parts: np.ndarray, present: np.ndarray, k: int
) -> np.ndarray:
    """Coordinates on the first k components.

    grams: V_g·V_gᵀ per group; parts: n × groups × K; present: n × groups bools. Returns n × k; 0
    for a LoRA that has none of the groups.
    """
    out = np.zeros((len(parts), k))
    for pattern in np.unique(present, axis=0):
        rows = (present == pattern).all(1)
        if not pattern.any():
            continue
        summed = parts[rows][:, pattern, :k].sum(1)
        if not pattern.all():
            shared = np.sum([grams[i][:k, :k] for i in np.flatnonzero(pattern).tolist()], 0)
            summed = summed @ np.linalg.pinv(shared, rcond=RCOND, hermitian=True).T
        out[rows] = summed
    return out


def averaging(
    layouts: np.ndarray, weights: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, dict[int, int], np.ndarray]:
    """Weights of the means of one group: (rows, layout → row, row of every LoRA).

    Row 0 is the pooled mean; a row of a layout is its own, shrunk to the pooled one.
    """
    own_weights = weights * present
    pooled = own_weights / own_weights.sum()
    rows, index = [pooled], {-1: 0}
    for layout in np.unique(layouts[present]).tolist():
        own = own_weights * (layouts == layout)
        share = min(1.0, own.sum() / SHRINK)
        index[layout] = len(rows)
        rows.append(share * own / own.sum() + (1 - share) * pooled)
    which = np.array([index.get(layout, 0) for layout in layouts.tolist()])
    return np.array(rows), index, which


def fit(
    kernel: Kernel,
    layouts: np.ndarray,
    weights: np.ndarray,
    group_weights: Mapping[str, float],
    train: np.ndarray | None = None,
    most: int | None = None,
) -> Fitted:
    """Principal components over all groups jointly, of the LoRAs ``train`` (default: all).

    layouts: layout id of every LoRA of the kernel; weights: how much each counts (1/|family|);
    group_weights: ω of every group; most: the largest number of components wanted. A group that
    none of the LoRAs has is left out.
    """
    # Queries import this module and fit nothing.
    from scipy.linalg import eigh

    rows_of = np.arange(kernel.count) if train is None else np.asarray(train)
    groups = [g for g in kernel.groups if kernel.present[g][rows_of].any()]
    layouts, weights = layouts[rows_of], weights[rows_of]
    root = np.sqrt(weights)
    centrings, within, views = {}, {}, {}
    for group in groups:
        present = kernel.present[group][rows_of]
        centring = Centring(*averaging(layouts, weights, present), present)
        inside = kernel.grams[group]
        within[group] = inside if train is None else inside[np.ix_(rows_of, rows_of)]
        view = centring.off(centring.off(within[group]).T)
        view *= (group_weights[group] ** 2 * root)[:, None]
        view *= root
        centrings[group], views[group] = centring, view
    values, vectors = eigh(
        np.sum(list(views.values()), 0), overwrite_a=True, check_finite=False, driver="evd"
    )
    values = np.maximum(values[::-1], 0.0)
    # Below this, eigenvalues are the rounding of the products.
    size = int((values > 1e-10 * max(values[0], 1e-300)).sum()) if len(values) else 0
    size = min(size, most) if most is not None else size
    vectors = vectors[:, ::-1][:, :size].copy()
    # An eigenvector has no sign of its own: the LoRA that it says most of gets a positive one.
    strongest = np.abs(vectors).argmax(0)
    vectors *= np.where(vectors[strongest, np.arange(size)] < 0, -1.0, 1.0)
    combined = (vectors / np.sqrt(values[:size])).T * root
    mix, grams, centres, averages, index = {}, {}, {}, {}, {}
    for group in groups:
        averages[group], index[group] = centrings[group].rows, centrings[group].index
        mix[group] = group_weights[group] * centrings[group].through(combined)
        projected = mix[group] @ within[group]
        grams[group] = projected @ mix[group].T
        centres[group] = group_weights[group] * averages[group] @ projected.T
    used = {g: group_weights[g] for g in groups}
    return Fitted(rows_of, used, values, mix, grams, averages, index, centres, vectors, views)


@dataclass(frozen=True)
class Centring:
    """C = P·(1 − M): takes the mean of its layout off every LoRA that has a group.

    rows, index, which: of :func:`averaging` (M is ``rows[which]``); present: n bools, the diagonal
    of P. C is never built: it is n × n, and its product with a matrix n³ operations.
    """

    rows: np.ndarray
    index: Mapping[int, int]
    which: np.ndarray
    present: np.ndarray

    def off(self, matrix: np.ndarray) -> np.ndarray:
        """C·X, for X n × d."""
        out = matrix - (self.rows @ matrix)[self.which]
        out[~self.present] = 0.0
        return np.asarray(out)

    def through(self, matrix: np.ndarray) -> np.ndarray:
        """Y·C, for Y k × n."""
        kept = matrix * self.present
        sums = np.zeros((len(matrix), len(self.rows)))
        for row in range(len(self.rows)):
            sums[:, row] = kept[:, self.which == row].sum(1)
        return np.asarray(kept - sums @ self.rows)
