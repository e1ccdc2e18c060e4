"""The choice of components against collections with planted styles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lorafind.bases.selection import (
    COMPONENTS_COUNT,
    KEEPS,
    LEFT_OVER,
    VIEWED,
    Choice,
    bend,
    choose,
    keeps,
    left_over,
    own_share,
    positive,
    published_rows,
    shared,
)

WIDTH = 4000


def rows(artists: np.ndarray, strength: float, seed: int, views: int = 3) -> list[np.ndarray]:
    """Per view n × WIDTH centred rows of unit length: shared style and separate noise."""
    rng = np.random.default_rng(seed)
    styles = rng.normal(size=(artists.max() + 1, 60))
    found = []
    for _ in range(views):
        directions = np.linalg.qr(rng.normal(size=(WIDTH, 60)))[0]
        x = strength * styles[artists] / np.sqrt(60) @ directions.T
        x += rng.normal(size=x.shape) / np.sqrt(WIDTH)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        found.append(x - x.mean(0))
    return found


def fitted(x: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Eigenvalues and eigenvectors of the joint inner products, falling; the views' own."""
    views = [v @ v.T for v in x]
    values, vectors = np.linalg.eigh(np.sum(views, 0))
    return np.maximum(values[::-1], 0), vectors[:, ::-1], views


def precision(scores: np.ndarray, artists: np.ndarray) -> float:
    """Mean average precision over the whole ranking; query i is of artist i."""
    hits = artists[np.argsort(-scores, axis=1)] == artists[:, None]
    ranks = np.arange(1, hits.shape[1] + 1)
    return float(np.mean((np.cumsum(hits, 1) / ranks * hits).sum(1) / hits.sum(1)))


@pytest.mark.parametrize("artists", [5, 10, 20])
def test_the_bend_is_near_the_number_of_styles(artists: int) -> None:
    values = fitted(rows(np.repeat(np.arange(artists), 10), 0.6, artists))[0]
    # Centring takes one of the styles' directions.
    assert 0 <= bend(values) - (artists - 1) <= 3


def test_a_bend_keeps_at_least_two_and_never_all() -> None:
    assert bend(np.array([3.0, 2.0, 1.0, 0.0])) == 2
    assert bend(np.array([2.0])) == 1
    assert bend(np.zeros(5)) == 0
    # Equal eigenvalues have no bend; three above them are three styles.
    assert bend(np.array([9.0, 8, 7, *[1.0] * 13])) == 3


def test_the_shared_part_by_hand() -> None:
    # The median is 1; of the fourth component a ninth is shared, of the rest less.
    values = np.array([4.0, 2.0, 1.25, 1.125, 1.01, 1.0, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 1.0])
    values = np.sort(values)[::-1]
    assert np.median(values) == 1.0
    np.testing.assert_allclose(shared(values)[:6], [3 / 4, 1 / 2, 1 / 5, 1 / 9, 1 / 9, 1 / 9])
    assert shared(values).min() == 1 / 9


def test_positive_drops_rounding_alone() -> None:
    np.testing.assert_array_equal(positive(np.array([2.0, 1e-3, 1e-12, 0.0])), [2.0, 1e-3])


def test_weights_bring_new_loras_to_the_scale_of_fitted_ones() -> None:
    """The artists' means of LoRAs that were fitted and of others, component by component."""
    artists = np.repeat(np.arange(12), 16)
    (x,) = rows(artists, 0.4, 1, views=1)
    first = np.arange(len(x)) % 2 == 0
    centre = x[first].mean(0)
    _, s, v = np.linalg.svd(x[first] - centre, full_matrices=False)
    choice = choose(s**2)
    assert choice.count == 11
    old = (x[first] - centre) @ v[:11].T
    new = (x[~first] - centre) @ v[:11].T
    styles = np.stack([old[artists[first] == a].mean(0) for a in range(12)])
    seen = np.stack([new[artists[~first] == a].mean(0) for a in range(12)])
    # The paper's scale: the slope through the origin.
    slope = (styles * seen).sum(0) / (seen**2).sum(0)
    assert slope[0] < 1.6 and slope[-1] > 2
    np.testing.assert_allclose(slope * choice.fitted / choice.fresh, 1.0, atol=0.2)


def test_a_weaker_component_weighs_less() -> None:
    values = fitted(rows(np.repeat(np.arange(10), 10), 0.5, 2))[0]
    choice = choose(values)
    assert (np.diff(choice.fitted) < 0).all() and (np.diff(choice.fresh) > 0).all()
    np.testing.assert_allclose(choice.fitted * choice.fresh, 1.0)


