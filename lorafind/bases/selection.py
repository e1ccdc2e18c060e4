"""How many components a collection without labels keeps, and what each of them weighs.

The rule rests on `python -m tests.benchmarks.study`. Three things decide:

- *Where the eigenvalues bend*: at least half of them belong to what LoRAs do not share.
- *What the groups still agree on*: self-attention, cross-attention and feed-forward are separate
  views of one training with separate noise. If, after the kept components are taken out, two views
  still agree on which LoRAs are alike, styles were cut off (a folder with two files of each style
  has as many styles as half its files, and no bend shows them); then more components are kept.
- *Drift* (the paper's section 3.3, here without labels): a LoRA that was fitted carries its own
  noise in its coordinates. Of the variance λ of a component only the share ρ = (λ − m)/λ is common
  to LoRAs (m: the median eigenvalue). A LoRA that was not fitted, every query above all, has that
  share alone: its coordinate falls short by the factor ρ. So a fitted LoRA's coordinates are taken
  times √ρ, every other's times 1/√ρ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 128
#: The share of what groups agree on that may be left outside the kept components.
LEFT_OVER = 0.05
#: Fewer views, or views of fewer LoRAs, say too little: cross-attention alone is too noisy a
#: witness for self-attention.
VIEWS = 3
VIEWED = 20
#: ρ is taken for at least this.
LEAST_SHARED = 1 / 9
#: A published mean counts as this many LoRAs when it is joined with the collection's own.
MEAN_COUNTS = 10
#: Published components count as this many LoRAs beside the collection's own.
COMPONENTS_COUNT = 40
#: Published components serve a collection if they keep this share of what one view of its LoRAs
#: tells about the others.
KEEPS = 0.9
#: Groups agree on likenesses where these correlate by more than this over pairs of LoRAs.
AGREE = 0.05


@dataclass(frozen=True)
class Choice:
    """k components. fitted: what the coordinates of LoRAs that were fitted are multiplied with (k
    numbers); fresh: the same for every other LoRA."""

    fitted: np.ndarray
    fresh: np.ndarray

    @property
    def count(self) -> int:
        """k."""
        return len(self.fitted)


def choose(
    eigenvalues: np.ndarray,
    vectors: np.ndarray | None = None,
    views: Sequence[np.ndarray] = (),
    most: int = MOST,
) -> Choice:
    """Components to keep and their weights.

    eigenvalues: all of a fit, falling; vectors: n × ≥ k, the eigenvectors of the n × n inner
    products, in the same order; views: per group the centred inner products ω²·X_g·X_gᵀ, n × n
    (rows of zeros where a LoRA lacks the group). Without vectors and at least VIEWS views the bend
    alone decides.

    Coordinates where groups are missing come first (masked least squares on the first k
    components), then the weights.
    """
    values = positive(eigenvalues)
    k = min(bend(values), most)
    if vectors is not None and len(views) >= VIEWS:
        has = np.logical_and.reduce([np.diag(view) > 0 for view in views])
        if has.sum() >= VIEWED:
            hollow = [_hollow(view[np.ix_(has, has)]) for view in views]
            limit = min(len(values) // 2, most, vectors.shape[1])
            least = np.inf
            for count in _steps(k, limit):
                left = left_over(hollow, vectors[has, :count])
                if left < least:
                    k, least = count, left
                if left <= LEFT_OVER:
                    break
    share = shared(values)[:k]
    return Choice(np.sqrt(share), 1 / np.sqrt(share))


def positive(eigenvalues: np.ndarray) -> np.ndarray:
    """The eigenvalues that are more than rounding."""
    return eigenvalues[eigenvalues > 1e-9 * max(eigenvalues.max(initial=0.0), 1e-30)]


def bend(eigenvalues: np.ndarray) -> int:
    """How many eigenvalues stand out.

    Half of them and more belong to what LoRAs do not share; they lie near a straight line over
    their rank. The line through their median and upper quartile is followed to the first rank; what
    lies above stands out. At least 2.
    """
    values = positive(eigenvalues)
    if len(values) < 4:
        return min(2, len(values))
    middle, upper = np.quantile(values, [0.5, 0.75])
    above = int((values > middle + 2 * (upper - middle)).sum())
    return int(np.clip(above, 2, len(values) - 1))


def shared(eigenvalues: np.ndarray) -> np.ndarray:
    """ρ per component: the share of its variance that is common to LoRAs, LEAST_SHARED to 1."""
    values = positive(eigenvalues)
    return np.asarray(np.maximum((values - np.median(values)) / values, LEAST_SHARED))


def left_over(hollow: Sequence[np.ndarray], vectors: np.ndarray) -> float:
    """The share of what groups agree on that lies outside some components.

    hollow: per group inner products n × n with a diagonal of zeros; vectors: n × k. Agreement is
    the covariance of two groups over all pairs of LoRAs, summed over pairs of groups; about 0 to 1,
    1 where the groups agree on nothing to begin with.
    """
    whole = _agreement(hollow)
    if whole <= 0:
        return 0.0
    basis = np.linalg.qr(vectors)[0]
    rest = []
    for view in hollow:
        left = view - basis @ (basis.T @ view)
        rest.append(_hollow(left - (left @ basis) @ basis.T))
    return _agreement(rest) / whole


def keeps(raw: Sequence[np.ndarray], projected: Sequence[np.ndarray]) -> float | None:
    """How well likeness in a basis predicts likeness in other groups, against likeness without it.

    raw: per view inner products n × n of a collection's LoRAs after the mean; projected: the same
    of their coordinates in the basis, found from that view alone. Returns the ratio of the mean
    correlations over all ordered pairs of views: a basis that throws away what is new to it scores
    low (0.2 to 0.8 in the study), one that knows the styles scores 0.93 to 1.1.
    """
    upper = np.triu_indices(len(raw[0]), 1)
    with_basis, without = [], []
    for i, mine in enumerate(raw):
        for j, other in enumerate(raw):
            if i != j:
                without.append(np.corrcoef(mine[upper], other[upper])[0, 1])
                with_basis.append(np.corrcoef(projected[i][upper], other[upper])[0, 1])
    # Where groups do not agree on anything, nothing can be told.
    return float(np.mean(with_basis) / np.mean(without)) if np.mean(without) > AGREE else None


def own_share(families: int) -> float:
    """The weight of a collection's own mean beside a published one: n/(n + 10)."""
    return families / (families + MEAN_COUNTS)


def published_rows(components: np.ndarray, eigenvalues: np.ndarray, loras: int) -> np.ndarray:
    """Published components as rows to be fitted together with a collection's own centred rows.

    components: k × d, orthonormal; eigenvalues: k, of the sum over ``loras`` LoRAs. Their
    covariance counts as COMPONENTS_COUNT LoRAs, so that n own ones weigh n/(n + 40). Returns k × d.
    """
    return np.sqrt(COMPONENTS_COUNT / loras * eigenvalues)[:, None] * components


def _hollow(matrix: np.ndarray) -> np.ndarray:
    # A LoRA's product with itself holds its noise, and would be agreement of nothing.
    return matrix - np.diag(np.diag(matrix))


def _agreement(hollow: Sequence[np.ndarray]) -> float:
    pairs = len(hollow[0]) * (len(hollow[0]) - 1)
    total = 0.0
    for i, one in enumerate(hollow):
        for other in hollow[:i]:
            total += np.vdot(one, other) / pairs - one.sum() * other.sum() / pairs**2
    return float(total)


def _steps(first: int, last: int) -> list[int]:
    return sorted({round(k) for k in np.linspace(first, max(first, last), 12)})
