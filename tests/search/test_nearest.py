"""The order of the answers of ``similar`` is that of one full sort."""

from __future__ import annotations

import numpy as np
import pytest

from lorafind.search import similar
from lorafind.search.scores import Scored
from lorafind.search.similar import _significance, _Variants, nearest, tail


@pytest.mark.parametrize("n", [1, 5, 4096, 4097, 50_000])
@pytest.mark.parametrize("values", [7, 1000, 10**9])
def test_as_a_full_sort(n: int, values: int) -> None:
    """With few different values, ties reach over every border between two steps."""
    rng = np.random.default_rng(n)
    scores = (rng.integers(0, values, n) / values).astype(np.float32)
    ids = rng.permutation(n) + 1
    found = np.concatenate(list(nearest(scores, ids, 256)))
    whole = np.lexsort((ids, -scores))
    assert np.array_equal(found, whole)
    assert np.array_equal(scores[found], scores[np.argsort(-scores, kind="stable")])


def test_numbers_that_are_none_come_last() -> None:
    scores = np.array([np.nan, 0.5, -1.0, np.nan, 0.7], np.float32)
    order = np.concatenate(list(nearest(scores, np.arange(5), 2)))
    assert order.tolist() == [4, 1, 2, 0, 3]


def scored(families: np.ndarray) -> Scored:
    n = len(families)
    rng = np.random.default_rng(0)
    return Scored(np.arange(n) + 1, np.ones(n, np.int64), families, rng.standard_normal(n))


def test_variants_are_the_others_of_the_family() -> None:
    ids = np.arange(100) + 1
    families = ids.copy()
    families[[10, 20, 30]] = 5
    # The head of this family is of another architecture.
    families[[50, 51]] = 777
    variants = _Variants(scored(families))
    assert [variants.of(family) for family in (1, 5, 777)] == [0, 3, 1]


def test_every_family_speaks_once() -> None:
    ids = np.arange(200) + 1
    families = ids.copy()
    families[100:150] = 7
    z, strangers = _significance(scored(families), {1, 2})
    assert strangers == {1: 148}
    sample = scored(families).scores[np.r_[2:100, 150:200]]
    low, middle, high = np.quantile(sample, [0.25, 0.5, 0.75])
    assert z == pytest.approx((scored(families).scores - middle) / ((high - low) / 1.349))


def test_tail_is_that_of_student() -> None:
    from scipy.stats import t

    for z in (-3.0, 0.0, 1.0, 2.5, 6.0):
        assert tail(z) == pytest.approx(t.sf(z, similar.TAIL), rel=1e-9)
