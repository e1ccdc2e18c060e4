"""The collection's basis against dense linear algebra written from the definition."""

from __future__ import annotations

import numpy as np
import pytest

from lorafind.bases.basis import Basis, from_stored, to_stored
from lorafind.bases.collection import (
    WEIGHTS,
    Sample,
    bend,
    coordinates,
    fit,
    gram,
    unit_rows,
)
from lorafind.bases.kernel import SHRINK

N, D = 60, 400
GROUPS = ("self_attn", "cross_attn", "ff")


def made(seed: int = 0) -> Sample:
    """60 LoRAs of two layouts (the second without ff) around six styles, with unequal weights."""
    rng = np.random.default_rng(seed)
    artist = np.arange(N) % 6
    layouts = np.where(np.arange(N) % 4 == 0, 8, 3)
    styles = {}
    for g in GROUPS:
        rows = rng.normal(size=(6, D))[artist] + rng.normal(size=(N, D)) + 0.5
        styles[g] = np.clip(rows * 25, -127, 127).astype(np.int8)
    styles["ff"][layouts == 8] = 0
    return Sample(styles, layouts, rng.choice([1.0, 0.5], N))


def dense(sample: Sample) -> np.ndarray:
    """Weighted, centred feature rows, n × 3·D, as DESIGN 4 says them."""
    blocks = []
    for g in GROUPS:
        rows = sample.styles[g].astype(np.float64)
        size = np.linalg.norm(rows, axis=1)
        has = size > 0
        rows[has] /= size[has, None]
        w = sample.weights * has
        pooled = (w[:, None] * rows).sum(0) / w.sum()
        centred = np.zeros_like(rows)
        for layout in (3, 8):
            here = (sample.layouts == layout) & has
            if not here.any():
                continue
            own = (w[here, None] * rows[here]).sum(0) / w[here].sum()
            share = min(1.0, w[here].sum() / SHRINK)
            centred[here] = rows[here] - (share * own + (1 - share) * pooled)
        blocks.append(WEIGHTS[g] * centred)
    return np.concatenate(blocks, 1)


def test_components_are_those_of_the_dense_matrix() -> None:
    sample = made()
    space = fit(sample, GROUPS, components=5)
    x = dense(sample) * np.sqrt(sample.weights)[:, None]
    _, s, vt = np.linalg.svd(x, full_matrices=False)
    np.testing.assert_allclose(space.eigenvalues[:20], s[:20] ** 2, rtol=1e-5)
    mine = np.concatenate([space.components[g] for g in GROUPS], 1).astype(np.float64)
    # Cosines of the principal angles between the two subspaces.
    angles = np.linalg.svd(mine @ vt[:5].T)[1]
    np.testing.assert_allclose(angles, 1.0, atol=1e-6)
    np.testing.assert_allclose(mine @ mine.T, np.eye(5), atol=1e-5)


def test_embeddings_are_projections_of_centred_rows() -> None:
    sample = made()
    space = fit(sample, GROUPS, components=4)
    x = dense(sample)
    v = np.concatenate([space.components[g] for g in space.groups], 1).astype(np.float64)
    parts = np.stack(
        [
            space.project(g, unit_rows(sample.styles[g]))
            - np.array([space.centre(g, int(k)) for k in sample.layouts])
            for g in space.groups
        ],
        1,
    )
    full = sample.layouts == 3
    np.testing.assert_allclose(coordinates(space, parts, GROUPS)[full], (x @ v.T)[full], atol=1e-5)


@pytest.mark.parametrize("groups", [("self_attn",), ("self_attn", "cross_attn"), ("ff",)])
def test_missing_groups_are_a_masked_least_squares(groups: tuple[str, ...]) -> None:
    sample = made()
    space = fit(sample, GROUPS, components=4)
    columns = np.concatenate([np.arange(D) + D * GROUPS.index(g) for g in groups])
    v = np.concatenate([space.components[g] for g in GROUPS], 1).astype(np.float64)[:, columns]
    x = dense(sample)[:, columns]
    expected = np.linalg.lstsq(v.T, x.T, rcond=None)[0].T
    parts = np.stack(
        [
            WEIGHTS[g] * 0
            + space.project(g, unit_rows(sample.styles[g]))
            - np.array([space.centre(g, int(k)) for k in sample.layouts])
            for g in space.groups
        ],
        1,
    )
    has = np.logical_and.reduce([sample.styles[g].any(1) for g in groups])
    got = coordinates(space, parts, groups)
    np.testing.assert_allclose(got[has], expected[has], atol=1e-4)


