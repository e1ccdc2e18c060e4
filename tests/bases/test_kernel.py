"""Principal components from inner products against scikit-learn and dense least squares."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

from lorafind.bases import kernel
from lorafind.bases.kernel import Kernel
from tests.bases.made import Dense, styles

ONE = {"ff": 1.0}


def products(matrix: Dense) -> Kernel:
    return Kernel({g: matrix.gram(g) for g in matrix.groups}, matrix.present)


@pytest.mark.parametrize("width", [50, 300, 20_000])
def test_components_and_coordinates_are_those_of_scikit_learn(width: int) -> None:
    rows = styles(8, 10, width, 1.0)[0] + 0.3
    matrix = Dense({"ff": rows}, step=4096)
    found = products(matrix)
    train = np.arange(0, 80, 2)
    everything = np.zeros(80, int)
    fitted = kernel.fit(found, everything, np.ones(80), ONE, train, most=7)
    pca = PCA(7, svd_solver="full").fit(rows[train])
    v = fitted.mix["ff"] @ rows[train]
    assert subspace_angles(v.T, pca.components_.T).max() < 1e-3
    np.testing.assert_allclose(fitted.eigenvalues[:7] / 39, pca.explained_variance_, rtol=1e-4)
    mine = fitted.coordinates(found, everything, 7)
    theirs = pca.transform(rows)
    signs = np.sign((mine * theirs).sum(0))
    np.testing.assert_allclose(mine * signs, theirs, atol=2e-5)


def test_the_gram_is_summed_over_tiles_in_double_precision() -> None:
    rows = np.random.default_rng(0).normal(size=(1100, 130)).astype(np.float32)
    gram = Dense({"ff": rows}, step=7).gram("ff")
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(gram, wide @ wide.T, atol=1e-4)
    assert (gram == gram.T).all()


def test_weighted_groups_are_columns_times_their_weight() -> None:
    rng = np.random.default_rng(1)
    blocks = {"self_attn": rng.normal(size=(30, 90)), "ff": rng.normal(size=(30, 40))}
    weights = {"self_attn": 0.5, "ff": 2.0}
    found = products(Dense(blocks))
    fitted = kernel.fit(found, np.zeros(30, int), np.ones(30), weights, most=4)
    joined = np.concatenate([weights[g] * blocks[g] for g in blocks], 1)
    pca = PCA(4, svd_solver="full").fit(joined)
    v = np.concatenate([fitted.mix[g] @ blocks[g] for g in blocks], 1)
    assert subspace_angles(v.T, pca.components_.T).max() < 1e-3


def test_missing_groups_are_a_masked_least_squares() -> None:
    rng = np.random.default_rng(2)
    blocks = {g: rng.normal(size=(40, 60)) for g in ("self_attn", "cross_attn", "ff")}
    blocks["ff"][30:] = 0
    blocks["cross_attn"][35:] = 0
    found = products(Dense(blocks))
    weights = {"self_attn": 1.0, "cross_attn": 0.5, "ff": 1.0}
    train = np.arange(30)
    fitted = kernel.fit(found, np.zeros(40, int), np.ones(40), weights, train, most=6)
    got = fitted.coordinates(found, np.zeros(40, int), 5)
    for row, groups in (
        (3, tuple(blocks)),
        (31, ("self_attn", "cross_attn")),
        (38, ("self_attn",)),
    ):
        v = np.concatenate([fitted.mix[g][:5] @ blocks[g][train] for g in groups], 1)
        x = np.concatenate(
            [weights[g] * (blocks[g][row] - blocks[g][train].mean(0)) for g in groups]
        )
        np.testing.assert_allclose(got[row], np.linalg.lstsq(v.T, x)[0], atol=1e-4)


def test_weights_of_loras_count_in_means_and_components() -> None:
    rows = np.random.default_rng(3).normal(size=(20, 50))
    weights = np.array([0.5, 0.5] + [1.0] * 18)
    twice = np.concatenate([rows[:1], rows[:1], rows[2:]])
    doubled = products(Dense({"ff": twice}))
    once = products(Dense({"ff": np.concatenate([rows[:1], rows[2:]])}))
    one = kernel.fit(doubled, np.zeros(20, int), weights, ONE)
    two = kernel.fit(once, np.zeros(19, int), np.ones(19), ONE)
    np.testing.assert_allclose(one.eigenvalues[:18], two.eigenvalues[:18], rtol=1e-6)


def test_unit_rows_make_cosines() -> None:
    rows = np.random.default_rng(4).normal(size=(10, 30))
    rows[4] = 0
    found = products(Dense({"ff": rows})).unit().grams["ff"]
    kept = np.delete(rows, 4, 0)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    np.testing.assert_allclose(np.delete(np.delete(found, 4, 0), 4, 1), kept @ kept.T, atol=1e-6)
    assert not found[4].any()
