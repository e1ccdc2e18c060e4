"""Scores between labelled LoRAs, without a basis, after centring, and on principal components.

All of it is computed from the inner products of a feature (:mod:`lorafind.bases.kernel`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lorafind.bases.kernel import Fitted, Kernel, averaging, fit
from lorafind.bases.labels import Labelled

#: How coordinates are compared. ``csls``: cosine less the crowding of a data base entry among the
#: queries, as published; ``csls within``: among the data base itself, which needs no other query.
METRICS = ("cosine", "euclidean", "csls", "csls within")


@dataclass(frozen=True)
class Subject:
    """One feature of n labelled LoRAs.

    kernel: inner products (of rows at unit length per group for style); layouts: layout id of
    every LoRA, all equal where one mean serves all; weights: ω of every group; contents: digest of
    every LoRA's content.
    """

    feature: str
    kernel: Kernel
    labels: Sequence[Labelled]
    layouts: np.ndarray
    weights: Mapping[str, float]
    contents: Sequence[str]

    @cached_property
    def artists(self) -> np.ndarray:
        """n names."""
        return np.array([one.artist for one in self.labels])

    @cached_property
    def genres(self) -> np.ndarray:
        """n names, empty where nothing is said."""
        return np.array([one.genre for one in self.labels])

    @cached_property
    def splits(self) -> np.ndarray:
        """n names."""
        return np.array([one.split for one in self.labels])

    def rows(self, split: str) -> np.ndarray:
        """The LoRAs of a split; ``test`` is all that are called test, of whatever set-up."""
        if split == "test":
            return np.flatnonzero(np.char.startswith(self.splits, "test"))
        return np.flatnonzero(self.splits == split)

    @property
    def queries(self) -> tuple[str, ...]:
        """The splits that ask: validation and test, and the set-ups of test where it has any."""
        names = ("validation", "test", "test_same", "test_diff")
        return tuple(name for name in names if len(self.rows(name)))

    def only(self, groups: Sequence[str]) -> Subject:
        """The same over some of the groups."""
        return replace(self, kernel=self.kernel.only(groups))

    def take(self, rows: np.ndarray) -> Subject:
        """Some of the LoRAs."""
        kept = rows.tolist()
        return replace(
            self,
            kernel=self.kernel.take(rows),
            labels=[self.labels[i] for i in kept],
            layouts=self.layouts[rows],
            contents=[self.contents[i] for i in kept],
        )

    def fit(self, train: np.ndarray, most: int) -> Fitted:
        """Principal components of some LoRAs, every one counted once."""
        return fit(self.kernel, self.layouts, np.ones(len(self.labels)), self.weights, train, most)


def plain(subject: Subject) -> np.ndarray:
    """Cosines of the joined groups, n × n; a group that a LoRA lacks counts as zero."""
    kernel = subject.kernel
    return _normed(np.sum([subject.weights[g] ** 2 * gram for g, gram in kernel.grams.items()], 0))


def centred(subject: Subject, means_of: np.ndarray) -> np.ndarray:
    """The same after the means of some LoRAs (per layout, as for a basis) are taken off."""
    kernel, n = subject.kernel, len(subject.labels)
    counted = np.zeros(n)
    counted[means_of] = 1.0
    total = np.zeros((n, n))
    for group, gram in kernel.grams.items():
        present = kernel.present[group]
        if not (counted * present).any():
            continue
        rows, index, _ = averaging(subject.layouts, counted, present & (counted > 0))
        which = [index.get(layout, 0) for layout in subject.layouts.tolist()]
        # ⟨x − μ, y − ν⟩ = ⟨x, y⟩ − ⟨μ, y⟩ − ⟨x, ν⟩ + ⟨μ, ν⟩.
        along = rows @ gram
        moved = gram - along[which] - along[which].T + (along @ rows.T)[np.ix_(which, which)]
        total += subject.weights[group] ** 2 * moved * np.outer(present, present)
    return _normed(total)


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of unit length; a row of zeros stays."""
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 0)


def cosines(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """q × k and n × k → q × n."""
    return unit(one) @ unit(two).T


def nearness(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances with a minus: q × k and n × k → q × n."""
    return 2 * one @ two.T - (one**2).sum(1)[:, None] - (two**2).sum(1)


def _normed(products: np.ndarray) -> np.ndarray:
    size = np.sqrt(np.maximum(np.diag(products), 0.0))
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    return products * scale[:, None] * scale
