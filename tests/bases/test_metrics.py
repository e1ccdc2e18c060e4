"""Figures of retrieval and clusters against scikit-learn and against counting by hand."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import log

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from lorafind.bases import metrics


def ranked(*relevant: int) -> np.ndarray:
    """One query whose answers come in this order: 1 where relevant."""
    return np.array([relevant], bool)


def test_average_precision_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 60))
    relevant = rng.random((40, 60)) < 0.2
    relevant[:, 0] = True
    each = [average_precision_score(r, s) for r, s in zip(relevant, scores, strict=True)]
    order = metrics.ranking(scores)
    found = metrics.average_precision(np.take_along_axis(relevant, order, 1))
    np.testing.assert_allclose(found, each, atol=1e-12)
    assert metrics.mean_average_precision(scores, relevant) == pytest.approx(np.mean(each))


def test_average_precision_by_hand() -> None:
    # Hits at ranks 1, 3 and 6.
    found = metrics.average_precision(ranked(1, 0, 1, 0, 0, 1))
    assert found[0] == pytest.approx(float(Fraction(1) + Fraction(2, 3) + Fraction(3, 6)) / 3)
    assert np.isnan(metrics.average_precision(ranked(0, 0))[0])


@pytest.mark.parametrize(
    ("relevant", "first", "expected"),
    [
        # Of three hits the first three answers hold two, at ranks 1 and 3.
        ((1, 0, 1, 0, 0, 1), 3, (1 + 2 / 3) / 2),
        # One hit, at rank 2: the mean is over this one alone.
        ((0, 1, 0, 1, 1), 3, 1 / 2),
        ((0, 0, 0, 1, 1, 1), 3, 0.0),
        ((1, 1, 1, 0, 0), 3, 1.0),
    ],
)
def test_the_papers_precision_looks_at_the_first_answers(
    relevant: tuple[int, ...], first: int, expected: float
) -> None:
    found = metrics.average_precision_at(ranked(*relevant), np.array([first]))
    assert found[0] == pytest.approx(expected)


def test_all_figures_of_two_queries_by_hand() -> None:
    # Query 0: artist a, answers a b a b (by falling score); query 1: artist c, b c b b; the third
    # asks for an artist that is not there.
    scores = np.array([[4.0, 3, 2, 1, 0], [1, 4, 0, 2, 3], [1, 2, 3, 4, 5]])
    artists = np.array(["a", "b", "a", "b", "c"])
    relevant = np.array(["a", "c", "z"])[:, None] == artists
    genres = np.array(["x", "y", "x", "y", "y"])
    genre = np.array(["x", "", "x"])[:, None] == genres
    found = metrics.retrieval(scores, relevant, genre)
    assert found is not None
    assert found.queries == 2
    # Query 0: hits at 1 and 3; query 1: its order is b c b a a, the hit at 2.
    assert found.map == pytest.approx(((1 + 2 / 3) / 2 + 1 / 2) / 2)
    # R is 2 and 1.
    assert found.map_at == pytest.approx((1 + 0) / 2)
    assert found.recall_at == pytest.approx((1 / 2 + 0) / 2)
    # Only query 0 has a genre; all five answers are looked at.
    assert found.genre_precision == pytest.approx(2 / 5)


def test_genre_precision_counts_ten_answers() -> None:
    scores = -np.arange(20.0)[None]
    genre = np.zeros((1, 20), bool)
    genre[0, [0, 3, 9, 10, 11]] = True
    found = metrics.retrieval(scores, np.ones((1, 20), bool), genre)
    assert found is not None and found.genre_precision == pytest.approx(0.3)


def test_nothing_to_find() -> None:
    assert metrics.retrieval(np.ones((2, 3)), np.zeros((2, 3), bool)) is None
    assert np.isnan(metrics.mean_average_precision(np.ones((2, 3)), np.zeros((2, 3), bool)))
    found = metrics.retrieval(np.ones((1, 3)), np.ones((1, 3), bool), np.zeros((1, 3), bool))
    assert found is not None and found.genre_precision is None


def test_csls_by_hand() -> None:
    rng = np.random.default_rng(1)
    scores, own = rng.normal(size=(25, 15)), rng.normal(size=(15, 15))
    own = own + own.T
    by_queries = np.empty_like(scores)
    within = np.empty_like(scores)
    for y in range(15):
        nearest = sorted(scores[:, y])[-10:]
        others = sorted(np.delete(own[y], y))[-10:]
        for x in range(25):
            by_queries[x, y] = 2 * scores[x, y] - sum(nearest) / 10
            within[x, y] = 2 * scores[x, y] - sum(others) / 10
    np.testing.assert_allclose(metrics.csls(scores), by_queries)
    np.testing.assert_allclose(metrics.csls(scores, own), within)


def test_csls_takes_a_hub_back() -> None:
    # Entry 0 is near to everybody; every other entry is the right answer of one query.
    scores = 0.5 * np.eye(30, 31, 1)
    scores[:, 0] = 0.6
    relevant = np.eye(30, 31, 1, dtype=bool)
    assert metrics.mean_average_precision(scores, relevant) == pytest.approx(0.5)
    assert metrics.mean_average_precision(metrics.csls(scores), relevant) == 1.0


def by_pairs(one: list[int], two: list[int]) -> float:
    """Adjusted Rand index from all pairs."""
    pairs = list(combinations(range(len(one)), 2))
    a = {p for p in pairs if one[p[0]] == one[p[1]]}
    b = {p for p in pairs if two[p[0]] == two[p[1]]}
    expected = len(a) * len(b) / len(pairs)
    return (len(a & b) - expected) / ((len(a) + len(b)) / 2 - expected)


def by_entropies(one: list[int], two: list[int]) -> float:
    """Mutual information over the mean of the entropies."""

    def entropy(labels: list[object]) -> float:
        shares = [labels.count(name) / len(labels) for name in set(labels)]
        return -sum(p * log(p) for p in shares)

    a, b = entropy(list(one)), entropy(list(two))
    return (a + b - entropy(list(zip(one, two, strict=True)))) / ((a + b) / 2)


def test_clusters_by_hand() -> None:
    # Three heaps far apart, which k-means finds from any start; two LoRAs lie in another's heap.
    heap = [0] * 5 + [1] * 5 + [2] * 5
    artist = [0] * 4 + [1] + [1] * 5 + [2] * 4 + [0]
    rng = np.random.default_rng(2)
    rows = 100.0 * np.eye(3)[heap] + rng.normal(size=(15, 3))
    found = metrics.clusters(rows, [f"artist {a}" for a in artist])
    assert found is not None
    assert found.ari == pytest.approx(by_pairs(artist, heap))
    assert found.nmi == pytest.approx(by_entropies(artist, heap))
    assert 0.5 < found.ari < 0.9
    assert found.ari_sd == pytest.approx(0, abs=1e-12)
    assert found.nmi_sd == pytest.approx(0, abs=1e-12)


def test_clusters_of_noise_differ_with_the_seed() -> None:
    rows = np.random.default_rng(3).normal(size=(60, 20))
    artists = [str(i // 6) for i in range(60)]
    found = metrics.clusters(rows, artists)
    assert found is not None and abs(found.ari) < 0.1 and found.ari_sd > 0
    assert found == metrics.clusters(rows, artists)
    assert found != metrics.clusters(rows, artists, seed=1000)


def test_clusters_that_say_nothing() -> None:
    rows = np.random.default_rng(4).normal(size=(4, 2))
    assert metrics.clusters(rows, ["a", "b", "c", "d"]) is None
    assert metrics.clusters(rows, ["a"] * 4) is None
    assert metrics.clusters(np.zeros((4, 2)), ["a", "a", "b", "b"]) is not None
