"""Sparse least squares against scikit-learn's."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from lorafind.mix.solve import RIDGE, combine, refine


def drawn(n: int = 12, k: int = 6) -> tuple[np.ndarray, np.ndarray]:
    g = np.random.default_rng(3)
    return g.standard_normal((n, k)), g.standard_normal(k)


@pytest.mark.parametrize("signed", [False, True])
def test_with_all_terms_it_is_ridge_regression(signed: bool) -> None:
    vectors, target = drawn()
    which, weights = combine(vectors, target, 12, signed)
    full = np.zeros(12)
    full[which] = weights
    ridge = Ridge(alpha=RIDGE, fit_intercept=False, positive=not signed, tol=1e-12)
    np.testing.assert_allclose(full, ridge.fit(vectors.T, target).coef_, atol=1e-6)


def test_few_terms_are_the_largest_and_solved_for_again() -> None:
    vectors, target = drawn()
    whole, weights = combine(vectors, target, 12)
    which, again = combine(vectors, target, 2)
    assert which.tolist() == whole[np.argsort(-weights)][:2].tolist()
    ridge = Ridge(alpha=RIDGE, fit_intercept=False, positive=True, tol=1e-12)
    np.testing.assert_allclose(again, ridge.fit(vectors[which].T, target).coef_, atol=1e-6)


def test_rows_alike_share_the_weight() -> None:
    which, weights = combine(
        np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), np.array([2.0, 0.0]), 3
    )
    assert sorted(which.tolist()) == [0, 1]
    np.testing.assert_allclose(weights, 2 / (2 + RIDGE), rtol=1e-9)


def test_nothing_in_the_direction() -> None:
    which, weights = combine(-np.eye(3), np.ones(3), 3)
    assert not len(which) and not len(weights)
    assert len(combine(-np.eye(3), np.ones(3), 3, signed=True)[0]) == 3


def test_refine_goes_up_and_keeps_count() -> None:
    calls = 0

    def measure(weights: np.ndarray) -> float:
        nonlocal calls
        calls += 1
        return -float(np.square(weights - [1.0, -2.0]).sum())

    best, score = refine(measure, np.array([0.4, -5.0]), 200)
    np.testing.assert_allclose(best, [1.0, -2.0], rtol=0.04)
    assert score == measure(best) and calls <= 201
    calls = 0
    start = np.array([0.4, -5.0])
    _, few = refine(measure, start, 5)
    assert calls == 5 and few > measure(start)