def test_an_unknown_layout_is_centred_on_the_pooled_mean() -> None:
    space = fit(made(), GROUPS, components=3)
    np.testing.assert_array_equal(space.centre("ff", 999), space.means[-1]["ff"])


def test_gram_is_blockwise_the_cosine_matrix() -> None:
    rng = np.random.default_rng(3)
    styles = rng.integers(-127, 128, (600, 50)).astype(np.int8)
    rows = styles / np.linalg.norm(styles.astype(float), axis=1, keepdims=True)
    np.testing.assert_allclose(gram(styles), rows @ rows.T, atol=1e-6)


@pytest.mark.parametrize("artists", [5, 10, 20])
def test_the_bend_is_near_the_number_of_styles(artists: int) -> None:
    rng = np.random.default_rng(artists)
    n = artists * 10
    x = np.repeat(rng.normal(size=(artists, 3000)), 10, 0) * 0.6 + rng.normal(size=(n, 3000))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x -= x.mean(0)
    kept = bend(np.linalg.svd(x)[1] ** 2)
    # Centring takes one of the styles' directions; a few too many cost little, too few cost much.
    assert 0 <= kept - (artists - 1) <= 3


def test_pure_noise_keeps_the_fewest_components_or_nearly() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 30_000))
    assert bend(np.linalg.svd(x - x.mean(0), compute_uv=False)[:-1] ** 2) <= 10


def test_fitted_and_fresh_loras_are_brought_to_one_scale() -> None:
    """A LoRA of the fit is multiplied by √ρ, any other by 1/√ρ, before its length is made 1."""
    sample = made()
    space = fit(sample, GROUPS)
    assert space.choice is not None
    np.testing.assert_allclose(space.choice.fitted * space.choice.fresh, 1.0, rtol=1e-12)
    assert (space.choice.fitted < 1).all()
    basis = Basis("own", "sd1", {}, {"model": space})
    assert basis.distinguishes and "seen" in (basis.record.names or ())
    parts = basis.parts(sample.styles, sample.layouts)
    seen = np.arange(N) % 2 == 0
    got = basis.vectors(parts, GROUPS, seen)
    raw = coordinates(space, parts.reshape(N, len(GROUPS), -1).astype(np.float64), GROUPS)
    raw *= np.where(seen[:, None], space.choice.fitted, space.choice.fresh)
    np.testing.assert_allclose(got, raw / np.linalg.norm(raw, axis=1, keepdims=True), atol=1e-12)
    again = from_stored(to_stored(basis))
    np.testing.assert_allclose(again.vectors(parts, GROUPS, seen), got, atol=1e-6)


def test_copies_do_not_bear_witness_for_components() -> None:
    """Copies agree in every group, and in their noise: they must not raise the number kept."""
    rng = np.random.default_rng(0)
    count, artist = 45, np.arange(45) % 15
    shared = {g: rng.normal(size=(15, 3000))[artist] for g in GROUPS}
    styles = {
        g: np.clip(25 * (0.3 * shared[g] + rng.normal(size=(count, 3000))), -127, 127).astype(
            np.int8
        )
        for g in GROUPS
    }
    alone = fit(Sample(styles, np.zeros(count, int), np.ones(count)), GROUPS)
    doubled = np.arange(0, count, 3)
    twice = np.concatenate([np.arange(count), doubled])
    weights = np.where(np.isin(twice, doubled), 0.5, 1.0)
    rows = {g: style[twice] for g, style in styles.items()}
    heads = np.arange(len(twice)) < count
    copies = fit(Sample(rows, np.zeros(len(twice), int), weights, heads), GROUPS)
    assert copies.size == alone.size == 15