def test_two_files_of_a_style_show_no_bend_but_the_groups_agree_on_them() -> None:
    artists = np.repeat(np.arange(30), 2)
    # Twice as many files: the first half is the collection, the other half are queries.
    x = rows(np.concatenate([artists, artists]), 0.2, 3)
    values, vectors, views = fitted([v - v.mean(0) for v in (w[:60] for w in x)])
    alone, together = choose(values), choose(values, vectors, views)
    hollow = [v - np.diag(np.diag(v)) for v in views]
    assert left_over(hollow, vectors[:, : alone.count]) > 2 * LEFT_OVER
    assert left_over(hollow, vectors[:, : together.count]) <= LEFT_OVER
    base, new = np.split(np.concatenate(x, 1), 2)
    _, _, v = np.linalg.svd(base - base.mean(0), full_matrices=False)

    def found(choice: Choice) -> float:
        v_k = v[: choice.count]
        c = (base - base.mean(0)) @ v_k.T * choice.fitted
        q = (new - base.mean(0)) @ v_k.T * choice.fresh
        return precision(q @ (c / np.linalg.norm(c, axis=1, keepdims=True)).T, artists)

    assert found(together) > found(alone) + 0.1


def test_where_the_bend_has_the_styles_the_groups_add_nothing() -> None:
    values, vectors, views = fitted(rows(np.repeat(np.arange(10), 10), 0.6, 4))
    np.testing.assert_array_equal(choose(values, vectors, views).fitted, choose(values).fitted)


def test_loras_that_lack_a_group_are_no_witnesses() -> None:
    x = rows(np.repeat(np.arange(10), 10), 0.6, 4)
    x[2][::3] = 0.0
    values, vectors, views = fitted(x)
    has = np.diag(views[2]) > 0
    assert choose(values, vectors, views).count == bend(values)
    # What their other groups say is not asked: noise in its place changes nothing.
    noise = np.random.default_rng(0).normal(size=(100, 100)) * ~np.outer(has, has)
    loud = [v + noise + noise.T + 99 * np.diag(~has) for v in views[:2]] + [views[2]]
    assert choose(values, vectors, loud).count == bend(values)


def test_too_few_views_or_loras_leave_it_to_the_bend() -> None:
    values, vectors, views = fitted(rows(np.repeat(np.arange(30), 2), 0.6, 3))
    assert choose(values, vectors, views).count > bend(values)
    assert choose(values, vectors, views[:2]).count == bend(values)
    only = np.outer(np.arange(60) < VIEWED - 1, np.arange(60) < VIEWED - 1)
    assert choose(values, vectors, [v * only for v in views]).count == bend(values)


def test_left_over_against_covariances_of_pairs() -> None:
    _, vectors, views = fitted(rows(np.repeat(np.arange(8), 5), 0.6, 5))
    hollow = [v - np.diag(np.diag(v)) for v in views]
    upper = np.triu_indices(40, 1)

    def agreement(matrices: Sequence[np.ndarray]) -> float:
        c = np.cov([m[upper] for m in matrices], bias=True)
        return float(c.sum() - np.trace(c))

    out = np.eye(40) - vectors[:, :4] @ vectors[:, :4].T
    expected = agreement([out @ h @ out for h in hollow]) / agreement(hollow)
    assert left_over(hollow, vectors[:, :4]) == pytest.approx(expected, rel=1e-9)
    # Any basis of the same space serves.
    turned = vectors[:, :4] @ np.array([[2.0, 1, 0, 0], [0, 1, 0, 3], [1, 0, 1, 0], [0, 0, 1, 1]])
    assert left_over(hollow, turned) == pytest.approx(expected, rel=1e-9)


def test_the_choice_is_bounded() -> None:
    values, vectors, views = fitted(rows(np.repeat(np.arange(30), 2), 0.6, 3))
    assert choose(values, vectors, views, most=4).count == 4
    assert choose(values, most=3).count == 3


def test_keeps_tells_a_basis_that_knows_the_styles_from_one_that_does_not() -> None:
    artists = np.repeat(np.arange(12), 6)
    x = rows(artists, 0.5, 6)
    raw = [v @ v.T for v in x]

    def in_basis(directions: list[np.ndarray]) -> list[np.ndarray]:
        found = []
        for v, d in zip(x, directions, strict=True):
            c = np.linalg.lstsq(d, v.T, rcond=None)[0].T
            found.append(c @ c.T)
        return found

    known = [np.stack([v[artists == a].mean(0) for a in range(12)]).T for v in x]
    others = rows(np.repeat(np.arange(3), 6), 0.5, 60)
    strange = [np.stack([o[6 * a : 6 * a + 6].mean(0) for a in range(3)]).T for o in others]
    same, other = keeps(raw, in_basis(known)), keeps(raw, in_basis(strange))
    assert same is not None and other is not None
    assert same > KEEPS and other < 0.5
    assert keeps(raw, raw) == pytest.approx(1.0)


def test_keeps_says_nothing_where_groups_agree_on_nothing() -> None:
    noise = [v @ v.T for v in rows(np.arange(60), 0.0, 7)]
    assert keeps(noise, noise) is None


def test_published_components_count_as_forty_loras() -> None:
    rng = np.random.default_rng(7)
    x = rng.normal(size=(200, 30)) * np.linspace(3, 1, 30)
    _, s, v = np.linalg.svd(x, full_matrices=False)
    made = published_rows(v, s**2, 200)
    np.testing.assert_allclose(made.T @ made, COMPONENTS_COUNT * (x.T @ x) / 200, atol=1e-9)


def test_own_mean_gains_weight_with_the_collection() -> None:
    assert own_share(0) == 0.0
    assert own_share(10) == pytest.approx(0.5)
    assert own_share(1000) > 0.99
