"""Groups among vectors: k-means as in the paper (section 4.1), or by density (HDBSCAN).

They are found on a sample of bounded size; every other vector is then given a group by
:meth:`Groups.of`, so that memory and time do not grow with the collection.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

#: So many vectors decide on the groups; the density of 10,000 takes seconds, of 100,000 hours.
SAMPLE = 10_000
#: Fewer LoRAs than this are no group by density.
LEAST = 3
#: Starts of k-means, of which the tightest counts.
STARTS = 10
#: The seed of k-means: the same groups at every run.
SEED = 0
_NONE = -1


@dataclass(frozen=True)
class Groups:
    """What was found among n vectors.

    vectors: n × d float64; labels: n numbers from 0, −1 for those of no group (density only);
    centres: groups × d, the means of k-means, None by density; reach: per group the farthest that
    one of its vectors lies from its nearest other in the group (infinite for k-means).
    """

    vectors: np.ndarray
    labels: np.ndarray
    centres: np.ndarray | None
    reach: np.ndarray

    def __len__(self) -> int:
        return int(self.labels.max(initial=_NONE)) + 1

    def of(self, vectors: np.ndarray) -> np.ndarray:
        """The groups of other vectors (m × d), −1 where none fits.

        k-means: the nearest mean. By density: the group of the nearest vector, where that is not
        farther than the members of that group are from one another.
        """
        from sklearn.metrics import pairwise_distances_argmin_min

        if not len(self) or not len(vectors):
            return np.full(len(vectors), _NONE)
        if self.centres is not None:
            return np.asarray(pairwise_distances_argmin_min(vectors, self.centres)[0])
        where, apart = pairwise_distances_argmin_min(vectors, self.vectors)
        found = self.labels[where]
        return np.where(apart <= self.reach[found], found, _NONE)


def by_number(vectors: np.ndarray, number: int) -> Groups:
    """k-means with ``number`` groups. Raises ValueError for fewer vectors than groups."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if not 1 <= number <= len(vectors):
        raise ValueError(f"{number} groups of {len(vectors)} vectors")
    with warnings.catch_warnings():
        # Equal vectors leave fewer groups than were asked for.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(number, n_init=STARTS, random_state=SEED).fit(vectors)
    used, labels = np.unique(fitted.labels_, return_inverse=True)
    return Groups(vectors, labels, fitted.cluster_centers_[used], np.full(len(used), np.inf))


def by_density(vectors: np.ndarray, least: int = LEAST) -> Groups:
    """HDBSCAN (Campello, Moulavi and Sander 2013): groups of at least ``least`` vectors.

    A vector counts as dense by its nearest neighbour alone: LoRAs of one style are few.
    """
    from sklearn.cluster import HDBSCAN

    if least < 2:
        raise ValueError(f"a group of at least {least}: it takes two")
    if len(vectors) < least:
        return Groups(vectors, np.full(len(vectors), _NONE), None, np.zeros(0))
    # scikit-learn counts a vector among its own neighbours.
    found = HDBSCAN(min_cluster_size=least, min_samples=2, copy=True).fit(vectors)
    labels = np.asarray(found.labels_, np.int64)
    return Groups(vectors, labels, None, _reach(vectors, labels))


def _reach(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    reach = np.zeros(int(labels.max(initial=_NONE)) + 1)
    for label in range(len(reach)):
        own = vectors[labels == label]
        # Without vectors of its own it asks for neighbours of each among the others.
        apart, _ = NearestNeighbors(n_neighbors=1).fit(own).kneighbors()
        reach[label] = apart.max()
    return reach


def outliers(scores: np.ndarray) -> np.ndarray:
    """Which of n scores to a centre are unusually low: below Q₁ − 3·(Q₃ − Q₁).

    Tukey's outer fence; the inner one (1.5) calls one of every few in a small group unusual.
    """
    if not len(scores):
        return np.zeros(0, bool)
    low, high = np.quantile(scores, [0.25, 0.75])
    return np.asarray(scores < low - 3.0 * (high - low))
