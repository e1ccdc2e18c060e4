"""How well LoRAs find others of their artist, and how well they fall into clusters.

All figures are shares between 0 and 1. A ranking is by falling score; of equal scores the one that
comes first in the data base is first.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: How many of the first answers are looked at for their genre.
FIRST = 10
#: Neighbours that CSLS takes as the neighbourhood.
NEIGHBOURS = 10
#: k-means is run with this many seeds, which gives means and standard deviations …
SEEDS = 10
#: … each of them from this many starts, of which the tightest clusters are kept.
STARTS = 3


@dataclass(frozen=True)
class Retrieval:
    """Means over the queries that have something to find.

    map: average precision over the whole ranking. map_at: average precision over the hits within
    the first R answers, R the number of LoRAs of the query's artist in the data base; this is what
    the paper's figures fit (its R is 24). recall_at: the share of the artist's LoRAs among the
    first R. genre_precision: the share of the query's genre among the first 10, None where there
    are no genres.
    """

    queries: int
    map: float
    map_at: float
    recall_at: float
    genre_precision: float | None


@dataclass(frozen=True)
class Clusters:
    """Adjusted Rand index and normalised mutual information: mean and standard deviation."""

    ari: float
    ari_sd: float
    nmi: float
    nmi_sd: float


def ranking(scores: np.ndarray) -> np.ndarray:
    """Data base positions by falling score, q × n of q × n scores."""
    return np.argsort(-scores, axis=1, kind="stable")


def average_precision(relevant: np.ndarray) -> np.ndarray:
    """Per query, over the whole ranking: q numbers of q × n bools in ranked order.

    The mean of the precisions at the ranks of all that is relevant; NaN where nothing is.
    """
    hits = relevant.cumsum(1)
    precision = hits / np.arange(1, relevant.shape[1] + 1)
    with np.errstate(invalid="ignore"):
        return (precision * relevant).sum(1) / relevant.sum(1)


def average_precision_at(relevant: np.ndarray, first: np.ndarray) -> np.ndarray:
    """The same over the hits within the first answers alone; 0 without a hit.

    relevant: q × n bools in ranked order; first: how many answers are looked at, q ints.
    """
    seen = relevant & (np.arange(relevant.shape[1]) < first[:, None])
    return np.nan_to_num(average_precision(seen))


def mean_average_precision(scores: np.ndarray, relevant: np.ndarray) -> float:
    """Over the whole ranking; scores: q × n; relevant: q × n bools, in data base order.

    Queries without anything relevant are left out; NaN when none is left.
    """
    found = average_precision(np.take_along_axis(relevant, ranking(scores), 1))
    found = found[~np.isnan(found)]
    return float(found.mean()) if len(found) else float("nan")


def retrieval(
    scores: np.ndarray, relevant: np.ndarray, genre: np.ndarray | None = None
) -> Retrieval | None:
    """All figures of one set of queries; None where no query has anything to find.

    scores: q × n; relevant, genre: q × n bools in data base order: the same artist, the same genre
    (a query without a genre has a row of False and does not count).
    """
    size = relevant.sum(1)
    asked = size > 0
    if not asked.any():
        return None
    order = ranking(scores[asked])
    size = size[asked]
    hits = np.take_along_axis(relevant[asked], order, 1)
    within = hits & (np.arange(hits.shape[1]) < size[:, None])
    share = None
    if genre is not None:
        genre = genre[asked]
        known = genre.any(1)
        first = np.take_along_axis(genre, order, 1)[known, :FIRST]
        share = float(first.mean()) if known.any() else None
    return Retrieval(
        int(asked.sum()),
        float(average_precision(hits).mean()),
        float(average_precision_at(hits, size).mean()),
        float((within.sum(1) / size).mean()),
        share,
    )


def csls(scores: np.ndarray, own: np.ndarray | None = None) -> np.ndarray:
    """Cross-domain similarity local scaling (Conneau et al. 2018, section 2.3) of cosines, q × n.

    2·cos(x, y) − r(y), with r(y) the mean cosine of data base entry y with the 10 queries nearest
    to it; the term of the query does not change its ranking. own: the n × n cosines within the
    data base; with them r(y) is over the 10 nearest other entries, so that no other query is
    needed.
    """
    if own is None:
        near = scores
    else:
        near = own.copy()
        np.fill_diagonal(near, -np.inf)
    k = min(NEIGHBOURS, len(near) - (own is not None))
    if k < 1:
        return scores
    return 2 * scores - np.sort(near, axis=0)[-k:].mean(0)


def clusters(rows: np.ndarray, artists: Sequence[str], seed: int = 0) -> Clusters | None:
    """k-means with as many clusters as artists against the artists, over 10 seeds.

    rows: n × k. None where no artist has two LoRAs, or there is only one: any answer is right.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    names, artist = np.unique(artists, return_inverse=True)
    number = len(names)
    if number < 2 or number == len(artists):
        return None
    ari, nmi = [], []
    with warnings.catch_warnings():
        # Copies among the LoRAs leave fewer distinct points than clusters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        for state in range(seed, seed + SEEDS):
            found = KMeans(number, n_init=STARTS, random_state=state).fit_predict(rows)
            ari.append(adjusted_rand_score(artist, found))
            nmi.append(normalized_mutual_info_score(artist, found))
    return Clusters(
        float(np.mean(ari)), float(np.std(ari)), float(np.mean(nmi)), float(np.std(nmi))
    )
